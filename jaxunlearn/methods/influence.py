"""Influence unlearning: one Newton step from the loss of all data to that of the retain data.

    v = (1/n) Σ_forget ∇ℓ_i - n_f / (n n_r) Σ_retain ∇ℓ_j
    H = λ I + (1/m) Σ_{j ≤ m} g_j g_jᵀ,   g_j = ∇ℓ_j of m retain examples
    θ ← θ + α H⁻¹ v

Koh and Liang (arXiv:1703.04730), Izzo et al. (arXiv:2002.10077); with this ``H`` WoodFisher
(arXiv:2004.14340), the influence unlearning of arXiv:2304.04934. With ``G = [g_1 .. g_m]``

    H⁻¹ v = (v - G w) / λ,   (m λ I + GᵀG) w = Gᵀ v                  (Woodbury)

which needs ``m × m`` inner products, a solve in float64 on the host, and one more backward pass.

The published code does not compute this. Its recursion keeps one direction, that of ``g_1``:

    o ← g_1, x ← v;  for j = 2 .. m:  t = oᵀ g_j,  x ← x - (xᵀ g_j) / (m + t) o,  o ← o m / (m + t)

so its step is ``v + c g_1``, whatever the other examples are. ``hessian = "public"`` computes it.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.edit_effect import relative_change, retain_accuracies
from jaxunlearn.methods.per_example import (
    ExampleLoss,
    Products,
    gradient_products,
    label_loss,
    weighted_gradient,
)
from jaxunlearn.methods.phases import retained

Hessian = Literal["exact", "public"]
NEEDS = frozenset({"forget", "retain"})
SCOPES = frozenset({"class", "classes", "samples"})


@dataclass(frozen=True)
class InfluenceConfig:
    """Settings of influence unlearning.

    Attributes:
      alpha: α, length of the step; 1 is the Newton step.
      damping: λ of the exact Hessian.
      samples: m, retain examples in the Hessian, drawn once; 0 leaves ``H = λ I``.
      hessian: ``"exact"``, or ``"public"``: what the published code computes.
      max_change: a step that is longer than this share of all weights is an error.
      batch_size: examples whose gradients are in memory at once, twice.
    """

    alpha: float = 1.0
    damping: float = 0.01
    samples: int = 1000
    hessian: Hessian = "exact"
    max_change: float = 0.5
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.hessian not in get_args(Hessian):
            raise ValueError(f"hessian = {self.hessian!r}: write one of {get_args(Hessian)}")
        wanted = {
            "above 0": (("damping", "max_change"), lambda x: x > 0),
            "at least 0": (("alpha", "samples"), lambda x: x >= 0),
            "at least 1": (("batch_size",), lambda x: x >= 1),
        }
        for what, (names, holds) in wanted.items():
            for name in names:
                if not holds(getattr(self, name)):
                    raise ValueError(f"{name} = {getattr(self, name)!r}: wanted {what}")


def influence(
    key: PRNGKeyArray, problem: UnlearningProblem, config: InfluenceConfig | None = None
) -> Unlearned:
    """One step of influence functions, away from the forget data.

    A backward pass over all data, ``s (s + 1) / 2`` over batches of the m examples if they fill
    ``s`` of them, and one more over these.

    Args:
      key: the m examples; nothing else is random.
      problem: model and data; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, and ``info``: ``relative_change``, the length of the step over that of the weights;
      ``retain_accuracy`` before and after; ``notes`` if the model collapsed; counts ``steps`` (1),
      ``forget_passes`` and ``retain_passes``.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem`; the step is longer than
        ``max_change``, so that a quadratic model of the loss says nothing about its end.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxunlearn.models import build
      >>> model, x = build("mlp", features=(8,), num_classes=3), jnp.eye(6)
      >>> problem = UnlearningProblem(
      ...     apply_fn=model.apply,
      ...     variables=model.init(jax.random.key(0), x),
      ...     forget=Batches(x[:2], jnp.array([0, 0]), 2),
      ...     retain=Batches(x[2:], jnp.array([1, 2, 1, 2]), 4),
      ...     num_classes=3,
      ...     forget_classes=(0,),
      ... )
      >>> info = influence(jax.random.key(1), problem, InfluenceConfig(damping=1.0)).info
      >>> 0 < info["relative_change"] < 0.5
      True
    """
    config = config or InfluenceConfig()
    check_problem(problem, method="influence", needs=NEEDS, scopes=SCOPES)
    retain = retained(key, problem, 1.0, config.batch_size)
    forget = problem.forget.with_batch_size(config.batch_size)
    loss = ExampleLoss(problem.apply_fn, label_loss)
    v = _direction(problem, loss, forget, retain)
    m = min(config.samples, retain.num_examples)
    step = _solved(problem, loss, retain.sample(key, m), v, config) if m else _scaled(v, config)
    before = problem.variables["params"]
    after = _stepped(before, step, np.float32(config.alpha))
    change = relative_change(before, after)
    if not change <= config.max_change:
        raise ValueError(
            f"influence: the step is {change:.3g} times as long as all weights together, and no "
            f"step above max_change = {config.max_change} can be trusted; lower alpha = "
            f"{config.alpha}" + _or_damp(config)
        )
    variables = {**problem.variables, "params": after}
    info = {"relative_change": change}
    info |= retain_accuracies(problem, retain, variables, f"lower alpha{_or_damp(config)}")
    counts = {"steps": 1, "forget_passes": 1.0, "retain_passes": _passes(m, retain, config)}
    return Unlearned(variables, info | counts)


def woodbury_weights(products: Products, damping: float) -> Float[np.ndarray, " m"]:
    """``w`` of ``H⁻¹ v = (v - G w) / λ``, in float64 on the host.

    ``(m λ I + GᵀG) w = Gᵀ v``; ``O(m³)``.

    Args:
      products: ``GᵀG`` and ``Gᵀv``.
      damping: λ.

    Examples:
      >>> products = Products(np.array([[1.0]]), np.array([2.0]))  # g = 1, v = 2
      >>> w = woodbury_weights(products, damping=1.0)
      >>> float((2 - w[0]) / 1.0)  # v / (λ + g²)
      1.0
    """
    m = len(products.along)
    return np.linalg.solve(products.gram + m * damping * np.eye(m), products.along)


def public_weight(products: Products) -> float:
    """``c`` of ``v + c g_1``, what the published recursion returns.

    Args:
      products: ``GᵀG`` and ``Gᵀv``.

    Examples:
      >>> float(public_weight(Products(np.ones((2, 2)), np.array([3.0, 3.0]))))
      -1.0
    """
    (gram, along), m = products, len(products.along)
    size, c = 1.0, 0.0
    for j in range(1, m):
        t = size * gram[0, j]
        c -= (along[j] + c * gram[0, j]) / (m + t) * size
        size *= m / (m + t)
    return c


def _direction(
    problem: UnlearningProblem, loss: ExampleLoss, forget: Batches, retain: Batches
) -> Any:
    """``v``: what the mean loss of all data has more than that of the retain data, as gradients."""
    share = forget.num_examples / (forget.num_examples + retain.num_examples)
    gone, kept = (
        weighted_gradient(loss, problem.variables, part, mesh=problem.mesh)
        for part in (forget, retain)
    )
    return _difference(gone, kept, np.float32(share))


def _solved(
    problem: UnlearningProblem, loss: ExampleLoss, sample: Batches, v: Any, config: InfluenceConfig
) -> Any:
    """``H⁻¹ v``, or what the published code has for it."""
    products = gradient_products(loss, problem.variables, sample, v)
    if config.hessian == "public":
        weights = np.zeros(sample.num_examples)
        weights[0] = public_weight(products)
        divisor = 1.0
    else:
        weights, divisor = -woodbury_weights(products, config.damping), config.damping
    along = weighted_gradient(loss, problem.variables, sample, weights, mesh=problem.mesh)
    return _sum(v, along, np.float32(divisor))


def _scaled(v: Any, config: InfluenceConfig) -> Any:
    divisor = 1.0 if config.hessian == "public" else config.damping
    return _sum(v, jax.tree.map(lambda leaf: 0 * leaf, v), np.float32(divisor))


def _or_damp(config: InfluenceConfig) -> str:
    return "" if config.hessian == "public" else f" or raise damping = {config.damping}"


def _passes(m: int, retain: Batches, config: InfluenceConfig) -> float:
    """Passes over the retain data: gradients of the mean, of pairs of batches, of the sum."""
    blocks = -(-m // config.batch_size)
    pairs = (blocks + 1) / 2 + 1 if m else 0.0
    return 1.0 + pairs * m / retain.num_examples


@jax.jit
def _difference(gone: Any, kept: Any, share: Any) -> Any:
    return jax.tree.map(lambda f, r: share * (f - r), gone, kept)


@jax.jit
def _sum(v: Any, along: Any, divisor: Any) -> Any:
    return jax.tree.map(lambda a, b: (a + b) / divisor, v, along)


@jax.jit
def _stepped(params: Any, step: Any, alpha: Float[Array, ""]) -> Any:
    return jax.tree.map(lambda p, s: (p + alpha * s).astype(p.dtype), params, step)
