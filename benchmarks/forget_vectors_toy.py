"""How far does one vector for all inputs reach, by class and for random samples?

The digits MLP, three seeds of initialisation and data order. Every class in turn, 30 cases for each
setting: weights of the forget data (β) and of the norm (λ), the number of epochs, the paper's form
of the objective. A tenth of the data at random, and two classes, learned directly and as weighted
sums of the classes' vectors. Without a vector, and with a random one of the same norm, beside them.

    python -m benchmarks.forget_vectors_toy              about 5 minutes on two CPU cores
"""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import method_key, print_table, save_results
from benchmarks.dimensional_alignment_toy import trained
from jaxunlearn.batches import Batches
from jaxunlearn.config import load_config
from jaxunlearn.methods import ForgetVectorsConfig, UnlearningProblem, compose, learn_forget_vectors
from jaxunlearn.methods.forget_vectors_effect import effect
from jaxunlearn.preparation import prepare, unlearning_problem

CONFIG = Path(__file__).parents[1] / "configs" / "digits_forget_vector.toml"
SEEDS, CLASSES = (0, 1, 2), np.arange(10)
RECIPE = ForgetVectorsConfig(batch_size=128)
BETAS = (1.0, 3.0, 5.0, 10.0, 20.0, 50.0)
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"β = {beta:g}": {"beta": beta} for beta in BETAS},
    **{
        f"β = 10, λ = {weight:g}": {"beta": 10.0, "norm_weight": weight}
        for weight in (0.0, 10.0, 100.0)
    },
    "β = 3, λ = 10": {"norm_weight": 10.0},
    **{f"β = 10, {n} epochs": {"beta": 10.0, "epochs": n} for n in (5, 10, 20, 100)},
    **{
        f"paper, λ₁ = {retain:g}, λ₂ = {norm:g}": {
            "objective": "paper",
            "paper_retain_weight": retain,
            "paper_norm_weight": norm,
        }
        for retain in (1.0, 3.0)
        for norm in (0.0, 0.01, 0.1, 1.0)
    },
}
COLUMNS = {"ua": ".1%", "ra": ".1%", "ta": ".1%", "pr": ".1%", "norm": ".2f"}


def main() -> None:
    """Run all settings, save rows and summaries, print the tables."""
    rows, others, seconds = [], [], []
    for seed in SEEDS:
        toy = _Toy(seed)
        for row in by_class(toy):
            rows.append({"seed": seed} | row)
        others += [{"seed": seed} | row for row in by_request(toy)]
        seconds.append(timed(toy))
    summary = summarised(rows, "setting", COLUMNS)
    requests = summarised(others, "request", {"ua": ".1%", "ra": ".1%", "sum": ".1%"})
    save_results(
        "digits_forget_vectors_toy",
        claim=" ".join(__doc__.split("\n\n")[1].split()),
        settings={
            "config": f"configs/{CONFIG.name}",
            "recipe": dataclasses.asdict(RECIPE),
            "settings": SETTINGS,
            "seeds": SEEDS,
            "summary": summary,
            "requests": requests,
            "seconds": seconds,
        },
        rows=rows + others,
    )
    print_table(summary, {"setting": ""} | COLUMNS)
    print_table(requests, {"request": "", "ua": ".1%", "ra": ".1%", "sum": ".1%"})
    print(seconds)


class _Toy:
    """A seed's original model, its training data joined, and its test data."""

    def __init__(self, seed: int):
        prepared = prepare(load_config(CONFIG, [f"seed={seed}"]))
        keys = jax.random.split(jax.random.key(seed), 3)
        variables = trained(prepared, keys[0], prepared.splits.train)
        self.key, self.source = method_key(seed), prepared.source
        self.problem = unlearning_problem(prepared, variables)
        both = self.problem.forget, self.problem.retain
        assert self.problem.retain is not None
        self.inputs = np.concatenate([b.inputs for b in both if b is not None])
        self.labels = np.concatenate([b.labels for b in both if b is not None])
        self.flags = self.labels[None] == CLASSES[:, None]

    def learn(
        self, flags: np.ndarray, betas: np.ndarray | None = None, **changes: Any
    ) -> jax.Array:
        """Vectors of these sets."""
        config = dataclasses.replace(RECIPE, **changes)
        return learn_forget_vectors(self.key, self.problem, flags, config, betas).deltas

    def judged(self, deltas: jax.Array, flags: np.ndarray) -> Iterator[dict[str, Any]]:
        """UA and RA on the training data of each vector, and its norm."""
        found = effect(self.problem, deltas, flags, RECIPE)
        norms = np.linalg.norm(np.asarray(deltas).reshape(len(deltas), -1), axis=1)
        for ua, ra, norm in zip(found.forget_error, found.retain_accuracy, norms, strict=True):
            yield {"ua": float(ua), "ra": float(ra), "sum": float(ua + ra), "norm": float(norm)}

    def on_test(self, deltas: jax.Array) -> Iterator[dict[str, float]]:
        """PR and TA of one vector per class: the same two numbers on the test set."""
        x, y = self.source.test
        order = np.argsort(y != 0, kind="stable")  # the joined order begins with the forget data
        forget, retain = (Batches(x[rows], y[rows], 128) for rows in (y == 0, y != 0))
        problem = dataclasses.replace(
            self.problem, forget=forget, retain=retain, forget_classes=(0,)
        )
        found = effect(problem, deltas, y[order][None] == CLASSES[:, None], RECIPE)
        for pr, ta in zip(found.forget_error, found.retain_accuracy, strict=True):
            yield {"pr": float(pr), "ta": float(ta)}

    def request(self, gone: np.ndarray, classes: tuple[int, ...] = ()) -> UnlearningProblem:
        """The problem of forgetting these examples."""
        forget, retain = (Batches(self.inputs[r], self.labels[r], 128) for r in (gone, ~gone))
        return dataclasses.replace(
            self.problem, forget=forget, retain=retain, forget_classes=classes
        )


def by_class(toy: _Toy) -> Iterator[dict[str, Any]]:
    """Every class in turn, in every setting and without a vector."""
    found = {name: toy.learn(toy.flags, **changes) for name, changes in SETTINGS.items()}
    default = found["β = 3"]
    noise = jax.random.normal(toy.key, default.shape)
    axes = tuple(range(1, default.ndim))
    lengths = [jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True)) for x in (default, noise)]
    vectors = {
        "no vector": jnp.zeros_like(default),
        "random, norms of β = 3": noise * (lengths[0] / lengths[1]),
        **found,
    }
    for name, deltas in vectors.items():
        figures = zip(toy.judged(deltas, toy.flags), toy.on_test(deltas), strict=True)
        for label, (train, test) in enumerate(figures):
            yield {"setting": name, "class": label, **train, **test}


def by_request(toy: _Toy) -> Iterator[dict[str, Any]]:
    """Requests that the vectors of the classes may answer: two classes, and random samples."""
    bank = toy.learn(toy.flags)
    gone = np.isin(toy.labels, (0, 1))
    (direct,) = toy.judged(toy.learn(gone[None]), gone[None])
    yield {"request": "classes 0 and 1, direct", **direct}
    composed = compose(toy.key, toy.request(gone, (0, 1)), bank, RECIPE).info
    for way in ("learned", "sum", "single"):
        yield _composed(f"classes 0 and 1, {way}", composed[way])
    drawn = np.random.default_rng(0).permutation(len(toy.labels)) < round(0.1 * len(toy.labels))
    betas = np.array(BETAS)
    flags = np.repeat(drawn[None], len(betas), axis=0)
    deltas = toy.learn(flags, betas)
    for beta, figures in zip(BETAS, toy.judged(deltas, flags), strict=True):
        yield {"request": f"random 10 %, direct, β = {beta:g}", **figures}
    for beta in BETAS:
        config = dataclasses.replace(RECIPE, beta=beta)
        found = compose(toy.key, toy.request(drawn), bank, config).info["learned"]
        yield _composed(f"random 10 %, weighted sum, β = {beta:g}", found)


def _composed(name: str, figures: dict[str, float]) -> dict[str, Any]:
    ua, ra = figures["forget_error"], figures["retain_accuracy"]
    return {"request": name, "ua": ua, "ra": ra, "sum": ua + ra}


def timed(toy: _Toy) -> dict[str, float]:
    """Seconds to learn ten vectors: mapped over in one program, and one after another."""
    seconds = {}
    for name, at_once in (("together", 10), ("one after another", 1)):
        for _ in range(2):  # the first call compiles
            started = time.perf_counter()
            found = learn_forget_vectors(toy.key, toy.problem, toy.flags, RECIPE, at_once=at_once)
            jax.block_until_ready(found.deltas)
            seconds[name] = time.perf_counter() - started
    return seconds


def summarised(
    rows: list[dict[str, Any]], name: str, columns: dict[str, str]
) -> list[dict[str, Any]]:
    """Mean, standard deviation, least and largest over the cases of each setting."""
    summary = []
    for value in dict.fromkeys(row[name] for row in rows):
        own = {c: np.array([r[c] for r in rows if r[name] == value]) for c in columns}
        figures = {c: float(x.mean()) for c, x in own.items()}
        spread = {f"{c}_sd": float(x.std()) for c, x in own.items()}
        least = {f"{c}_min": float(x.min()) for c, x in own.items()}
        most = {f"{c}_max": float(x.max()) for c, x in own.items()}
        summary.append({name: value} | figures | spread | least | most)
    return summary


if __name__ == "__main__":
    main()
