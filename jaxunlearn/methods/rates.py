"""Learning rates as state of an optax link, also such that change from epoch to epoch.

A rate or a schedule is usually compiled in, so that another one, or other data
sizes, compile a program anew. Here numbers are state: one program serves all of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Curve = Callable[[Float[Array, ""], Float[Array, ""]], Float[Array, ""]]  # epoch, epochs -> factor


class EpochRateState(NamedTuple):
    """Steps taken, steps per epoch, and epochs."""

    step: Array
    per_epoch: Array
    epochs: Array


def cosine_by_epoch(epoch: Float[Array, ""], epochs: Float[Array, ""]) -> Float[Array, ""]:
    """``(1 + cos(π e / E)) / 2``: from 1, and just above 0 in the last epoch.

    Examples:
      >>> [round(cosine_by_epoch(jnp.array(e), jnp.array(3.0)).item(), 2) for e in (0.0, 1.0, 2.0)]
      [1.0, 0.75, 0.25]
    """
    return (1 + jnp.cos(jnp.pi * epoch / epochs)) / 2


def up_and_down(epoch: Float[Array, ""], epochs: Float[Array, ""]) -> Float[Array, ""]:
    """Linear up to 1 in epoch ``A = floor((E + 1) / 2)``, counted from 1, then linear down.

    Examples:
      >>> [round(up_and_down(jnp.array(e), jnp.array(4.0)).item(), 2) for e in (0.0, 1.0, 2.0, 3.0)]
      [0.5, 1.0, 0.67, 0.33]
    """
    top, now = jnp.floor((epochs + 1) / 2), epoch + 1
    return jnp.where(now <= top, now / top, (epochs + 1 - now) / (epochs + 1 - top))


def sgd_by_epoch(
    curve: Curve,
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    steps_per_epoch: int,
    epochs: int,
) -> optax.GradientTransformation:
    """SGD whose rate is a factor of each epoch; decay is added to the gradient before momentum.

    The optimisers of all steps and epochs have one form of state and one ``update``, so that a step
    that is compiled for one serves the others.

    Args:
      curve: ``(epoch from 0, epochs) -> factor of the rate``.
      learning_rate: of factor 1.
      momentum: of raw gradients; the rate is applied afterwards, as in ``torch.optim.SGD``.
      weight_decay: of all leaves.
      steps_per_epoch: of the data.
      epochs: of the run.

    Examples:
      >>> optimizer = sgd_by_epoch(cosine_by_epoch, learning_rate=1.0, momentum=0.0,
      ...                          weight_decay=0.0, steps_per_epoch=1, epochs=3)
      >>> state, ones = optimizer.init(jnp.ones(1)), jnp.ones(1)
      >>> for _ in range(3):
      ...     updates, state = optimizer.update(ones, state, ones)
      ...     print(updates.round(2).tolist())
      [-1.0]
      [-0.75]
      [-0.25]
    """

    def init(params: optax.Params) -> EpochRateState:
        del params
        return EpochRateState(jnp.int32(0), jnp.int32(steps_per_epoch), jnp.int32(epochs))

    def update(
        updates: optax.Updates, state: EpochRateState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, EpochRateState]:
        del params
        epoch = (state.step // state.per_epoch).astype(jnp.float32)
        rate = learning_rate * curve(epoch, state.epochs.astype(jnp.float32))
        scaled = jax.tree.map(lambda u: (-rate * u).astype(u.dtype), updates)
        return scaled, state._replace(step=state.step + 1)

    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(decay=momentum),
        optax.GradientTransformation(init, update),
    )


class RateState(NamedTuple):
    """A learning rate."""

    rate: Array


def scale_by_rate(rate: float) -> optax.GradientTransformation:
    """``u <- -rate u``, with the rate in the state: one program serves all rates.

    Args:
      rate: the learning rate.

    Examples:
      >>> link = scale_by_rate(0.5)
      >>> link.update(jnp.ones(1), link.init(jnp.ones(1)))[0].tolist()
      [-0.5]
    """

    def init(params: optax.Params) -> RateState:
        del params
        return RateState(jnp.float32(rate))

    def update(
        updates: optax.Updates, state: RateState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RateState]:
        del params
        return jax.tree.map(lambda u: (-state.rate * u).astype(u.dtype), updates), state

    return optax.GradientTransformation(init, update)
