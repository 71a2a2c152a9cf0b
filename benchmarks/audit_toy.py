"""Does an audit tell what has forgotten from what has not, and leave retrained models alone?

The digits MLP 64-64-64-10; 100 training images are to be forgotten, 50 of them mislabelled at
random. One audit of 64 models: original, do-nothing, ten epochs of fine-tuning, and a family
that was retrained anew, passed off as a method. Then nulls: five audits of 32 models each, with
other images to forget, of a family retrained anew.

    python -m benchmarks.audit_toy              the results that are committed
    python -m benchmarks.audit_toy --models 16  a trial, printed only
"""

import argparse
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.common import print_table, save_results
from jaxunlearn.batches import Batches
from jaxunlearn.config import DataConfig, ModelConfig
from jaxunlearn.data import Source
from jaxunlearn.evaluation.audit import SPLITS, AuditDraws, audit
from jaxunlearn.evaluation.distance import margins
from jaxunlearn.evaluation.forgetting_quality import forgetting_quality
from jaxunlearn.evaluation.klom import klom
from jaxunlearn.evaluation.report import predict
from jaxunlearn.evaluation.ulira import ulira
from jaxunlearn.families import fit_family, member
from jaxunlearn.methods import METHODS
from jaxunlearn.methods.base import UnlearningProblem
from jaxunlearn.network import build_network
from jaxunlearn.sources import load_source
from jaxunlearn.training import sgd

FORGET, MISLABELLED, EPOCHS, BATCH = 100, 50, 60, 128
FINE_TUNING = {"epochs": 10, "learning_rate": 0.05, "batch_size": BATCH}
ANEW = "retrained anew"
COLUMNS = {
    "seed": "",
    "family": "",
    "verdict": "",
    "forget": ".3f",
    "retain": ".3f",
    "test": ".3f",
    "f_grid": ".3f",
    "klom": ".2f",
    "klom_p95": ".2f",
    "ulira": ".3f",
}


class Problem(NamedTuple):
    """Images by split, with the labels that models are trained and judged on."""

    inputs: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]

    def batches(self, *splits: str) -> Batches:
        """Training batches of some splits."""
        x, y = ([part[s] for s in splits] for part in self)
        return Batches(np.concatenate(x), np.concatenate(y), BATCH)


def main() -> None:
    """Run the audits, save and print their rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", type=int, default=64)
    models = parser.parse_args().models
    started = time.perf_counter()
    rows = audited(0, models, methods=True)
    for seed in range(1, 6):
        rows += audited(seed, models // 2, methods=False)
    print_table(rows, COLUMNS)
    spent = time.perf_counter() - started
    print(f"{spent:.0f} s")
    if models == 64:
        settings = {"forget": FORGET, "mislabelled": MISLABELLED, "epochs": EPOCHS}
        settings |= {"batch_size": BATCH, "fine_tuning": FINE_TUNING, "seconds": spent}
        claim = " ".join(__doc__.split("\n\n")[1].split())
        save_results("digits_audit_toy", claim=claim, settings=settings, rows=rows)


def problem_of(source: Source, seed: int) -> Problem:
    """Which images are forgotten, which labels are wrong; held-out images are wrong as often."""
    rng = np.random.default_rng(seed)
    train, test = (rng.permutation(len(side.labels)) for side in (source.train, source.test))
    rows = {"forget": train[:FORGET], "retain": train[FORGET:]}
    rows |= dict(zip(SPLITS[2:], np.array_split(test, 3), strict=True))
    sides = {s: source.train if s in ("forget", "retain") else source.test for s in SPLITS}
    labels = {s: np.array(sides[s].labels[rows[s]]) for s in SPLITS}
    for split, share in (("forget", MISLABELLED / FORGET), ("held_out", MISLABELLED / FORGET)):
        wrong = slice(round(share * len(labels[split])))
        k, count = source.num_classes, len(labels[split][wrong])
        labels[split][wrong] = (labels[split][wrong] + rng.integers(1, k, count)) % k
    return Problem({s: np.asarray(sides[s].inputs)[rows[s]] for s in SPLITS}, labels)


def audited(seed: int, models: int, *, methods: bool) -> list[dict[str, Any]]:
    """An audit, one row for each family."""
    source = load_source("digits")
    problem = problem_of(source, seed)
    network = build_network(
        ModelConfig("mlp", options={"features": [64, 64]}), DataConfig(forget=0), source
    )
    sample = np.concatenate([problem.inputs[s] for s in SPLITS])
    labels = np.concatenate([problem.labels[s] for s in SPLITS])
    split = np.repeat(SPLITS, [len(problem.labels[s]) for s in SPLITS])
    shown = Batches(sample, labels, len(sample))

    def answers(variables: Any) -> np.ndarray:
        return predict(network.apply_fn, variables, shown)

    def trained(stream: int, count: int, *splits: str) -> Any:
        batches = problem.batches(*splits)
        steps = {"steps_per_epoch": len(batches), "epochs": EPOCHS}
        rate = {"learning_rate": 0.1, "momentum": 0.9, "schedule": "cosine"}
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), stream), count)
        optimizer = sgd(**rate, **steps)
        return fit_family(
            keys, network.apply_fn, network.init, batches, optimizer=optimizer, epochs=EPOCHS
        )

    def all_answers(family: Any, count: int) -> np.ndarray:
        return np.stack([answers(member(family, i)) for i in range(count)])

    originals = trained(0, models, "forget", "retain")
    logits = {"original": all_answers(originals, models)}
    logits["do_nothing"] = all_answers(originals, models)
    logits["retrained"] = all_answers(trained(1, 2 * models, "retain"), 2 * models)
    logits[ANEW] = all_answers(trained(2, models, "retain"), models)
    if methods:
        method = METHODS["finetune"]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 3), models)
        forget, retain = problem.batches("forget"), problem.batches("retain")
        tuned = []
        for i in range(models):
            request = UnlearningProblem(
                network.apply_fn, member(originals, i), forget, retain, source.num_classes
            )
            done = method.run(keys[i], request, method.config(**FINE_TUNING))
            tuned.append(answers(done.variables))
        logits["fine-tuning"] = np.stack(tuned)
    content = audit(logits, labels, split, goal="untraining", draws=AuditDraws(seed=seed)).content
    reference = logits["retrained"][:models]
    logits = logits | {"retrained": logits["retrained"][models:]}
    shares = {
        name: {s: float((stack.argmax(-1) == labels)[:, split == s].mean()) for s in SPLITS}
        for name, stack in logits.items()
    }
    return [
        {"seed": seed, "models": models, "family": name, "verdict": content["verdict"][name]}
        | {"reasons": content["reasons"][name], **shares[name]}
        | {m: content["metrics"][m]["rows"][name].get("p_holm") for m in content["primary"]}
        | figures(stack, reference, labels, split == "forget")
        for name, stack in logits.items()
    ]


def figures(
    stack: np.ndarray, reference: np.ndarray, labels: np.ndarray, forget: np.ndarray
) -> dict[str, float]:
    """Scores on the forget images, against one half of the retrained models."""
    u, r = (margins(each[:, forget], labels[forget]) for each in (stack, reference))
    distance = klom(u, r)
    return {
        "f_grid": forgetting_quality(u, r, form="grid").value,
        "f_exact": forgetting_quality(u, r).value,
        "klom": distance.mean,
        "klom_p95": distance.p95,
        "ulira": ulira(u, r).accuracy,
    }


if __name__ == "__main__":
    main()
