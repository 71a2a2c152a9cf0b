"""Rates by epoch: their curves, and one program for runs of every length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.methods.rates import cosine_by_epoch, sgd_by_epoch, up_and_down


def optimizer(curve=cosine_by_epoch, *, steps=2, epochs=3, momentum=0.5, weight_decay=0.1):
    return sgd_by_epoch(
        curve,
        learning_rate=2.0,
        momentum=momentum,
        weight_decay=weight_decay,
        steps_per_epoch=steps,
        epochs=epochs,
    )


@pytest.mark.parametrize(
    ("curve", "factors"),
    [(cosine_by_epoch, [1, 0.75, 0.25]), (up_and_down, [0.5, 1, 0.5])],
)
def test_steps_are_those_of_sgd_with_the_rate_of_their_epoch(curve, factors):
    tx, w, buffer, gradient = optimizer(curve), 3.0, 0.0, 0.7
    params = jnp.array(w)
    state = tx.init(params)
    for factor in np.repeat(factors, 2):
        updates, state = tx.update(jnp.array(gradient), state, params)
        params = params + updates
        buffer = 0.5 * buffer + gradient + 0.1 * w  # as torch: the rate comes after the momentum
        w -= 2.0 * factor * buffer
        np.testing.assert_allclose(params, w, rtol=1e-5)


@pytest.mark.parametrize("epochs", [1, 2, 4, 5])
def test_rates_rise_to_the_highest_and_fall_and_never_vanish(epochs):
    rates = [up_and_down(jnp.float32(e), jnp.float32(epochs)).item() for e in range(epochs)]
    top = (epochs + 1) // 2 - 1
    assert rates[top] == max(rates) == 1
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


def test_one_program_serves_all_numbers_of_steps_and_epochs():
    traces = []

    @jax.jit
    def update(state, params):
        traces.append(1)
        return optimizer().update(params, state, params)

    params, firsts = jnp.ones(2), []
    for steps, epochs in ((2, 3), (5, 7)):
        state = optimizer(steps=steps, epochs=epochs).init(params)
        for _ in range(4):
            updates, state = update(state, params)
        firsts.append(updates[0].item())
    assert len(traces) == 1
    assert (
        firsts[0] != firsts[1]
    )  # the fourth step is in the second epoch of one, the first of the other
