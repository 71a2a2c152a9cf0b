"""Training of the last layers: what is frozen, to the bit, and what acts as in inference."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxunlearn.batches import Batches
from jaxunlearn.layers import leaves_by_path
from jaxunlearn.methods import FinetuneConfig, UnlearningProblem, finetune
from jaxunlearn.methods.last_layers import cut_of, first_uses, hold_below, train_above
from jaxunlearn.nnx_models import nnx_model

K, D = 4, 6
KEY = jax.random.key(0)
TUNE = FinetuneConfig(epochs=2, learning_rate=0.1, weight_decay=0.01, batch_size=8)


class Net(nn.Module):
    """Three linear layers, against the order of the alphabet, with norms and dropout between.

    Modules are told their mode in both ways that flax has.
    """

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(5, name="z")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm_z")(x)
        x = nn.Dropout(0.5)(nn.relu(x), deterministic=not train)
        x = nn.Dense(5, name="y")(x)
        x = nn.BatchNorm(momentum=0.5, name="norm_y")(x, not train)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(K, name="a")(x)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(24, D)), jnp.float32)
    labels = np.arange(24) % K
    forget, retain = (Batches(x[rows], labels[rows], 8) for rows in (labels == 1, labels != 1))
    variables = jax.jit(Net().init)(jax.random.key(1), x)
    return UnlearningProblem(Net().apply, variables, forget, retain, K, (1,))


def modules(names):
    return {name.split("/")[1] for name in names}


def test_a_cut_lies_below_the_layers_that_are_called_last(problem):
    first, second = (cut_of(problem, k) for k in (1, 2))
    assert (first.layer, second.layer) == ("a", "y")
    assert modules(second.frozen) == {"z", "norm_z"}
    assert modules(first.frozen) == {"z", "norm_z", "y", "norm_y"}
    assert {"batch_stats/norm_y/mean", "params/norm_y/scale", "params/y/bias"} < first.frozen
    assert cut_of(problem, 3) is None
    assert cut_of(problem, None) is None


@pytest.mark.parametrize("last_k", [0, 4])
def test_a_model_must_have_the_layers(problem, last_k):
    with pytest.raises(ValueError, match=rf"last_k = {last_k}: wanted 1 to 3, .*'z', 'y', 'a'"):
        finetune(KEY, problem, dataclasses.replace(TUNE, last_k=last_k))


def test_the_order_of_uses_is_that_of_the_calls_however_they_are_wrapped(problem):
    variables, x = problem.variables, problem.forget.inputs

    def half(variables, x):
        return Net().apply(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables), x)

    again = nn.remat(Net)().apply
    expected = ["z", "norm_z", "y", "norm_y", "a"]
    for apply_fn in (Net().apply, half, again, jax.jit(Net().apply)):
        place = first_uses(apply_fn, variables, x)
        assert place.keys() == leaves_by_path(variables).keys()
        kernels = sorted(place, key=place.get)
        assert list(dict.fromkeys(name.split("/")[1] for name in kernels)) == expected


def test_parameters_that_are_never_used_are_frozen(problem):
    variables = {**problem.variables, "params": {**problem.variables["params"], "no": jnp.ones(2)}}
    assert "params/no" in cut_of(dataclasses.replace(problem, variables=variables), 1).frozen


def test_below_the_cut_a_model_that_trains_acts_as_in_inference(problem):
    """Above the head there is nothing that has a mode; above the second layer there is."""
    variables, x = problem.variables, problem.forget.inputs
    mode = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": KEY}}
    inference = problem.apply_fn(variables, x)
    for last_k, same in ((1, True), (2, False)):
        above = train_above(problem.apply_fn, cut_of(problem, last_k))
        logits, updated = above(variables, x, **mode)
        assert (np.asarray(logits) == inference).all() == same
        before, after = (leaves_by_path(v["batch_stats"]) for v in (variables, updated))
        moved = {name.split("/")[0] for name in before if (before[name] != after[name]).any()}
        assert moved == (set() if same else {"norm_y"})
        np.testing.assert_array_equal(above(variables, x), inference)


def test_gradients_stop_at_the_cut(problem):
    above = train_above(problem.apply_fn, cut_of(problem, 2))
    others = {"batch_stats": problem.variables["batch_stats"]}

    def loss(params):
        return jnp.sum(above({"params": params, **others}, problem.forget.inputs) ** 2)

    slopes = jax.grad(loss)(problem.variables["params"])
    reached = {name.split("/")[0] for name, g in leaves_by_path(slopes).items() if g.any()}
    assert reached == {"y", "norm_y", "a"}


@pytest.mark.parametrize("settings", [{}, {"l1": 0.1}, {"batch_norm": "eval"}])
def test_tuning_the_last_layers_leaves_all_others_as_they_are_to_the_bit(problem, settings):
    config = dataclasses.replace(TUNE, last_k=2, **settings)
    before = leaves_by_path(problem.variables)
    after = leaves_by_path(finetune(KEY, problem, config).variables)
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert modules(moved) == {"y", "norm_y", "a"}
    statistics = any(name.startswith("batch_stats") for name in moved)
    assert statistics == (config.batch_norm == "train")


def test_tuning_all_layers_is_tuning(problem):
    runs = (finetune(KEY, problem, dataclasses.replace(TUNE, last_k=k)) for k in (None, 3))
    jax.tree.map(np.testing.assert_array_equal, *(run.variables for run in runs))


def test_without_a_cut_nothing_is_wrapped(problem):
    optimizer = optax.sgd(0.1)
    assert train_above(problem.apply_fn, None) is problem.apply_fn
    assert hold_below(optimizer, None) is optimizer


class Other(nnx.Module):
    def __init__(self, rngs):
        self.first, self.head = nnx.Linear(D, 5, rngs=rngs), nnx.Linear(5, K, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.first(x)))


def test_norm_layers_below_that_cannot_be_reached_are_refused_unless_all_are_frozen(problem):
    """In models that are no linen modules."""
    apply_fn, variables = nnx_model(Other(nnx.Rngs(0)))
    other = dataclasses.replace(problem, apply_fn=apply_fn, variables=variables)
    config = dataclasses.replace(TUNE, last_k=1)
    with pytest.raises(
        ValueError, match=r"\['state'\] below layer 'head' .* batch_norm = \"eval\""
    ):
        finetune(KEY, other, config)
    after = finetune(KEY, other, dataclasses.replace(config, batch_norm="eval")).variables
    before, after = map(leaves_by_path, (variables, after))
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert moved == {"params/head/kernel", "params/head/bias"}
