"""What benchmarks share: the problem of a config, figures of merit, results with environment."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxunlearn.assessment import retain_sample
from jaxunlearn.batches import Batches
from jaxunlearn.checkpoint import restore_variables
from jaxunlearn.environment import describe_environment
from jaxunlearn.evaluation.metrics import accuracy
from jaxunlearn.evaluation.report import json_value, predict
from jaxunlearn.preparation import Prepared
from jaxunlearn.stages import write_json

RESULTS = Path(__file__).parent / "results"
SPLITS = ("retain_train", "forget_train", "retain_test", "forget_test")


def save_results(name: str, *, claim: str, settings: Mapping[str, Any], rows: list[dict]) -> None:
    """Write ``results/NAME.json``: what was asked, how, on what machine, and every row measured."""
    RESULTS.mkdir(exist_ok=True)
    environment = describe_environment()
    content = {"claim": claim, "settings": settings, "environment": environment, "rows": rows}
    write_json(RESULTS / f"{name}.json", json_value(content))


def load_results(name: str) -> dict[str, Any] | None:
    """A committed result, or None."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def stored(prepared: Prepared, name: str) -> Any:
    """Variables of a model in the run folder: ``"original"`` or ``"retrained"``."""
    folder = Path(prepared.config.out) / "checkpoints" / name
    return restore_variables(folder, prepared.network.template)


def method_key(seed: int) -> jax.Array:
    """The key that ``jaxunlearn run`` hands to a method."""
    return jax.random.split(jax.random.key(seed), 3)[2]


class Judge:
    """Outputs of models on the four splits of a problem, their accuracies and distances."""

    def __init__(self, prepared: Prepared, *, batch_size: int = 500):
        source, splits, config = prepared.source, prepared.splits, prepared.config
        rows = {
            "forget_train": (source.train, splits.forget),
            "retain_train": (source.train, retain_sample(splits, config.evaluate, config.seed)),
            "forget_test": (source.test, splits.forget_test),
            "retain_test": (source.test, splits.retain_test),
        }
        self.apply_fn = prepared.network.apply_fn
        self.data = {
            split: Batches(examples.inputs[at], examples.labels[at], batch_size)
            for split, (examples, at) in rows.items()
        }

    def logits(self, variables: Any) -> dict[str, np.ndarray]:
        """Logits on every split."""
        return {s: predict(self.apply_fn, variables, b) for s, b in self.data.items()}

    def accuracies(self, logits: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Fraction right on every split."""
        return {s: accuracy(logits[s], b.labels)[0] for s, b in self.data.items()}

    @staticmethod
    def distances(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Mean Euclidean distance of the softmax outputs of two models, on every split."""
        p, q = ({s: np.asarray(jax.nn.softmax(x)) for s, x in y.items()} for y in (a, b))
        return {f"distance_{s}": float(np.linalg.norm(p[s] - q[s], axis=-1).mean()) for s in p}


def train_score(row: Mapping[str, float]) -> float:
    """What settings are chosen by, on train data alone: retain accuracy times forget error."""
    return row["retain_train"] * (1 - row["forget_train"])


def print_table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Rows as aligned text; ``columns`` maps names to format specifications, ``%`` in percent."""
    print("  ".join(f"{name:>14}" for name in columns))
    for row in rows:
        cells = (f"{row[name]:{spec}}" for name, spec in columns.items())
        print("  ".join(f"{cell:>14}" for cell in cells))
