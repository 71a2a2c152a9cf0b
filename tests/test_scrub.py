"""SCRUB: its passes against the reference code, when it moves at all, and rewinding."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.epochs import run_epoch
from jaxunlearn.methods import FinetuneConfig, ScrubConfig, UnlearningProblem, finetune, scrub
from jaxunlearn.methods.rewind import rewind
from jaxunlearn.methods.scrub import _programs, check_scrub
from jaxunlearn.models import MLP, read_arrays
from jaxunlearn.steps import TrainState

N, K, D = 24, 4, 6
KEY = jax.random.key(0)
SHORT = ScrubConfig(learning_rate=0.1, forget_batch_size=6, batch_size=6)


class Net(nn.Module):
    """With batch statistics, dropout or neither."""

    part: str

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(5)(x)
        if self.part == "batch norm":
            x = nn.BatchNorm(use_running_average=not train)(x)
        if self.part == "dropout":
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(K)(nn.relu(x))


def problem_of(model, **fields):
    """Class 1 of four: six forget images, eighteen retained ones."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), jnp.float32)
    labels = np.arange(N) % K
    forget, retain = (Batches(x[part], labels[part], 6) for part in (labels == 1, labels != 1))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    return UnlearningProblem(model.apply, variables, forget, retain, K, (1,), **fields)


@pytest.fixture(scope="module")
def problem():
    return problem_of(MLP(features=(5,), num_classes=K))


def scrubbed(problem, **settings):
    return scrub(KEY, problem, dataclasses.replace(SHORT, **settings))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def largest_change(before, after):
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
    return max(jax.tree.leaves(gaps))


# --- the passes -----------------------------------------------------------------------------------


def plain(variables, inputs):
    """The network of the stored passes, with torch's names and order."""
    p = variables["params"]
    x = jnp.tanh(inputs @ p["fc1.weight"].T + p["fc1.bias"][None])
    return x @ p["fc2.weight"].T + p["fc2.bias"][None]


@pytest.mark.parametrize(
    ("side", "after"), [("forget", "after_maximize"), ("retain", "after_minimize")]
)
def test_a_pass_is_that_of_the_reference_code(golden, x64, side, after):
    stored = read_arrays(golden / "scrub_neggrad.npz")
    model, teacher, expected = (
        {
            name.removeprefix(f"{kind}__"): jnp.asarray(array, jnp.float64)
            for name, array in stored.items()
            if name.startswith(f"{kind}__")
        }
        for kind in ("student", "teacher", after)
    )
    gamma, alpha, rate, temperature, _ = stored["gamma_alpha_lr_T_neggradalpha"].tolist()
    given = {"gamma": gamma, "alpha": alpha, "learning_rate": rate, "temperature": temperature}
    sgd = {"momentum": 0.0, "weight_decay": 0.0, "batch_norm": "eval"}
    away, stay = _programs(plain, ScrubConfig(**given, **sgd), None)
    x, y = (
        jnp.concatenate([stored[f"{axis}_{side}__b{i}"] for i in range(3)]) for axis in ("x", "y")
    )
    size = len(stored[f"x_{side}__b0"])
    order = np.arange(3 * size).reshape(3, size)
    xs = {"indices": order % len(x), "mask": order < len(x), "step": np.arange(3)}
    consts = {"inputs": x.astype(jnp.float64), "labels": y, "key": KEY}
    consts["teacher"] = {"params": teacher}
    step = away if side == "forget" else stay.step
    state = TrainState({"params": model}, stay.optimizer.init(model))
    state, _ = run_epoch(step, consts, state, xs)
    assert expected.keys() == model.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(state.variables["params"][name], array, atol=2e-7)


def test_without_forget_passes_and_distillation_it_is_fine_tuning(problem):
    after = scrubbed(problem, forget_epochs=0, alpha=0.0, gamma=1.0, epochs=2)
    tuned = finetune(KEY, problem, FinetuneConfig(epochs=2, learning_rate=0.1, batch_size=6))
    assert_same(after.variables, tuned.variables)
    assert after.info["epochs"] == tuned.info["epochs"]
    assert after.info["notes"] == []


def test_forget_data_are_read_in_the_first_epochs_alone(problem):
    info = scrubbed(problem, forget_epochs=1).info
    first, *later = (set(row) for row in info["epochs"])
    assert "loss_forget" in first
    assert all("loss_forget" not in row for row in later)
    assert (info["steps"], info["forget_passes"], info["retain_passes"]) == (1 + 3 * 3, 1, 3)


def test_the_model_moves_away_from_the_original_on_forget_data(problem):
    rows = scrubbed(problem, forget_epochs=6, epochs=6, order="min_first").info["epochs"]
    assert (np.diff([row["loss_forget"] for row in rows]) < 0).all()


# --- whether it moves -----------------------------------------------------------------------------


def moved(problem, **settings):
    """By how much forget passes change the result of one epoch, and what is said about it."""
    one = {"epochs": 1, "momentum": 0.0, "weight_decay": 0.0, "augment": False} | settings
    with_, without = (scrubbed(problem, **one, forget_epochs=m) for m in (1, 0))
    return largest_change(with_.variables["params"], without.variables["params"]), with_.info[
        "notes"
    ]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_first_forget_pass_of_a_plain_network_moves_nothing_and_that_is_said(problem, mode):
    change, notes = moved(problem, batch_norm=mode)
    assert change < 1e-6
    assert len(notes) == 1
    assert "moves nothing but by weight decay and rounding" in notes[0]
    change, notes = moved(problem, batch_norm=mode, order="min_first")
    assert change > 1e-4
    assert notes == []


@pytest.mark.parametrize("part", ["batch norm", "dropout"])
def test_train_mode_lets_the_first_forget_pass_move(part):
    problem = problem_of(Net(part))
    change, notes = moved(problem)
    assert change > 1e-3
    assert notes == []
    assert moved(problem, batch_norm="eval")[1] != []


# --- rewinding ------------------------------------------------------------------------------------


def held_out(problem, label=1):
    """Images of the forgotten class that are not those of the forget data."""
    x = 3 * jax.random.normal(jax.random.key(5), (16, D))
    return dataclasses.replace(problem, held_out_forget=Batches(x, np.full(16, label), 8))


@pytest.mark.parametrize(
    ("errors", "reference", "epoch"),
    [([0, 0.5, 1], 0.5, 1), ([0, 0.5, 1], 0, 0), ([0, 1, 0.5, 0.5], 0.25, 3)],
)
def test_the_epoch_is_the_last_of_those_nearest_to_the_reference(errors, reference, epoch):
    """A model that calls the rows right that are above its threshold."""
    rows = jnp.arange(4.0)[:, None] / 4 + 0.125
    forget = Batches(rows, np.ones(4, int), 4)
    last = errors[-1]
    # Below 0 every row is right; the held-out rows are shifted so that the last model errs rightly.
    other = Batches(rows + last - reference, np.ones(4, int), 4)

    def apply_fn(variables, x):
        return jnp.concatenate([variables["threshold"] - x, x - variables["threshold"]], axis=1)

    problem = UnlearningProblem(apply_fn, {}, forget, None, 2, (1,), held_out_forget=other)
    found = rewind(problem, [{"threshold": jnp.float32(e)} for e in errors])
    assert found == (epoch, errors, reference)


def test_the_model_that_is_returned_is_that_of_the_epoch_rewound_to(problem):
    settings = {"forget_epochs": 3, "order": "min_first", "learning_rate": 0.3}
    after = scrubbed(held_out(problem), rewind=True, **settings)
    info = after.info
    gaps = np.abs(np.array(info["forget_errors"]) - info["reference_error"])
    assert len(gaps) == 1 + 3
    assert gaps[info["rewound_to"]] == gaps.min()
    epoch = info["rewound_to"]
    if epoch == 0:
        expected = problem.variables
        assert "Rewound to the original" in info["notes"][0]
    else:
        shorter = settings | {"forget_epochs": epoch}
        expected = scrubbed(problem, epochs=epoch, **shorter).variables
    assert_same(after.variables, expected)


def test_a_model_that_stays_at_the_original_is_rewound_to_its_last_epoch(problem):
    forget = dataclasses.replace(problem, held_out_forget=problem.forget)
    still = {"learning_rate": 0.0, "weight_decay": 0.0}
    assert scrubbed(forget, rewind=True, **still).info["rewound_to"] == 3


def test_rewinding_without_images_like_the_forget_data_is_refused(problem):
    config = dataclasses.replace(SHORT, rewind=True)
    with pytest.raises(ValueError, match="scrub with rewind needs held_out_forget"):
        check_scrub(problem, config)
    with pytest.raises(ValueError, match=r"has images of classes \[2\], which are not forgotten"):
        scrub(KEY, held_out(problem, label=2), config)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forget_epochs": 4}, "forget_epochs = 4: wanted 0 to epochs = 3"),
        ({"temperature": 0.0}, "temperature = 0.0: wanted weights of at least 0 and a positive"),
        ({"gamma": -1.0}, "gamma = -1.0"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0: wanted at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ScrubConfig(**settings)


def test_an_order_that_does_not_exist_is_refused():
    config = ScrubConfig()
    object.__setattr__(config, "order", "other")  # type checks would refuse it first
    with pytest.raises(ValueError, match=r"order = 'other': write one of \('paper', 'min_first'\)"):
        config.__post_init__()
