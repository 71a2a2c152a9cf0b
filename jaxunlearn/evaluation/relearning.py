"""Relearning: how soon training brings forgotten data back.

    t(θ) = first tested step at which the forget loss is at most τ,      τ = loss of θo + 1e-5
    a(θ) = first tested step at which the forget accuracy is at least (1 − α) · that of θo
    AIN  = (a(θu) + ε) / (a(θr) + ε)

Loss and accuracy are those of the whole forget data in inference mode, tested at 0, 10, 20, ...
steps and at the cap; nothing is interpolated. A model that is not there at the cap is censored: its
time is at least the cap. The target of each number is the retrained model's, from both sides.

Sources: relearn time of Golatkar et al. (arXiv:1911.04933), with the settings of SCRUB's code
(arXiv:2302.09880); the anamnesis index (AIN) of Chundawat et al. (arXiv:2201.05629), of which α is
read as a share of θo's accuracy.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from jax import Array
from jaxtyping import Float, Int

State = TypeVar("State")


class ForgetMarks(NamedTuple):
    """Mean cross-entropy in nats and accuracy on the forget data."""

    loss: float
    accuracy: float


class Relearned(NamedTuple):
    """How a model relearned.

    Attributes:
      steps: ``t``, the cap where ``censored``.
      censored: the loss is not there at the last test.
      accuracy_steps: ``a``, the cap where ``accuracy_censored``.
      accuracy_censored: the accuracy is not there at the last test.
      diverged: a test gave a loss that is not finite, and was the last one.
      tested: steps of the tests, up to the first at which both are there.
      loss: at these steps.
      accuracy: at these steps.
    """

    steps: int
    censored: bool
    accuracy_steps: int
    accuracy_censored: bool
    diverged: bool
    tested: tuple[int, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]


class AnamnesisIndex(NamedTuple):
    """A ratio of relearn times.

    Attributes:
      value: None where it is undefined.
      at_least: the value is a lower bound, for the model is censored.
      reason: why it is undefined.
    """

    value: float | None
    at_least: bool = False
    reason: str | None = None


def forget_marks(
    logits: Float[np.ndarray | Array, "n k"], labels: Int[np.ndarray | Array, " n"]
) -> ForgetMarks:
    """Loss and accuracy of logits; those that are not finite have an infinite loss.

    Raises:
      ValueError: no examples, or not one label each.

    Examples:
      >>> forget_marks(np.zeros((2, 4)), np.array([0, 1]))
      ForgetMarks(loss=1.3862943611198906, accuracy=0.5)
    """
    scores, truth = np.asarray(logits, np.float64), np.asarray(labels)
    if not len(truth) or len(scores) != len(truth):
        raise ValueError(
            f"logits {scores.shape} and labels {truth.shape}: wanted [n, k] and [n], n at least 1"
        )
    if not np.isfinite(scores).all():
        return ForgetMarks(math.inf, 0.0)
    above = scores - scores[np.arange(len(truth)), truth][:, None]
    top = above.max(1)
    losses = top + np.log(np.exp(above - top[:, None]).sum(1))
    return ForgetMarks(float(losses.mean()), float((scores.argmax(1) == truth).mean()))


def relearn_target(
    original: ForgetMarks, *, alpha: float = 0.05, slack: float = 1e-5
) -> ForgetMarks:
    """Loss and accuracy at which forgotten data count as relearned.

    Args:
      original: of the original model.
      alpha: share of its accuracy that may be missing.
      slack: by which its loss may be exceeded.

    Raises:
      ValueError: an original loss that is not finite; alpha outside [0, 1); a negative slack.

    Examples:
      >>> relearn_target(ForgetMarks(0.25, 0.5), alpha=0.5, slack=0.0)
      ForgetMarks(loss=0.25, accuracy=0.25)
    """
    if not math.isfinite(original.loss):
        raise ValueError(f"forget loss of the original is {original.loss}: wanted a finite one")
    if not 0 <= alpha < 1 or not slack >= 0:
        raise ValueError(f"alpha = {alpha}, slack = {slack}: wanted alpha in [0, 1), slack >= 0")
    return ForgetMarks(original.loss + slack, (1 - alpha) * original.accuracy)


def relearn_time(
    train: Callable[[State, int, int], State],
    test: Callable[[State], ForgetMarks],
    state: State,
    target: ForgetMarks,
    *,
    cap: int,
    every: int = 10,
) -> Relearned:
    """Relearn times of one model, by loss and by accuracy. At most ``cap / every + 2`` tests.

    Args:
      train: ``(state, first, last) -> state``: takes the steps from ``first`` up to ``last - 1``,
        and leaves the state that it is given as it is.
      test: loss and accuracy on the whole forget data, in inference mode.
      state: the model to start from.
      target: from :func:`relearn_target`.
      cap: number of steps after which it is given up.
      every: steps between two tests.

    Raises:
      ValueError: a cap or a distance of tests below 1.

    Examples:
      >>> halve = lambda loss, first, last: loss * 0.5 ** (last - first)
      >>> test = lambda loss: ForgetMarks(loss, 1 - loss)
      >>> found = relearn_time(halve, test, 1.0, ForgetMarks(0.1, 0.5), cap=5, every=2)
      >>> found.steps, found.accuracy_steps, found.tested, found.loss
      (4, 2, (0, 2, 4), (1.0, 0.25, 0.0625))
    """
    if cap < 1 or every < 1:
        raise ValueError(f"cap = {cap}, every = {every}: wanted at least 1 step each")
    tested, marks = [0], [test(state)]
    times = _reached(tested, marks, target)
    while tested[-1] < cap and None in times and math.isfinite(marks[-1].loss):
        last = min(tested[-1] + every, cap)
        state = train(state, tested[-1], last)
        tested.append(last)
        marks.append(test(state))
        times = _reached(tested, marks, target)
    steps, accuracy_steps = times
    return Relearned(
        steps=cap if steps is None else steps,
        censored=steps is None,
        accuracy_steps=cap if accuracy_steps is None else accuracy_steps,
        accuracy_censored=accuracy_steps is None,
        diverged=not math.isfinite(marks[-1].loss),
        tested=tuple(tested),
        loss=tuple(each.loss for each in marks),
        accuracy=tuple(each.accuracy for each in marks),
    )


def _reached(
    tested: list[int], marks: list[ForgetMarks], target: ForgetMarks
) -> tuple[int | None, int | None]:
    """First tested steps at which loss and accuracy are there."""
    pairs = list(zip(tested, marks, strict=True))
    enough = target.accuracy - 1e-9  # a share of counts, rounded
    return (
        next((step for step, each in pairs if each.loss <= target.loss), None),
        next((step for step, each in pairs if each.accuracy >= enough), None),
    )


def anamnesis_index(
    model: Relearned, retrained: Relearned, *, epsilon: float = 0.0
) -> AnamnesisIndex:
    """AIN: relearn time of a model, by accuracy, over that of the retrained model; its target is 1.

    Far below 1 the model still knew; far above 1 it resists more than a model that never saw the
    data.

    Args:
      model: any model.
      retrained: the reference, relearned with the same draws.
      epsilon: added to both times; 0.01 in ERASURE. With 0 the index is undefined where the
        retrained model is there before the first step.

    Returns:
      The index: undefined where the retrained model is censored, or either diverged short of it; a
      lower bound where the other one is censored.

    Raises:
      ValueError: a negative epsilon.

    Examples:
      >>> model = Relearned(30, False, 20, False, False, (0,), (0.0,), (1.0,))
      >>> anamnesis_index(model, model._replace(accuracy_steps=40)).value
      0.5
      >>> anamnesis_index(model._replace(accuracy_censored=True), model)
      AnamnesisIndex(value=1.0, at_least=True, reason=None)
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon = {epsilon}: wanted a number of steps, 0 or above")
    reference = retrained.accuracy_steps + epsilon
    if retrained.accuracy_censored:
        how = "diverges" if retrained.diverged else f"is not there after {reference:g} steps"
        return AnamnesisIndex(None, reason=f"the retrained model {how}")
    if not reference:
        return AnamnesisIndex(None, reason="the retrained model is there before the first step")
    if model.accuracy_censored and model.diverged:
        return AnamnesisIndex(None, reason="the model diverges")
    return AnamnesisIndex((model.accuracy_steps + epsilon) / reference, model.accuracy_censored)
