"""Forget vectors against stored losses, gradients and steps of the reference code.

The network is the stored one, written out here: inputs normalised inside, a convolution, tanh, and
a dense layer on (channel, row, column). Images and vectors have their channels last.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.methods.forget_vectors_config import ForgetVectorsConfig
from jaxunlearn.methods.forget_vectors_losses import Parts, code_objective, data_sums
from jaxunlearn.methods.forget_vectors_run import programs_of
from jaxunlearn.models import read_arrays
from jaxunlearn.steps import TrainState

TOLERANCE = {"float32": 1e-5, "float64": 1e-6}
PER_EPOCH = 3  # batches: 12, 12 and 7 images


def apply_fn(variables, x):
    x = (x - variables["mean"][None, None, None]) / variables["std"][None, None, None]
    maps = jax.lax.conv_general_dilated(
        x,
        variables["conv.weight"].transpose(2, 3, 1, 0),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    z = jnp.tanh(maps + variables["conv.bias"][None, None, None]).transpose(0, 3, 1, 2)
    return z.reshape(len(z), -1) @ variables["fc.weight"].T + variables["fc.bias"][None]


def channels_last(x):
    return np.moveaxis(x, -3, -1)


@pytest.fixture(params=["float32", "float64"])
def stored(request, golden):
    """Stored arrays, those that enter the computation in the test's precision, and a tolerance."""
    if request.param == "float64":
        request.getfixturevalue("x64")
    arrays = read_arrays(golden / "forget_vector.npz")
    arrays = {
        name: jnp.asarray(x, request.param) if x.dtype == np.float32 else x
        for name, x in arrays.items()
    }
    return arrays, TOLERANCE[request.param]


def settings(stored):
    tau, alpha, beta, norm = stored["tau_alpha_beta_lambda"].tolist()
    rate, momentum, decay, gamma = stored["lr_momentum_weightdecay_gamma"].tolist()
    return ForgetVectorsConfig(
        beta=beta,
        retain_weight=alpha,
        norm_weight=norm,
        margin=tau,
        learning_rate=rate,
        momentum=momentum,
        weight_decay=decay,
        learning_rate_decay=gamma,
    )


def inputs_of(stored, dtype, bank):
    """What the steps read, of one forget set, and the steps of an epoch: the last one is padded."""
    batches = [{k: stored[f"{k}__b{i}"] for k in ("x", "y", "source")} for i in range(PER_EPOCH)]
    sizes = [len(b["y"]) for b in batches]
    first = np.cumsum([0, *sizes])
    weights = {k.removeprefix("param__"): v for k, v in stored.items() if k.startswith("param__")}
    source = np.concatenate([b["source"] for b in batches])
    consts = {
        "inputs": jnp.concatenate([channels_last(b["x"]) for b in batches]),
        "labels": jnp.concatenate([b["y"] for b in batches]),
        "key": jax.random.key(0),
        "variables": weights | {"mean": stored["mean"], "std": stored["std"]},
        "flags": jnp.asarray(source == 0)[None],
        "betas": jnp.array([settings(stored).beta], dtype),
        "shares": jnp.array([np.mean(source == 0)], dtype),
        "bank": bank,
    }
    rows = np.arange(sizes[0])
    steps = [
        {"indices": first[i] + rows % size, "mask": rows < size} for i, size in enumerate(sizes)
    ]
    return consts, steps


def check_run(stored, atol, start, names, bank=None):
    """Losses, gradient and vector of each stored step, from the vector before it."""
    config, dtype = settings(stored), start.dtype
    programs = programs_of(apply_fn, config, None, 1.0)
    gradient, step = jax.jit(programs.gradient), jax.jit(programs.step)
    consts, steps = inputs_of(stored, dtype, bank)
    turn = (lambda x: x) if bank is not None else channels_last
    zero = jnp.zeros(1, dtype)
    state = TrainState({"vectors": start[None]}, (jnp.zeros_like(start)[None], Parts(*4 * [zero])))
    number = 0
    while f"{names[1]}__s{number}" in stored:
        epoch, index = divmod(number, PER_EPOCH)
        rate = config.learning_rate * config.learning_rate_decay**epoch
        x = steps[index] | {"step": number, "rate": jnp.asarray(rate, dtype)}
        slope, parts = gradient(consts, state.variables["vectors"], x)
        state, _ = step(consts, state, x)
        wanted = [stored[f"{name}__s{number}"] for name in names]
        # In the order of the stored losses: whole, forget, retain, norm.
        np.testing.assert_allclose(np.concatenate(parts), wanted[0], rtol=atol, atol=atol)
        np.testing.assert_allclose(slope[0], turn(wanted[1]), atol=atol)
        np.testing.assert_allclose(state.variables["vectors"][0], turn(wanted[2]), atol=atol)
        number += 1
    return number


@pytest.mark.parametrize("start", ["zero", "random"])
def test_losses_gradients_and_steps_are_those_of_the_reference_code(stored, start):
    stored, atol = stored
    names = [f"{name}__{start}" for name in ("losses", "grad", "delta")]
    delta = jnp.asarray(channels_last(stored[f"delta0__{start}"]))
    assert check_run(stored, atol, delta, names) == 2 * PER_EPOCH


@pytest.mark.parametrize("start", ["zero", "one"])
def test_weights_of_given_vectors_are_those_of_the_reference_code(stored, start):
    stored, atol = stored
    bank = jnp.asarray(channels_last(stored["vectors"]))
    weights = jnp.full(len(bank), {"zero": 0.0, "one": 1.0}[start], bank.dtype)
    names = [f"{name}__{start}" for name in ("w_losses", "w_grad", "w")]
    assert check_run(stored, atol, weights, names, bank) == PER_EPOCH


def test_the_loss_of_given_logits_is_that_of_the_reference_code(stored):
    stored, atol = stored
    config, labels = settings(stored), jnp.asarray(stored["logits_y"])
    forget = jnp.asarray(stored["logits_source"] == 0)
    mask = jnp.ones(len(labels), bool)

    @jax.jit
    def loss(logits):
        sums = data_sums(logits, labels, forget, mask, config.margin)
        n = jnp.asarray(len(labels), logits.dtype)
        parts = code_objective(sums, n, stored["delta0__random"], config.beta, config)
        return parts.loss, parts

    slope, parts = jax.grad(loss, has_aux=True)(stored["logits"])
    np.testing.assert_allclose(np.stack(parts), stored["logits_losses"], rtol=atol, atol=atol)
    np.testing.assert_allclose(slope, stored["logits_grad"], atol=atol)
    still = np.asarray(forget) & (np.abs(slope) == 0).all(axis=1)
    assert still.sum() == stored["logits_saturated"] > 0
