"""SalUn: its masks and its epoch against the reference code, and what a mask keeps in place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.epochs import run_epoch
from jaxunlearn.methods import (
    RandomLabelsConfig,
    SaliencyConfig,
    UnlearningProblem,
    random_labels,
    saliency,
)
from jaxunlearn.methods.phases import optimizer_of
from jaxunlearn.methods.saliency import _programs
from jaxunlearn.methods.saliency_mask import largest_entries, masked, saliency_mask, shares
from jaxunlearn.models import MLP, read_arrays
from jaxunlearn.steps import TrainState

N, K, D = 24, 4, 6
KEY = jax.random.key(0)
MODEL = MLP(features=(5,), num_classes=K)
SHORT = SaliencyConfig(epochs=2, learning_rate=0.1, forget_batch_size=4, batch_size=6, share=0.3)


@pytest.fixture(scope="module")
def problem():
    """Class 1 of four: six forget images, eighteen retained ones."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), jnp.float32)
    labels = np.arange(N) % K
    forget, retain = (Batches(x[part], labels[part], 6) for part in (labels == 1, labels != 1))
    variables = jax.jit(MODEL.init)(jax.random.key(1), x)
    return UnlearningProblem(MODEL.apply, variables, forget, retain, K, (1,))


def run(problem, **settings):
    return saliency(KEY, problem, dataclasses.replace(SHORT, **settings))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- the reference code ---------------------------------------------------------------------------


def plain(variables, inputs):
    """The network of the stored arrays, with torch's names and order."""
    p = variables["params"]
    x = jnp.tanh(inputs @ p["fc1.weight"].T + p["fc1.bias"][None])
    return x @ p["fc2.weight"].T + p["fc2.bias"][None]


class Stored:
    """Arrays of the reference run."""

    def __init__(self, golden):
        self.arrays = read_arrays(golden / "salun.npz")

    def tree(self, kind):
        prefix = f"{kind}__"
        return {
            name.removeprefix(prefix): jnp.asarray(array)
            for name, array in self.arrays.items()
            if name.startswith(prefix)
        }

    def rows(self, name):
        return jnp.concatenate([self.arrays[f"{name}__b{i}"] for i in range(3)])

    @property
    def problem(self):
        forget, retain = (
            Batches(self.rows(f"x_{side}"), self.rows(f"y_{side}"), size)
            for side, size in (("forget", 7), ("retain", 9))
        )
        return UnlearningProblem(plain, {"params": self.tree("param")}, forget, retain, 4)


@pytest.fixture
def stored(golden):
    return Stored(golden)


@pytest.mark.parametrize("density", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_masks_are_those_of_the_reference_code(stored, density):
    assert_same(
        saliency_mask(stored.problem, 7, density),
        jax.tree.map(lambda mask: mask == 1, stored.tree(f"mask__{density}")),
    )


def test_an_epoch_is_that_of_the_reference_code(stored, x64):
    rate, momentum, decay, density = stored.arrays["lr_momentum_weightdecay_density"].tolist()
    sgd = {"learning_rate": rate, "momentum": momentum, "weight_decay": decay}
    config = SaliencyConfig(**sgd, redraw="once", batch_norm="eval")
    steps = _programs(plain, config, None)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), stored.tree("param"))
    optimizer = masked(optimizer_of(config), stored.tree(f"mask__{density}"))
    state = TrainState({"params": params}, optimizer.init(params))
    labels = stored.rows("random_label"), stored.rows("y_retain")
    for side, y, size, step in zip(("forget", "retain"), labels, (7, 9), steps, strict=True):
        x = stored.rows(f"x_{side}").astype(jnp.float64)
        order = np.arange(3 * size).reshape(3, size)
        xs = {"indices": order % len(x), "mask": order < len(x), "step": np.arange(3)}
        consts = {"inputs": x, "labels": y, "key": KEY, "forgotten": jnp.zeros(4, bool)}
        state, _ = run_epoch(step, consts, state, xs)
    for name, expected in stored.tree("after").items():
        np.testing.assert_allclose(state.variables["params"][name], expected, atol=1e-6)


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.37, 0.5, 1.0])
@pytest.mark.parametrize("spread", [1, 1000])
def test_a_mask_takes_the_largest_entries_of_all_leaves_and_their_exact_number(share, spread):
    """Also where many are equal: of integers below ``spread`` one in as many is."""
    rng = np.random.default_rng(0)
    tree = {n: rng.integers(0, spread, shape) for n, shape in (("a", (20, 5)), ("b", (37,)))}
    mask = largest_entries(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree), share)
    flat, taken = (np.concatenate([t[n].ravel() for n in "ab"]) for t in (tree, mask))
    assert taken.sum() == int(share * 137)
    assert taken.all() or flat[taken].min() >= flat[~taken].max()


def test_a_share_of_less_than_one_weight_is_refused():
    with pytest.raises(ValueError, match=r"share = 0.1 of 9 weights .* wanted at least 1/9"):
        largest_entries({"a": jnp.ones(9)}, 0.1)


def test_what_is_masked_does_not_move_by_a_bit_under_momentum_and_decay(problem):
    after = run(problem, weight_decay=0.1, momentum=0.9)
    mask = saliency_mask(problem, SHORT.forget_batch_size, SHORT.share)
    assert after.info["mask_shares"] == shares(mask)
    before, now = problem.variables["params"], after.variables["params"]
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.asarray(a != b), before, now))
    free = [np.asarray(leaf) for leaf in jax.tree.leaves(mask)]
    moved, free = (np.concatenate([leaf.ravel() for leaf in leaves]) for leaves in (moved, free))
    np.testing.assert_array_equal(moved, free)
    assert free.sum() == int(0.3 * free.size)


def test_with_a_full_mask_it_is_random_labels(problem):
    after = run(problem, share=1.0)
    settings = dataclasses.asdict(SHORT)
    del settings["share"]
    plain = random_labels(KEY, problem, RandomLabelsConfig(**settings))
    # The multiplication by ones may make a fused sum round elsewhere.
    for a, b in zip(*map(jax.tree.leaves, (after.variables, plain.variables)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert set(after.info.pop("mask_shares").values()) == {1.0}
    for a, b in zip(after.info.pop("epochs"), plain.info.pop("epochs"), strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    assert after.info == plain.info


def test_without_a_retain_pass_retain_data_are_never_read(problem):
    after = run(dataclasses.replace(problem, retain=None), retain_pass=False)
    assert_same(after.variables, run(problem, retain_pass=False).variables)
    assert after.info["retain_passes"] == 0


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_shares_that_make_no_sense_are_refused(share):
    with pytest.raises(ValueError, match=r"share = .*: wanted a share in \(0, 1\]"):
        SaliencyConfig(share=share)


def test_labels_that_do_not_exist_are_refused():
    config = SaliencyConfig()
    object.__setattr__(config, "labels", "other")  # type checks would refuse it first
    with pytest.raises(ValueError, match=r"labels = 'other': write one of \('allowed', 'all'\)"):
        config.__post_init__()
