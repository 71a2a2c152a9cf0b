"""Linear probe: what a fresh linear classifier still reads from frozen features.

Multinomial logistic regression on features z ``[n, d]`` divided by one number, their mean absolute
value s, with weights W ``[d, k]`` and an unpenalised bias b ``[k]``:

  ½‖W‖² + C Σ_i CE_i,    CE_i = softplus(LSE_{c≠y} l_c − l_y),    l = Wᵀ z_i/s + b

scikit-learn's ``LogisticRegression``. Three rearrangements let L-BFGS reach the optimum in float32,
none of which moves it. The objective is divided by C n. Features are centred, as a shift of z is a
shift of b. And the cross-entropy is the softplus above and not LSE(l) − l_y, which has no digits
left for an example that is classified well: the line search would stall.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxunlearn.linalg import HIGHEST

_TOLERANCE = 1e-7  # of the gradient of the objective over C n; float32 reaches it
_NEVER = -1e9  # logit of a class without examples while fitting: finite, so gradients are zero


class Probe(NamedTuple):
    """A linear classifier of features; ``probe_logits`` applies it."""

    weights: Float[Array, "d k"]  # on features divided by ``scale``
    bias: Float[Array, " k"]  # −inf for a class without training examples
    scale: Float[Array, ""]  # mean absolute training feature
    gradient: Float[Array, ""]  # largest entry where the fit ended; above 1e-7: out of iterations


def linear_probe(
    features: Float[Array | np.ndarray, "n d"],
    labels: Int[Array | np.ndarray, " n"],
    num_classes: int,
    *,
    mask: Bool[Array | np.ndarray, " n"] | None = None,
    C: float = 1.0,
    iterations: int = 300,
) -> Probe:
    """Multinomial logistic regression on scaled features; the equation is in the module's head.

    L-BFGS from zero until the largest entry of the gradient is 1e-7, deterministic, in float32 at
    least. An iteration takes about one forward and one backward pass, O(ndk), memory ``[n, d]`` and
    ``[n, k]``; 20 to 150 iterations are common, 0.1 s on two cores for n = 10,000, d = 64, k = 10.
    Rescaled features have the same probe. Over models, ``[m, n, d]``, ``jax.vmap`` it, within
    ``jax.jit``; on a CPU ``jaxunlearn.linalg.over_each`` is several times faster, as each model
    then stops by itself and the line search takes one of its branches and not all.

    A class without examples tends to probability zero: its weights are 0 and its bias −inf.

    Args:
      features: ``[n, d]`` of the training images.
      labels: ``[n]`` in ``[0, num_classes)``, the true ones.
      num_classes: k ≥ 2.
      mask: ``[n]``, False for padded rows, which count nothing whatever they hold.
      C: weight of the data against the penalty, as in scikit-learn.
      iterations: at most so many.

    Returns:
      The probe. Traced values cannot raise: under ``vmap`` or ``jit``, features, labels and masks
      that are refused otherwise give a probe all of whose logits are NaN.

    Raises:
      ValueError: fewer than two classes, ``C`` or ``iterations`` not positive, no row that counts,
        or in such a row NaN, inf or a label out of range.

    Examples:
      >>> line, labels = jnp.array([[-2.0], [-1.0], [1.0], [2.0]]), jnp.array([0, 0, 1, 1])
      >>> probe_logits(linear_probe(line, labels, 2), line).argmax(axis=1).tolist()
      [0, 0, 1, 1]
    """
    if num_classes < 2 or not C > 0 or iterations < 1:
        raise ValueError(
            f"num_classes={num_classes}, C={C}, iterations={iterations}: wanted two classes or "
            "more, C > 0 and iterations >= 1."
        )
    counted = np.ones(len(labels), bool) if mask is None else mask
    _check_values(features, labels, counted, num_classes)
    z = jnp.asarray(features)
    z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    return _fit(z, jnp.asarray(labels), jnp.asarray(counted), C, iterations, num_classes)


def probe_logits(probe: Probe, features: Float[Array | np.ndarray, "n d"]) -> Float[Array, "n k"]:
    """Logits ``[n, k]`` of features ``[n, d]``, (z / s) W + b; −inf for a class never trained on.

    Examples:
      >>> probe = Probe(jnp.eye(2), jnp.array([1.0, 0.0]), jnp.array(2.0), jnp.array(0.0))
      >>> probe_logits(probe, jnp.array([[2.0, 6.0]])).tolist()
      [[2.0, 3.0]]
    """
    scaled = jnp.asarray(features) / probe.scale
    return jnp.matmul(scaled, probe.weights, precision=HIGHEST) + probe.bias[None, :]


def _check_values(
    features: Float[Array | np.ndarray, "n d"],
    labels: Int[Array | np.ndarray, " n"],
    counted: Bool[Array | np.ndarray, " n"],
    k: int,
) -> None:
    """Refuses what would make the probe NaN, as far as values are known."""
    if isinstance(counted, jax.core.Tracer):
        return
    rows = np.asarray(counted)
    if not rows.any():
        raise ValueError(f"none of {len(rows)} rows counts: wanted training examples.")
    if not isinstance(labels, jax.core.Tracer):
        truth = np.asarray(labels)[rows]
        if not (truth.min() >= 0 and truth.max() < k):
            raise ValueError(
                f"labels run from {truth.min()} to {truth.max()}: wanted 0..{k - 1}, and False in "
                "the mask for padded rows."
            )
    if not isinstance(features, jax.core.Tracer):
        finite = np.isfinite(np.asarray(features)[rows]).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{(~finite).sum()} of {len(finite)} rows of features hold NaN or inf: wanted "
                "finite features; check the variables that made them."
            )


@partial(jax.jit, static_argnums=5)
def _fit(
    z: Float[Array, "n d"],
    labels: Int[Array, " n"],
    counted: Bool[Array, " n"],
    C: float | Array,
    iterations: int | Array,
    k: int,
) -> Probe:
    truth = labels[:, None] == jnp.arange(k)[None, :]
    count = counted.sum()
    z = jnp.where(counted[:, None], z, 0)
    scale = jnp.abs(z).sum() / (count * z.shape[1])
    scale = jnp.where(scale == 0, 1, scale)  # all units dead: there is nothing to scale
    # Labels out of range, and not refused as they are traced, make every logit NaN.
    scale = jnp.where(jnp.all(truth.any(axis=1) | ~counted), scale, jnp.nan)
    centre = z.sum(axis=0) / (count * scale)
    x = jnp.where(counted[:, None], z / scale - centre[None, :], 0)
    present = jnp.any(truth & counted[:, None], axis=0)

    def objective(parameters: Float[Array, "d_and_1 k"]) -> Float[Array, ""]:
        W, b = parameters[:-1], parameters[-1:]
        logits = jnp.matmul(x, W, precision=HIGHEST) + b
        true_logit = jnp.sum(jnp.where(truth, logits, 0), axis=1)
        others = jnp.where(truth, -jnp.inf, jnp.where(present[None, :], logits, _NEVER))
        losses = jax.nn.softplus(jax.nn.logsumexp(others, axis=1) - true_logit)
        return (jnp.sum(losses, where=counted) + jnp.sum(W * W) / (2 * C)) / count

    start = jnp.zeros((x.shape[1] + 1, k), x.dtype)
    parameters, gradient = _minimize(objective, start, iterations)
    W, b = parameters[:-1], parameters[-1]
    bias = jnp.where(present, b - jnp.matmul(centre, W, precision=HIGHEST), -jnp.inf)
    return Probe(W, bias, scale, gradient)


def _minimize(
    objective: Callable[[Float[Array, "*s"]], Float[Array, ""]],
    start: Float[Array, "*s"],
    iterations: int | Array,
) -> tuple[Float[Array, "*s"], Float[Array, ""]]:
    """Where L-BFGS ends, and the largest entry of the gradient there."""
    optimizer = optax.lbfgs()

    def unfinished(state: tuple[Any, ...]) -> Array:
        return (jnp.abs(state[3]).max() > _TOLERANCE) & (state[4] < iterations)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        at, memory, value, grad, count = state
        update, memory = optimizer.update(
            grad, memory, at, value=value, grad=grad, value_fn=objective
        )
        # The line search ends with both at the new place.
        value, grad = (optax.tree_utils.tree_get(memory, name) for name in ("value", "grad"))
        return optax.apply_updates(at, update), memory, value, grad, count + 1

    value, grad = jax.value_and_grad(objective)(start)
    state = (start, optimizer.init(start), value, grad, jnp.array(0))
    end, _, _, grad, _ = jax.lax.while_loop(unfinished, step, state)
    return end, jnp.abs(grad).max()
