"""Bands of the digits MLP: how much each baseline forgets and keeps, in percent.

A row of ``ROWS`` is a method with settings and what was measured for it. The default suite asks
for class 3 and seed 0 of a few rows; the rest is marked slow: the mean over three
classes and three seeds, and random samples, half of them mislabelled. The settings are not tuned,
so a band says that a method works as it should, never that one is better than another.

A new row: ``"name": Row("method", {settings}, (FA, RA, TA), (FA, RA, TA))``, with None where the
method has no such scope. ``QUICK`` names those of the default suite. ``one`` is for rows whose
class 3 of seed 0 lies outside the band of the mean.
"""

from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.methods import METHODS, UnlearningProblem
from jaxunlearn.methods.base import Recipe
from jaxunlearn.models import MLP
from jaxunlearn.sources import load_source
from jaxunlearn.training import accuracy, fit, sgd

MODEL = MLP(features=(128, 64))
K, BATCH, EPOCHS = 10, 96, 60
CLASSES, SEEDS = (3, 7, 1), (0, 1, 2)
BATCHES = {"forget_batch_size": 48, "batch_size": 96}  # of methods that have both


class Row(NamedTuple):
    """A method, its settings, and accuracies in percent on forget, retain and test data.

    Test data are those of retained classes, or all for samples. A run may miss the first by 10
    points and the others by 3.
    """

    method: str
    settings: dict[str, Any]
    classes: tuple[float, float, float] | None
    samples: tuple[float, float, float] | None
    one: tuple[float, float, float] | None = None


TUNED = {"epochs": 10, "learning_rate": 0.05, "batch_size": 96}
LABELS = {"epochs": 10, "learning_rate": 0.01, **BATCHES}
ADAM = {"optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 0.0}
SHRINK = {"epochs": 10, "learning_rate": 0.01, "radius": 0.25, "forget_batch_size": 64}

QUICK = {"random labels", "NegGrad+, separate", "SCRUB, retain data first", "SalUn"}
QUICK |= {"SSD by example", "Fisher noise"}

ROWS = {
    "fine-tuning": Row("finetune", TUNED, (86.5, 100, 98.8), (52.3, 100, 99.0)),
    "random labels": Row("random_labels", LABELS, (0, 99.3, 98.1), (54.7, 100, 97.5)),
    # From single cases 17 points apart, so no case of its own in the default suite.
    "random labels, forget data only": Row(
        "random_labels",
        LABELS | {"retain_pass": False, "momentum": 0.0},
        (0, 85.5, 84.4),
        (57.0, 89.1, 84.2),
    ),
    "relabelled": Row(
        "random_labels",
        {"redraw": "once", "shuffle_together": True, "epochs": 3, **ADAM},
        (0.1, 99.1, 96.4),
        (52.3, 99.8, 96.4),
    ),
    "gradient ascent": Row(
        "gradient_ascent",
        {"epochs": 5, "learning_rate": 1e-3, "forget_batch_size": 48},
        (99.5, 100, 98.8),
        (57.7, 100, 97.6),
    ),
    "gradient ascent, far": Row(
        "gradient_ascent",
        {"epochs": 30, "learning_rate": 0.01, "forget_batch_size": 48},
        (6.6, 95.8, 93.9),
        None,
    ),
    # A class is forgotten or, like 7 of every seed, hardly at all.
    "NegGrad+": Row(
        "negative_gradient_plus",
        {"epochs": 5, "momentum": 0.9, "forget_batch_size": 48, "batch_size": 128},
        (31.6, 96.9, 95.6),
        (52.7, 99.8, 98.0),
        one=(0, 93.1, 92.3),
    ),
    "NegGrad+, separate": Row(
        "negative_gradient_plus",
        {"epochs": 5, "separate": True, **BATCHES},
        (3.9, 98.9, 96.3),
        (51.3, 99.2, 95.9),
    ),
    "identity": Row("identity", {}, (100, 100, 98.8), (59.7, 100, 97.8)),
    "head edit": Row("head_edit", {}, (0, 100, 98.9), None),
    "retrain": Row("retrain", {}, (0, 100, 98.7), (49.0, 100, 99.1)),
    # Single cases are 18 points apart.
    "l1": Row("finetune", TUNED | {"l1": 5e-4}, (69.8, 100, 97.5), (52.0, 100, 99.2)),
    "CF-1": Row("finetune", TUNED | {"last_k": 1}, (95.5, 100, 98.9), (54.3, 100, 98.5)),
    "EU-1": Row("retrain", {"last_k": 1}, (0.2, 100, 98.9), (53.0, 100, 98.6)),
    "EU-2": Row("retrain", {"last_k": 2}, (0, 100, 98.7), (51.0, 100, 98.8)),
    "SCRUB, retain data first": Row(
        "scrub",
        {"epochs": 6, "forget_epochs": 3, "order": "min_first", **ADAM, **BATCHES},
        (0, 98.8, 96.1),
        (49.7, 99.3, 96.3),
    ),
    "SalUn": Row("saliency", LABELS, (0, 98.7, 96.6), (48.3, 98.4, 95.1)),
    "boundary shrink": Row(
        "boundary_shrink",
        SHRINK | {"momentum": 0.0, "force": True},
        (0.2, 99.1, 96.8),
        (57.7, 98.0, 93.8),
    ),
    "boundary shrink, momentum": Row(
        "boundary_shrink",
        SHRINK | {"forget_batch_size": 96},
        (0, 87.3, 84.9),
        None,
        # 9 points of standard deviation over classes and seeds
    ),
    "boundary expanding": Row(
        "boundary_expanding",
        {"learning_rate": 0.003, "momentum": 0.0},
        (24.3, 98.4, 95.7),
        None,
    ),
    "boundary expanding, momentum": Row(
        "boundary_expanding",
        {"learning_rate": 0.01},
        (0, 42.1, 42.0),
        None,
        # 9 points of standard deviation over classes and seeds
    ),
    "bad teacher": Row(
        "bad_teacher",
        {"epochs": 5, "learning_rate": 1e-3},
        (7.8, 93.8, 90.7),
        (59.0, 98.2, 93.8),
        one=(2.7, 84.3, 82.0),
    ),
    "SSD by example": Row(
        "dampening", {"importance": "per_sample", "alpha": 2.0}, (0.2, 98.4, 95.7), None
    ),
    # 8 points of standard deviation over classes and seeds; mislabelled samples collapse.
    "SSD by mixed batches": Row("dampening", {}, (0, 90.4, 88.5), None, one=(0, 82.0, 81.7)),
    "LFSSD by example": Row(
        "dampening",
        {"importance": "per_sample", "label_free": True, "alpha": 2.0},
        (0, 89.5, 86.6),
        (56.0, 99.9, 96.9),
        one=(0, 71.8, 68.1),
    ),
    "Fisher noise": Row("fisher_noise", {}, (0, 99.8, 96.9), (55.7, 99.7, 95.9)),
    "influence": Row("influence", {"batch_size": 500}, (0, 99.3, 96.6), (42.7, 87.8, 84.9)),
    "UNSIR": Row("unsir", {}, (2.4, 96.9, 95.0), None),
    "SCAR": Row("scar", {"learning_rate": 1e-3, **BATCHES}, (0.6, 99.5, 97.2), (55.5, 99.9, 97.2)),
}


class Toy(NamedTuple):
    """A model and its training data, with the test data in their own order."""

    variables: dict[str, Any]
    inputs: np.ndarray
    labels: np.ndarray
    test: Batches

    def forgetting(self, gone, classes=()):
        """The problem of forgetting the rows that are marked."""
        forget, retain = (
            Batches(self.inputs[rows], self.labels[rows], BATCH) for rows in (gone, ~gone)
        )
        return UnlearningProblem(
            MODEL.apply,
            self.variables,
            forget,
            retain,
            K,
            classes,
            init_fn=init,
            recipe=RECIPE,
            surrogate=NOISE,
        )


@cache
def optimizer(steps_per_epoch):
    return sgd(
        learning_rate=0.05,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="cosine",
        steps_per_epoch=steps_per_epoch,
        epochs=EPOCHS,
    )


RECIPE = Recipe(optimizer, EPOCHS, BATCH)
NOISE = Batches(
    np.random.default_rng(0).random((960, 64), dtype=np.float32), np.zeros(960, int), 96
)


@jax.jit
def init(key):
    return MODEL.init(key, np.zeros((1, 64), np.float32))


def digits():
    """Pixels in [0, 1], flat."""
    source = load_source("digits")
    parts = (source.train, source.test)
    return [(p.inputs.reshape(len(p.labels), -1) / source.scale, p.labels) for p in parts]


def trained(seed, inputs, labels, test):
    init_key, fit_key = jax.random.split(jax.random.key(seed))
    data = Batches(inputs, labels, BATCH)
    variables = fit(
        fit_key, MODEL.apply, init(init_key), data, optimizer=optimizer(len(data)), epochs=EPOCHS
    ).variables
    return Toy(variables, inputs, labels, Batches(*test, 360))


@cache
def original(seed):
    train, test = digits()
    return trained(seed, *train, test)


@cache
def mislabelled(seed):
    """Trained with 50 wrong labels, and the problem of forgetting these and 50 right ones."""
    (inputs, labels), test = digits()
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(labels), 100, replace=False)
    labels = labels.copy()
    labels[chosen[:50]] = (labels[chosen[:50]] + rng.integers(1, K, 50)) % K
    toy = trained(seed, inputs, labels, test)
    return toy, toy.forgetting(np.isin(np.arange(len(labels)), chosen))


def percent(row, toy, problem, seed):
    """Accuracies after a row's method, on forget, retain and test data."""
    method = METHODS[row.method]
    unlearned = method.run(jax.random.key(seed), problem, method.config(**row.settings))
    kept = np.flatnonzero(~np.isin(toy.test.labels, problem.forget_classes))
    data = problem.forget, problem.retain, toy.test.select(kept)
    return np.array([100 * accuracy(MODEL.apply, unlearned.variables, part) for part in data])


def of_class(row, seed, label):
    toy = original(seed)
    return percent(row, toy, toy.forgetting(toy.labels == label, (label,)), seed)


def check(found, expected):
    assert (np.abs(found - np.array(expected)) <= (10, 3, 3)).all(), (found, expected)


def rows_of(field, names=ROWS):
    return [
        pytest.param(row, id=name)
        for name, row in ROWS.items()
        if getattr(row, field) is not None and name in names
    ]


@pytest.mark.parametrize("row", rows_of("classes", QUICK))
def test_a_class_is_forgotten_as_far_as_was_measured(row):
    check(of_class(row, 0, 3), row.one or row.classes)


@pytest.mark.slow
@pytest.mark.parametrize("row", rows_of("classes"))
def test_classes_are_forgotten_as_far_as_was_measured(row):
    found = [of_class(row, seed, label) for seed in SEEDS for label in CLASSES]
    check(np.mean(found, axis=0), row.classes)


@pytest.mark.slow
@pytest.mark.parametrize("row", rows_of("samples"))
def test_samples_are_forgotten_as_far_as_was_measured(row):
    found = [percent(row, *mislabelled(seed), seed) for seed in SEEDS]
    check(np.mean(found, axis=0), row.samples)
