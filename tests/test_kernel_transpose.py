"""Kernel transposition: what is swapped, what the repair sees, and where it is refused."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.methods import (
    FinetuneConfig,
    KernelTransposeConfig,
    UnlearningProblem,
    finetune,
    kernel_transpose,
)
from jaxunlearn.methods.kernel_transpose import check_kernels, transpose_kernels

KEY = jax.random.key(0)
N, K = 12, 3
CONFIG = KernelTransposeConfig(epochs=1, learning_rate=0.05, batch_size=8)


class Network(nn.Module):
    """Convolutions of one place, of unlike sides, and square ones, one of them by groups."""

    sizes: tuple = ((1, 1), (1, 3), (3, 3), (2, 2))

    @nn.compact
    def __call__(self, x, *, train=False):
        for i, size in enumerate(self.sizes):
            x = nn.relu(nn.Conv(4, size, feature_group_count=1 + (i == 3), name=f"conv{i}")(x))
        return nn.Dense(K, name="head")(x.mean((1, 2)))


def problem_of(model):
    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.normal(size=(N, 5, 5, 2)), jnp.float32), np.arange(N) % K
    forget, retain = (Batches(x[rows], labels[rows], 8) for rows in (labels == 1, labels != 1))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    return UnlearningProblem(model.apply, variables, forget, retain, K, (1,))


@pytest.fixture(scope="module")
def problem():
    return problem_of(Network())


@pytest.fixture(scope="module")
def swapped(problem):
    specs = check_kernels(problem, CONFIG)
    return specs, transpose_kernels(problem.variables["params"], specs)


def test_square_kernels_are_swapped_and_all_else_stays(problem, swapped):
    specs, params = swapped
    assert list(specs) == ["conv2", "conv3"]
    for layer, leaves in problem.variables["params"].items():
        kernel = np.asarray(leaves["kernel"])
        expected = kernel.transpose(1, 0, 2, 3) if layer in specs else kernel
        np.testing.assert_array_equal(params[layer]["kernel"], expected)
        np.testing.assert_array_equal(params[layer]["bias"], leaves["bias"])
    assert (params["conv2"]["kernel"] != problem.variables["params"]["conv2"]["kernel"]).any()


def test_twice_is_what_there_was(problem, swapped):
    specs, params = swapped
    back = transpose_kernels(params, specs)
    jax.tree.map(np.testing.assert_array_equal, back, problem.variables["params"])


def test_the_repair_is_fine_tuning_of_the_swapped_model(problem, swapped):
    """One batch of all retain data, so that the order is none, at the whole rate."""
    start = dataclasses.replace(problem, variables={"params": swapped[1]})
    tuned = finetune(KEY, start, FinetuneConfig(epochs=1, learning_rate=0.05, batch_size=8))
    found = kernel_transpose(KEY, problem, CONFIG)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found.variables, tuned.variables
    )
    assert found.info["transposed"] == ["conv2", "conv3"]
    assert (found.info["steps"], found.info["forget_passes"], found.info["retain_passes"]) == (
        1,
        0,
        1,
    )


@pytest.mark.parametrize("sizes", [((1, 1), (1, 3)), ()])
def test_a_model_whose_kernels_would_not_change_is_refused(sizes):
    model = Network(sizes)
    with pytest.raises(ValueError, match=r"would change nothing: it swaps .* use another method"):
        kernel_transpose(KEY, problem_of(model), CONFIG)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="epochs = 0: wanted at least 1"):
        KernelTransposeConfig(epochs=0)
