"""Do imported weights compute what they computed at home?"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Num

_SUSPECTS = (
    "the usual reasons are other mean, std or scale of the inputs; channels in another order; a "
    "dense layer on a flattened map, whose rule lacks flattened=(c, h, w); batch norm's eps (1e-5 "
    "in PyTorch, 1e-3 in Keras); padding (flax's and Keras' \"SAME\" with stride 2 is no padding=1)"
)


def check_logits(
    apply_fn: Callable[..., Any],
    variables: Any,
    inputs: Num[Array | np.ndarray, "n ..."],
    expected: Float[Array | np.ndarray, "n k"],
    *,
    atol: float = 1e-4,
) -> float:
    """The largest difference between a model's logits and those of the original framework.

    max |apply_fn(variables, inputs) - expected|. One forward pass over all inputs at once; 256 of
    them are plenty.

    Args:
      apply_fn: the model, called as ``apply_fn(variables, inputs)``; it is compiled.
      variables: its variables.
      inputs: ``[n, ...]``, as the model reads them.
      expected: ``[n, k]``, what the original gave for them.
      atol: largest difference that passes; 1e-4 is what float32 leaves of two implementations.

    Returns:
      The largest absolute difference.

    Raises:
      ValueError: it exceeds ``atol``, or shapes differ, or there is nothing to compare. Says in how
        many examples the classes agree, and what usually is the reason.

    Examples:
      >>> check_logits(lambda variables, x: 2 * x, {}, np.ones((3, 4)), np.full((3, 4), 2.0))
      0.0
    """
    logits = np.asarray(jax.jit(apply_fn)(variables, inputs))
    expected = np.asarray(expected)
    if logits.shape != expected.shape or not logits.size:
        raise ValueError(
            f"the model gives logits {list(logits.shape)}, expected are {list(expected.shape)}; "
            "wanted [n, k] of both, one row for each input"
        )
    difference = float(np.abs(logits - expected).max())
    if not difference <= atol:  # NaN does not pass
        agree = int(np.sum(logits.argmax(-1) == expected.argmax(-1)))
        raise ValueError(
            f"logits differ by up to {difference:.3g}, wanted at most {atol:g} (logits reach "
            f"{np.abs(expected).max():.3g}); the predicted classes agree in {agree} of "
            f"{len(expected)} examples; {_SUSPECTS}"
        )
    return difference
