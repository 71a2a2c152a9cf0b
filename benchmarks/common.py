"""Parts that benchmarks share: models of one problem, figures of merit, results beside their environment."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxunlearn.assessment import retain_sample
from jaxunlearn.batches import Batches
from jaxunlearn.environment import describe_environment
from jaxunlearn.evaluation.metrics import accuracy
from jaxunlearn.evaluation.report import json_value, predict
from jaxunlearn.experiment import Prepared
from jaxunlearn.stages import write_json

RESULTS = Path(__file__).parent / "results"


def save_results(name: str, *, claim: str, settings: Mapping[str, Any], rows: list[dict]) -> None:
    """Write ``results/NAME.json``: what was asked, how, on what machine, and every row measured."""
    RESULTS.mkdir(exist_ok=True)
    content = {
        "claim": claim,
        "settings": dict(settings),
        "environment": describe_environment(),
        "rows": rows,
    }
    write_json(RESULTS / f"{name}.json", json_value(content))


class Judge:
    """Accuracies of a model on the four splits of a problem, and its distance to another model."""

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
    def distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Mean Euclidean distance of the softmax outputs of two models, on every split."""
        p, q = ({s: np.asarray(jax.nn.softmax(x)) for s, x in y.items()} for y in (a, b))
        return {s: float(np.linalg.norm(p[s] - q[s], axis=-1).mean()) for s in p}


def train_score(accuracies: Mapping[str, float]) -> float:
    """What settings are chosen by, on train data alone: retain accuracy times forget error."""
    return accuracies["retain_train"] * (1 - accuracies["forget_train"])


def print_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Rows as aligned text; fractions in percent."""
    print("  ".join(f"{c:>14}" for c in columns))
    for row in rows:
        cells = (row[c] for c in columns)
        print("  ".join(f"{100 * x:14.2f}" if isinstance(x, float) and 0 <= x <= 1 and c not in ("learning_rate",) else f"{x!s:>14}" for c, x in zip(columns, cells, strict=True)))


def load_results(name: str) -> dict[str, Any]:
    """A committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text())
