"""Membership attacks on one model by a support vector machine on its confidence.

The feature is one number per example, the probability p_y of the true class. A machine with kernel
exp(−(p − q)²) and C = 3 learns to tell members (1) from non-members (0); the efficacy is the share
of other images that it calls a **non-member**. Three published attacks differ in who is who:

  function                  members            non-members          scored
  ``svc_confidence_optml``  retain             test, as many        forget ("MIA efficacy")
  ``svc_confidence_unsc``   retain, augmented  test of all classes  forget
  ``svc_confidence_kodge``  retain             forget               forget classes' test images

The target is the retrained model's efficacy, from either side: where members and non-members have
one distribution the boundary lies anywhere, so neither 50 % nor 100 % is a goal.

Sources: OPTML-Group/Unlearn-Sparse, ``evaluation/SVC_MIA.py``, key ``confidence``;
HQC-ML/Machine-Unlearning-via-Null-Space-Calibration; sangamesh-kodge/class_forgetting.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float
from sklearn.svm import SVC

from jaxunlearn.evaluation.confidence_svc import fit_confidence_svc
from jaxunlearn.evaluation.metrics import clopper_pearson


class SVCAttack(NamedTuple):
    """Outcome of an SVC attack; rates are float64 shares."""

    efficacy: float  # share of the scored examples called non-member
    count: int  # type: ignore[assignment]  # examples scored (hides tuple.count)
    interval: tuple[float, float]  # Clopper–Pearson 95 %, the fitted attack held fixed
    degenerate: bool  # one answer for every example: the efficacy is 0 or 1 and says nothing
    member_recall: float  # share of the fitted members called member
    non_member_recall: float  # share of the fitted non-members called non-member
    members: int  # examples fitted on
    non_members: int


def svc_confidence_optml(
    retain_confidence: Float[Array | np.ndarray, " n_retain"],
    test_confidence: Float[Array | np.ndarray, " n_test"],
    forget_confidence: Float[Array | np.ndarray, " n_forget"],
    *,
    members: str = "first",
    balanced: bool = True,
    seed: int = 0,
    solver: str = "features",
) -> SVCAttack:
    """Share of the forget set that an SVC on p_y calls non-member.

    Fits on n = min(n_retain, n_test) members and n non-members, in O(n): 0.3 s for n = 10,000,
    where libsvm, about O(n²), needs ten.

    Args:
      retain_confidence: p_y of retain images ``[n_retain]``, the members.
      test_confidence: p_y of images never trained on ``[n_test]``; if a class is forgotten,
        without that class.
      forget_confidence: p_y of the forget set ``[n_forget]``.
      members: which n of the longer side: the ``"first"``, as the OPTML code, or a ``"random"``
        draw.
      balanced: False fits on every retain and test image instead of n of each.
      seed: of the random draw.
      solver: ``"features"``, see :mod:`jaxunlearn.evaluation.confidence_svc`; or ``"libsvm"``, as
        the OPTML code, whose default tolerance moves the boundary by up to 5e-4.

    Returns:
      The efficacy with its count, and how well the attack does on what it was fitted on.

    Raises:
      ValueError: if a set is empty or holds NaN or a number that is no probability, or if
        ``members`` or ``solver`` is unknown.

    Examples:
      >>> retain, test = np.full(20, 0.9), np.full(20, 0.2)
      >>> attack = svc_confidence_optml(retain, test, np.array([0.1, 0.3, 0.95, 0.25]))
      >>> attack.efficacy, attack.count, attack.degenerate
      (0.75, 4, False)
    """
    retain = _probabilities("retain_confidence", retain_confidence)
    test = _probabilities("test_confidence", test_confidence)
    forget = _probabilities("forget_confidence", forget_confidence)
    if members not in ("first", "random"):
        raise ValueError(f'members="{members}": write "first" (OPTML code) or "random".')
    if balanced:
        n = min(len(retain), len(test))
        rng = np.random.default_rng(seed) if members == "random" else None
        retain, test = _take(retain, n, rng), _take(test, n, rng)
    return _attack(retain, test, forget, solver)


def svc_confidence_unsc(
    retain_confidence: Float[Array | np.ndarray, " n_retain"],
    test_confidence: Float[Array | np.ndarray, " n_test"],
    forget_confidence: Float[Array | np.ndarray, " n_forget"],
    *,
    validation: int,
    seed: int = 0,
    solver: str = "features",
) -> SVCAttack:
    """The SVC attack as in UNSC's code: n_test + validation members against n_test non-members.

    For parity with published tables only. More members than non-members push the boundary down,
    members that are augmented and non-members that are not differ by that alone, and test images
    of the forgotten classes are non-members, which no other image of these classes balances.

    Args:
      retain_confidence: p_y of retain images ``[n_retain]`` **under training augmentation**.
      test_confidence: p_y of all test images ``[n_test]``, the forgotten classes' too.
      forget_confidence: p_y of the forget set ``[n_forget]``.
      validation: size of the validation split; so many more members than ``n_test`` are drawn.
      seed: of the draw.
      solver: as for :func:`svc_confidence_optml`.

    Raises:
      ValueError: too few retain images, and as :func:`svc_confidence_optml`.

    Examples:
      >>> attack = svc_confidence_unsc(
      ...     np.full(40, 0.9), np.full(20, 0.2), np.array([0.1, 0.95]), validation=10
      ... )
      >>> attack.efficacy, attack.members, attack.non_members
      (0.5, 30, 20)
    """
    retain = _probabilities("retain_confidence", retain_confidence)
    test = _probabilities("test_confidence", test_confidence)
    forget = _probabilities("forget_confidence", forget_confidence)
    wanted = len(test) + validation
    if validation < 0 or wanted > len(retain):
        raise ValueError(
            f"validation={validation} and {len(test)} test images: wanted a count >= 0 and "
            f"{wanted} retain images or more, where {len(retain)} came; lower validation, or write "
            "svc_confidence_optml."
        )
    return _attack(_take(retain, wanted, np.random.default_rng(seed)), test, forget, solver)


def svc_confidence_kodge(
    retain_confidence: Float[Array | np.ndarray, " n_retain"],
    forget_confidence: Float[Array | np.ndarray, " n_forget"],
    forget_test_confidence: Float[Array | np.ndarray, " n_test"],
    *,
    balanced: bool = False,
    seed: int = 0,
    solver: str = "features",
) -> SVCAttack:
    """The SVC attack of Kodge et al.: retain against forget *training* images, for classes.

    Scored is the share of the forgotten classes' test images that is called non-member. A
    retrained model has nearly 1 and an original nearly 0, which tells the class from others as
    much as members from non-members. A collapsed model can have 0, as many of its retain images
    have p_y near 0 too.

    Args:
      retain_confidence: p_y of retain training images ``[n_retain]``, the members.
      forget_confidence: p_y of forget training images ``[n_forget]``, taken for non-members.
      forget_test_confidence: p_y of the forgotten classes' test images ``[n_test]``.
      balanced: draw as many of the longer side as the shorter has; the authors' code does not.
      seed: of that draw.
      solver: as for :func:`svc_confidence_optml`.

    Raises:
      ValueError: as :func:`svc_confidence_optml`.

    Source: Kodge et al., arXiv:2312.00761.

    Examples:
      >>> attack = svc_confidence_kodge(
      ...     np.full(40, 0.9), np.full(10, 0.1), np.array([0.1, 0.2, 0.95]), balanced=True
      ... )
      >>> round(attack.efficacy, 3), attack.members, attack.non_members
      (0.667, 10, 10)
    """
    retain = _probabilities("retain_confidence", retain_confidence)
    forget = _probabilities("forget_confidence", forget_confidence)
    test = _probabilities("forget_test_confidence", forget_test_confidence)
    if balanced:
        n, rng = min(len(retain), len(forget)), np.random.default_rng(seed)
        retain, forget = _take(retain, n, rng), _take(forget, n, rng)
    return _attack(retain, forget, test, solver)


def _attack(
    members: Float[np.ndarray, " m"],
    non_members: Float[np.ndarray, " n"],
    scored: Float[np.ndarray, " s"],
    solver: str,
) -> SVCAttack:
    if solver not in ("features", "libsvm"):
        raise ValueError(f'solver="{solver}": write "features" or "libsvm" (OPTML code).')
    decision = _machine(members, non_members, solver)
    called_in, called_out, called = (decision(p) > 0 for p in (members, non_members, scored))
    count = int((~called).sum())
    return SVCAttack(
        efficacy=count / len(scored),
        count=len(scored),
        interval=clopper_pearson(count, len(scored)),
        degenerate=np.unique(np.concatenate([called_in, called_out, called])).size == 1,
        member_recall=float(called_in.mean()),
        non_member_recall=float((~called_out).mean()),
        members=len(members),
        non_members=len(non_members),
    )


def _machine(
    members: Float[np.ndarray, " m"], non_members: Float[np.ndarray, " n"], solver: str
) -> Callable[[Float[np.ndarray, " k"]], Float[np.ndarray, " k"]]:
    """The fitted machine's value at probabilities, above 0 for members."""
    if solver == "features":
        return fit_confidence_svc(members, non_members).decision
    truth = np.repeat([1, 0], [len(members), len(non_members)])
    svc = SVC(C=3, kernel="rbf", gamma=1.0)
    svc.fit(np.concatenate([members, non_members])[:, None], truth)
    return lambda confidence: svc.decision_function(confidence[:, None])


def _probabilities(name: str, values: Float[Array | np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The SVC's features, refused unless they are probabilities."""
    column = np.asarray(values)
    if not len(column):
        raise ValueError(f"{name} is empty: the attack needs retain, test and forget examples.")
    # A softmax normalised in float32 may exceed one by its rounding.
    if not ((column >= 0) & (column <= 1 + 1e-6)).all():
        raise ValueError(
            f"{name} runs from {column.min()} to {column.max()}: wanted probabilities of the true "
            "class without NaN, as metrics.confidence gives them, not logits or losses."
        )
    return column


def _take(
    column: Float[np.ndarray, " n"], count: int, rng: np.random.Generator | None
) -> Float[np.ndarray, " count"]:
    if rng is None:
        return column[:count]
    return column[np.sort(rng.choice(len(column), count, replace=False))]
