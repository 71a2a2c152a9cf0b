"""How settings are chosen: by accuracies on a sample of training data.

The score of a model is ``ACC_r · (1 - ACC_f)``, with the accuracies on retain and forget images.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.methods.base import UnlearningProblem
from jaxunlearn.training import accuracy


class Selection(NamedTuple):
    """Images on which models are compared: those to forget and those to retain."""

    forget: Batches
    retain: Batches

    def with_gone(self, classes: Collection[int]) -> "Selection":
        """The same images, of which only these classes count as forgotten."""
        gone = np.isin(self.forget.labels, list(classes))
        if gone.all():
            return self
        later = self.forget.select(np.flatnonzero(~gone))
        retain = Batches(
            jnp.concatenate([self.retain.inputs, later.inputs]),
            jnp.concatenate([self.retain.labels, later.labels]),
            self.retain.batch_size,
        )
        return Selection(self.forget.select(np.flatnonzero(gone)), retain)


def selection_of(
    key: PRNGKeyArray,
    problem: UnlearningProblem,
    gone: Collection[int],
    *,
    images: int | None,
    batch_size: int,
) -> Selection:
    """Images that settings are chosen on.

    Half of them are to be forgotten, so that both accuracies are known about as well.

    Args:
      key: which ones.
      problem: the data.
      gone: classes that count as forgotten; those still to come count as retained.
      images: training images, or fewer if there are no more; None takes all of the problem's
        ``selection``.
      batch_size: of the forward passes.
    """
    if images is None:
        assert problem.selection is not None
        whole = Selection(*problem.selection)
    else:
        assert problem.retain is not None
        whole = Selection(problem.forget, problem.retain)
    if problem.forget_classes:
        whole = whole.with_gone(gone)
    forget_key, retain_key = jax.random.split(key)
    return Selection(
        whole.forget.sample(forget_key, images and images // 2).with_batch_size(batch_size),
        whole.retain.sample(retain_key, images and images - images // 2).with_batch_size(
            batch_size
        ),
    )


def scored(
    problem: UnlearningProblem, variables: Mapping[str, Any], selection: Selection
) -> dict[str, float]:
    """``retain_accuracy``, ``forget_accuracy`` and ``score`` of a model, as fractions."""
    retain, forget = (
        accuracy(problem.apply_fn, dict(variables), images, mesh=problem.mesh)
        for images in (selection.retain, selection.forget)
    )
    score = retain * (1 - forget)
    return {"retain_accuracy": retain, "forget_accuracy": forget, "score": score}
