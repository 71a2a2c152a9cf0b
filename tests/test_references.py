"""The original, the head edit and retraining: what they return to the bit, and what they refuse."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn.activations import features
from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers
from jaxunlearn.layers import leaves_by_path
from jaxunlearn.methods import (
    METHODS,
    HeadEditConfig,
    RetrainConfig,
    UnlearningProblem,
    head_edit,
    identity,
    retrain,
)
from jaxunlearn.methods.base import Recipe
from jaxunlearn.models import MLP
from jaxunlearn.training import fit

K, D = 4, 6
KEY = jax.random.key(0)
RECIPE = Recipe(lambda steps: optax.sgd(0.1, momentum=0.9), epochs=3, batch_size=7)


class Net(nn.Module):
    """A norm layer below the second of two layers."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5, name="first")(x))
        return nn.Dense(K, name="head")(nn.relu(x))


def problem_of(model, classes=(1,)):
    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.normal(size=(24, D)), jnp.float32), np.arange(24) % K
    gone = np.isin(labels, classes)
    forget, retain = (Batches(x[rows], labels[rows], 4) for rows in (gone, ~gone))
    init = jax.jit(lambda key: model.init(key, x))
    return UnlearningProblem(
        model.apply, init(KEY), forget, retain, K, classes, init_fn=init, recipe=RECIPE
    )


@pytest.fixture(scope="module")
def problem():
    return problem_of(Net())


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def moved(before, after):
    before, after = leaves_by_path(before), leaves_by_path(after)
    return {name for name in before if (before[name] != after[name]).any()}


def test_the_identity_returns_the_original_itself(problem):
    unlearned = identity(KEY, problem)
    assert unlearned.variables is problem.variables
    assert unlearned.info == {"steps": 0, "forget_passes": 0, "retain_passes": 0}


# --- head edit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [(1,), (0, 3)])
def test_the_head_edit_silences_classes_and_moves_no_feature(classes):
    problem = problem_of(MLP(features=(5,), num_classes=K), classes)
    after = head_edit(KEY, problem).variables
    assert moved(problem.variables, after) == {"params/head/bias"}
    x = problem.retain.inputs
    specs = describe_layers(problem.apply_fn, problem.variables, x)
    z = features(problem.apply_fn, specs)
    np.testing.assert_array_equal(z(after, x), z(problem.variables, x))
    old, new = (problem.apply_fn(v, x) for v in (problem.variables, after))
    kept = np.setdiff1d(np.arange(K), classes)
    np.testing.assert_array_equal(new[:, kept], old[:, kept])
    assert not np.isin(new.argmax(1), classes).any()


def test_the_bias_of_silenced_classes_is_a_setting(problem):
    after = head_edit(KEY, problem, HeadEditConfig(value=-5.0)).variables
    assert after["params"]["head"]["bias"][1] == -5
    for value in (0.0, float("nan"), -float("inf")):
        with pytest.raises(ValueError, match="wanted a finite number below 0"):
            HeadEditConfig(value=value)


class Late(nn.Module):
    """Logits that no bias of a dense layer sets."""

    bias: bool
    width: int = K

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width, use_bias=self.bias, name="last")(x)[:, :K]


@pytest.mark.parametrize("model", [Late(bias=False), Late(bias=True, width=K + 1)])
def test_a_head_without_a_bias_of_its_own_is_refused_before_training(model):
    problem = problem_of(model)
    check = METHODS["head_edit"].check
    template = dataclasses.replace(problem, variables=jax.eval_shape(problem.init_fn, KEY))
    message = rf"bias \[{K}\] of the last dense layer; 'last' .* has none.* lower the logits"
    for refuse in (head_edit, lambda key, problem: check(template, HeadEditConfig())):
        with pytest.raises(ValueError, match=message):
            refuse(KEY, problem)


# --- retraining -----------------------------------------------------------------------------------


def test_retraining_is_training_on_the_retain_data_to_the_bit(problem):
    init_key, fit_key = jax.random.split(jax.random.key(3))
    data = problem.retain.with_batch_size(RECIPE.batch_size)
    fitted = fit(
        fit_key,
        problem.apply_fn,
        problem.init_fn(init_key),
        data,
        optimizer=RECIPE.optimizer(len(data)),
        epochs=RECIPE.epochs,
    )
    unlearned = retrain(jax.random.key(3), problem)
    assert_same(unlearned.variables, fitted.variables)
    info = unlearned.info
    losses = [row["loss_retain"] for row in info["epochs"]]
    assert losses == pytest.approx([row["loss"] for row in fitted.history])
    assert (info["steps"], info["forget_passes"], info["retain_passes"]) == (3 * 3, 0, 3)


def test_retrained_last_layers_start_anew_and_the_others_stay(problem):
    """Norm layers below the head too."""
    after = retrain(KEY, problem, RetrainConfig(last_k=1)).variables
    assert moved(problem.variables, after) == {"params/head/kernel", "params/head/bias"}
    still = Recipe(lambda steps: optax.sgd(0.0), epochs=1, batch_size=7)
    init_key = jax.random.split(KEY)[0]
    fresh = problem.init_fn(init_key)["params"]["head"]
    after = retrain(KEY, dataclasses.replace(problem, recipe=still), RetrainConfig(last_k=1))
    assert_same(after.variables["params"]["head"], fresh)


def test_retraining_all_layers_is_retraining(problem):
    runs = (retrain(KEY, problem, RetrainConfig(last_k=k)) for k in (2, None))
    assert_same(*(run.variables for run in runs))


def test_retraining_augments_as_training_did_unless_told_not_to(problem):
    bright = dataclasses.replace(problem, augment=lambda key, x: 2 * x)
    twice = Batches(2 * problem.retain.inputs, problem.retain.labels, 4)
    shown = retrain(KEY, bright)
    hidden = retrain(KEY, bright, RetrainConfig(augment=False))
    assert_same(shown.variables, retrain(KEY, dataclasses.replace(problem, retain=twice)).variables)
    assert_same(hidden.variables, retrain(KEY, problem).variables)


def test_an_initialisation_of_another_model_is_refused(problem):
    other = dataclasses.replace(problem, init_fn=problem_of(MLP((5,), K)).init_fn)
    with pytest.raises(ValueError, match=r"leaves \['batch_stats/.* of the model that was trained"):
        retrain(KEY, other)


@pytest.mark.parametrize("last_k", [0, 3])
def test_a_number_of_layers_that_the_model_does_not_have_is_refused(problem, last_k):
    with pytest.raises(ValueError, match=rf"last_k = {last_k}: wanted 1 to 2"):
        retrain(KEY, problem, RetrainConfig(last_k=last_k))
