"""RMIA, offline: is an example more likely under this model than others of its kind are?

With p = p(x | θ) the probability of the true class under the target model, and p̄_out its mean over
reference models that never saw x,

  p̄(x)    = ½ (1 + a) p̄_out(x) + ½ (1 − a)     what p would be, half of the models having seen x
  ratio_x = p(x | θ) / p̄(x)
  score_x = share of the population z with ratio_x > ratio_z

so each score is a rank among examples outside every model's training data. Here the target is an
unlearned model, the references are retrained models, which never saw the forget data either, and
the score tells forget examples (positive) from held-out ones. a in [0, 1] says how much a model
gains on an example by training on it; it is chosen on an **original** model, whose members the
forget data are, and then frozen.

The target value is that of a retrained model with the others as references. It is one half only
where forget and held-out examples have one distribution.

Source: Zarifzadeh et al., "Low-cost high-power membership inference attacks", arXiv:2312.03262;
privacytrustlab/ml_privacy_meter, ``modules/mia/attacks/rmia.py``.
"""

from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float

from jaxunlearn.evaluation.roc import TPRAtFPR, auc, tpr_at_fpr

FEWEST_REFERENCES = 4  # below it the result is marked
CANDIDATES = tuple(step / 10 for step in range(11))
_FLOOR = 1e-12  # of a probability


class Confidences(NamedTuple):
    """Probabilities of the true class under t models, as ``metrics.confidence`` gives them."""

    forget: Float[Array | np.ndarray, "t f"]
    held_out: Float[Array | np.ndarray, "t h"]  # like the forget data, in no model's training data
    population: Float[Array | np.ndarray, "t z"]  # also in none, and disjoint from held_out


class RMIA(NamedTuple):
    """The attack on each target model; scores are shares in [0, 1], larger = member."""

    auc: Float[np.ndarray, " t"]  # one per target
    tpr: tuple[tuple[TPRAtFPR, ...], ...]  # of each target, at each rate
    forget_scores: Float[np.ndarray, "t f"]
    held_out_scores: Float[np.ndarray, "t h"]
    offline_a: float
    references: int  # reference models behind each target
    too_few: bool  # fewer than 4 references


class OfflineA(NamedTuple):
    """The chosen a, and the mean AUC on the original models at every candidate."""

    value: float
    candidates: tuple[float, ...]
    auc: Float[np.ndarray, " candidates"]


def rmia(
    targets: Confidences,
    references: Confidences,
    *,
    offline_a: float,
    fprs: tuple[float, ...] = (0.1, 0.01),
) -> RMIA:
    """Attack each target model with the same references.

    O(m (f + h + z)) for m references, and O((f + h + z) log z) per target.

    Args:
      targets: of the models under attack, ``[t, ·]``.
      references: of models trained without the forget data, ``[m, ·]``.
      offline_a: a in [0, 1], see :func:`choose_offline_a`.
      fprs: false positive rates to give each target's TPR at.

    Raises:
      ValueError: on no model, no example or other examples on the two sides, numbers that are no
        probabilities, or ``offline_a`` outside [0, 1].

    Examples:
      >>> rng = np.random.default_rng(0)
      >>> draw = lambda models: Confidences(*rng.uniform(0.2, 0.6, (3, models, 100)))
      >>> references, clean = draw(8), draw(2)
      >>> told = clean._replace(forget=clean.forget + 0.3)
      >>> rmia(told, references, offline_a=0.3).auc.round(1).tolist()
      [1.0, 1.0]
    """
    targets, references = _checked("targets", targets), _checked("references", references)
    for split, target, reference in zip(Confidences._fields, targets, references, strict=True):
        if target.shape[1] != reference.shape[1]:
            raise ValueError(
                f"{split}: targets have {target.shape[1]} examples, references "
                f"{reference.shape[1]}: wanted the same examples in the same order."
            )
    means = Confidences(*(reference.mean(axis=0, keepdims=True) for reference in references))
    return _attack(targets, means, len(references.forget), offline_a, fprs)


def rmia_null(
    retrained: Confidences, *, offline_a: float, fprs: tuple[float, ...] = (0.1, 0.01)
) -> RMIA:
    """Attack each retrained model with the others as references: what no forgetting looks like.

    Args:
      retrained: ``[m, ·]``, at least two models.
      offline_a: a, as in the attack that this is the null of.
      fprs: false positive rates to give each target's TPR at.

    Raises:
      ValueError: as :func:`rmia`, and on fewer than two models.

    Examples:
      >>> rng = np.random.default_rng(0)
      >>> null = rmia_null(Confidences(*rng.uniform(size=(3, 5, 200))), offline_a=0.3)
      >>> null.references, round(float(null.auc.mean()), 1)
      (4, 0.5)
    """
    retrained = _checked("retrained", retrained)
    m = len(retrained.forget)
    if m < 2:
        raise ValueError("1 retrained model: wanted at least 2, the others being its references.")
    means = Confidences(*((p.sum(axis=0, keepdims=True) - p) / (m - 1) for p in retrained))
    return _attack(retrained, means, m - 1, offline_a, fprs)


def choose_offline_a(
    originals: Confidences,
    references: Confidences,
    *,
    candidates: tuple[float, ...] = CANDIDATES,
) -> OfflineA:
    """The a with the largest mean AUC on original models, the first of equals.

    Args:
      originals: of models trained on the forget data too, ``[t, ·]``.
      references: as in :func:`rmia`.
      candidates: values to try.

    Raises:
      ValueError: as :func:`rmia`, and on no candidate.

    Examples:
      >>> rng = np.random.default_rng(0)
      >>> references = Confidences(*rng.uniform(0.2, 0.6, (3, 8, 50)))
      >>> original = Confidences(*(p[:1] for p in references))
      >>> choose_offline_a(original._replace(forget=original.forget + 0.2), references).auc.shape
      (11,)
    """
    if not candidates:
        raise ValueError("candidates is empty: wanted values of a in [0, 1].")
    means = np.array(
        [rmia(originals, references, offline_a=a, fprs=()).auc.mean() for a in candidates]
    )
    return OfflineA(candidates[int(means.argmax())], candidates, means)


def rmia_scores(
    signal: Float[np.ndarray, " n"],
    out: Float[np.ndarray, " n"],
    population_signal: Float[np.ndarray, " z"],
    population_out: Float[np.ndarray, " z"],
    *,
    offline_a: float,
) -> Float[np.ndarray, " n"]:
    """Scores of one target model's examples: shares of the population. O((n + z) log z).

    Args:
      signal: p(x | θ) ``[n]``.
      out: p̄_out(x) ``[n]``.
      population_signal: p(z | θ) ``[z]``.
      population_out: p̄_out(z) ``[z]``.
      offline_a: a in [0, 1].

    Raises:
      ValueError: if ``offline_a`` is outside [0, 1].

    Examples:
      >>> rmia_scores(np.array([0.5, 0.1]), np.array([0.5, 0.5]), np.array([0.2, 0.3]),
      ...             np.array([0.4, 0.2]), offline_a=1.0).tolist()
      [0.5, 0.0]
    """
    if not 0 <= offline_a <= 1:
        raise ValueError(f"offline_a={offline_a}: wanted a number from 0 to 1, such as 0.3.")
    population = np.sort(_ratio(population_signal, population_out, offline_a))
    smaller = np.searchsorted(population, _ratio(signal, out, offline_a), side="left")
    return smaller / len(population)


def _ratio(
    signal: Float[np.ndarray, " n"], out: Float[np.ndarray, " n"], a: float
) -> Float[np.ndarray, " n"]:
    marginal = ((1 + a) * np.maximum(out, _FLOOR) + (1 - a)) / 2
    return np.maximum(signal, _FLOOR) / marginal


def _attack(
    targets: Confidences, means: Confidences, references: int, a: float, fprs: tuple[float, ...]
) -> RMIA:
    """``means`` are ``[t, ·]``, or ``[1, ·]`` where all targets have the same references."""
    t = len(targets.forget)
    outs = Confidences(*(np.broadcast_to(mean, (t, mean.shape[1])) for mean in means))
    forget, held_out = (
        np.stack(
            [
                rmia_scores(*rows, offline_a=a)
                for rows in zip(signal, out, targets.population, outs.population, strict=True)
            ]
        )
        for signal, out in ((targets.forget, outs.forget), (targets.held_out, outs.held_out))
    )
    pairs = list(zip(forget, held_out, strict=True))
    return RMIA(
        auc=np.array([auc(members, others) for members, others in pairs]),
        tpr=tuple(tuple(tpr_at_fpr(*pair, fpr) for fpr in fprs) for pair in pairs),
        forget_scores=forget,
        held_out_scores=held_out,
        offline_a=a,
        references=references,
        too_few=references < FEWEST_REFERENCES,
    )


def _checked(name: str, family: Confidences) -> Confidences:
    """A family in float64, refused unless its splits are probabilities of the same models."""
    family = Confidences(*(np.asarray(split, np.float64) for split in family))
    shapes = [split.shape for split in family]
    if len({shape[0] for shape in shapes}) > 1 or not all(n and m for n, m in shapes):
        raise ValueError(
            f"{name} have splits of shapes {shapes}: wanted [models, examples] of forget, held_out "
            "and population, with the same models and at least one of each."
        )
    for split, p in zip(Confidences._fields, family, strict=True):
        # A softmax normalised in float32 may exceed one by its rounding.
        if not ((p >= 0) & (p <= 1 + 1e-6)).all():
            raise ValueError(
                f"{split} of {name} runs from {p.min()} to {p.max()}: wanted probabilities of the "
                "true class without NaN, as metrics.confidence gives them."
            )
    return family
