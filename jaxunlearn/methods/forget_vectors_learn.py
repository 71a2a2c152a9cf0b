"""The vectors of several forget sets, learned together from one stream of data."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jaxunlearn.methods.base import UnlearningProblem
from jaxunlearn.methods.forget_vectors_checks import check_inputs, checked_betas, checked_flags
from jaxunlearn.methods.forget_vectors_config import ForgetVectorsConfig
from jaxunlearn.methods.forget_vectors_run import descend, starts


class ForgetVectors(NamedTuple):
    """Vectors of K forget sets.

    Attributes:
      deltas: ``[K, *input]``, in pixels of [0, 1].
      history: ``loss``, ``forget``, ``retain`` and ``norm``, ``[K, epochs]`` each.
    """

    deltas: Float[Array, "K ..."]
    history: dict[str, np.ndarray]


def learn_forget_vectors(
    key: PRNGKeyArray,
    problem: UnlearningProblem,
    flags: Shaped[Array | np.ndarray, "K N"],
    config: ForgetVectorsConfig,
    betas: Float[Array | np.ndarray, " K"] | None = None,
    *,
    at_once: int | None = None,
) -> ForgetVectors:
    """Learn the vectors of K forget sets from one stream of data.

    Each is what it would be by itself. To try a grid of β, repeat the rows of ``flags``.

    Args:
      key: start, batch order and augmentation, the same for all.
      problem: model and data, of which the forget data come first and the retain data after them,
        N in all. Who learns vectors of all classes may divide the data in any way.
      flags: for each set, 1 for the examples that are to be forgotten.
      config: settings.
      betas: β of each; by default the settings', if that is one number.
      at_once: how many vectors are mapped over in one program. By default all on accelerators and
        one after the other on the CPU backend, where more at once gain nothing.

    Raises:
      ValueError: see :func:`check_inputs`; flags that do not fit the data or leave nothing to
        forget or to retain; no β for each.
      FloatingPointError: a loss or a vector is no longer finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxunlearn.batches import Batches
      >>> x, labels = jnp.eye(4), jnp.arange(4)
      >>> problem = UnlearningProblem(
      ...     apply_fn=lambda variables, x: x @ variables["params"],
      ...     variables={"params": 5 * jnp.eye(4)},
      ...     forget=Batches(x[:2], labels[:2], 2),
      ...     retain=Batches(x[2:], labels[2:], 2),
      ...     num_classes=4,
      ... )
      >>> config = ForgetVectorsConfig(norm_weight=0.1)
      >>> found = learn_forget_vectors(jax.random.key(0), problem, np.eye(4), config)
      >>> jnp.argmin(found.deltas, axis=1).tolist()  # each class is held down by its own vector
      [0, 1, 2, 3]
    """
    check_inputs(problem, config)
    rows, weights = checked_flags(problem, flags), checked_betas(config, betas, len(flags))
    start_key, run_key = jax.random.split(key)
    start = starts(start_key, config.start, (len(rows), *problem.forget.inputs.shape[1:]))
    found = descend(run_key, problem, start, rows, weights, config, at_once=at_once)
    return ForgetVectors(found.vectors, found.history)


def epoch_rows(
    history: Mapping[str, Float[np.ndarray, " epochs"]],
) -> list[dict[str, int | float]]:
    """Losses of one vector by epoch, as a report has them.

    Args:
      history: ``loss``, ``forget``, ``retain`` and ``norm``; empty if nothing was learned.

    Examples:
      >>> names = ("loss", "forget", "retain", "norm")
      >>> epoch_rows(dict(zip(names, np.array([[6.0], [3.0], [2.0], [1.0]]))))
      [{'epoch': 1, 'loss': 6.0, 'loss_forget': 3.0, 'loss_retain': 2.0, 'norm': 1.0}]
      >>> epoch_rows({})
      []
    """
    names = {"loss": "loss", "forget": "loss_forget", "retain": "loss_retain", "norm": "norm"}
    return [
        {"epoch": epoch + 1, **{new: float(history[old][epoch]) for old, new in names.items()}}
        for epoch in range(len(history.get("loss", ())))
    ]
