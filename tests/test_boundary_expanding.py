"""Boundary expanding: the row that is added, what is trained on it, and that it is gone after."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers
from jaxunlearn.methods import BoundaryExpandingConfig, UnlearningProblem, boundary_expanding
from jaxunlearn.methods.boundary_expanding import check_boundary_expanding, with_row
from jaxunlearn.models import MLP

N, K, D = 16, 4, 6
KEY = jax.random.key(0)
SHORT = BoundaryExpandingConfig(epochs=1, learning_rate=0.1, forget_batch_size=4)


class Net(nn.Module):
    """A head with or without a bias; what comes after it is ``last``."""

    bias: bool = True
    width: int = K
    last: str = "head"

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dense(self.width, use_bias=self.bias, name="head")(x)
        if self.last == "capped":
            x = jnp.tanh(x)
        return x if self.last != "conv" else nn.Conv(K, (1,), name="last")(x)


def problem_of(model):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), jnp.float32)
    labels = np.arange(N) % K
    forget, retain = (Batches(x[part], labels[part], 4) for part in (labels == 1, labels != 1))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    return UnlearningProblem(model.apply, variables, forget, retain, K, (1,))


def expanded(problem, **settings):
    return boundary_expanding(KEY, problem, dataclasses.replace(SHORT, **settings))


def test_the_expanded_model_has_one_more_class_that_reads_the_features():
    problem = problem_of(MLP(features=(5,), num_classes=K))
    params, x = problem.variables["params"], problem.retain.inputs
    specs = describe_layers(problem.apply_fn, problem.variables, x)
    row = {"kernel": jnp.arange(5.0), "bias": jnp.float32(2.0)}
    logits = with_row(problem.apply_fn, specs)({"params": {"model": params, "row": row}}, x)
    assert logits.shape == (len(x), K + 1)
    np.testing.assert_allclose(logits[:, :K], problem.apply_fn(problem.variables, x), rtol=1e-5)
    first = params[next(iter(specs))]
    z = np.maximum(np.asarray(x) @ np.asarray(first["kernel"]) + np.asarray(first["bias"]), 0)
    np.testing.assert_allclose(logits[:, K], z @ np.arange(5.0) + 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_step_lowers_all_old_logits_by_their_share_of_probability(bias):
    """In NumPy, of the head alone; what the row got is dropped, and the others stay in place."""
    problem = problem_of(Net(bias=bias))
    still = {"batch_norm": "eval", "momentum": 0.0}
    after = expanded(problem, **still)
    before, now = (v["params"]["head"] for v in (problem.variables, after.variables))
    assert before.keys() == now.keys() == ({"kernel", "bias"} if bias else {"kernel"})
    x = np.float64(problem.forget.inputs) / np.sqrt(1 + 1e-5)  # batch norm as it starts
    row_key, _ = jax.random.split(KEY)
    row = jax.nn.initializers.lecun_normal()(row_key, (D, 1), jnp.float32)
    K0 = np.concatenate([before["kernel"], row], axis=1)
    residual = softmax(x @ K0, axis=1)  # biases start at 0
    residual[:, K] -= 1
    expected = K0 - 0.1 * x.T @ residual / len(x)
    np.testing.assert_allclose(now["kernel"], expected[:, :K], atol=1e-6)
    if bias:
        np.testing.assert_allclose(now["bias"], -0.1 * residual[:, :K].mean(0), atol=1e-6)


def test_the_forget_data_leave_their_class_and_the_result_is_the_same_model():
    problem = problem_of(MLP(features=(5,), num_classes=K))
    after = expanded(problem, epochs=20)
    rows = [row["loss_forget"] for row in after.info["epochs"]]
    assert rows[-1] < 0.5 * rows[0]
    assert jax.tree.structure(after.variables) == jax.tree.structure(problem.variables)
    assert problem.apply_fn(after.variables, problem.retain.inputs).shape == (12, K)
    assert (after.info["forget_passes"], after.info["retain_passes"]) == (20, 0)


def test_batch_statistics_move_in_train_mode_alone():
    problem = problem_of(Net())
    for mode, frozen in (("train", False), ("eval", True)):
        after = expanded(problem, batch_norm=mode).variables["batch_stats"]
        before = problem.variables["batch_stats"]
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), after, before)
        assert any(jax.tree.leaves(moved)) != frozen


def test_the_new_row_is_that_of_the_key():
    problem = problem_of(Net())
    a, b = (
        boundary_expanding(key, problem, SHORT).variables["params"]["head"]["kernel"]
        for key in (KEY, jax.random.key(1))
    )
    assert (a != b).any()


@pytest.mark.parametrize(
    ("model", "found"),
    [(Net(width=5, last="conv"), r"'head' with \(6, 5\)"), (nn.Conv(K, (1,)), "none")],
)
def test_a_model_whose_last_dense_layer_has_no_row_for_each_class_is_refused(model, found):
    problem = problem_of(model)
    config = dataclasses.replace(SHORT, batch_norm="eval")
    with pytest.raises(ValueError, match=rf"with 4 outputs; it is {found}.* use boundary_shrink"):
        check_boundary_expanding(problem, config)


def test_a_model_that_changes_what_its_head_returns_is_refused():
    with pytest.raises(ValueError, match="logits are not what the last dense layer 'head' returns"):
        expanded(problem_of(Net(last="capped")))


def test_the_scope_of_samples_is_refused():
    problem = dataclasses.replace(problem_of(Net()), forget_classes=())
    with pytest.raises(ValueError, match="boundary_expanding does not support scope 'samples'"):
        expanded(problem)
