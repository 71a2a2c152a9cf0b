"""Forget vectors: one perturbation of all inputs, and no change of weights (arXiv:2412.16780).

A tensor δ of the shape of an input is added to every input of the frozen model, so that it fails on
the forget data and works on the rest. With margin ``m = l_y - max_{c≠y} l_c`` of ``l = f(x + δ)``,
each step descends on

    L(δ) = ( α Σ_retain cross-entropy + β Σ_forget max(m, -τ) + λ ‖δ‖ ) / n

with ``x`` from both sets in one shuffled stream, pixels in [0, 1], before the model's own
normalisation. :mod:`jaxunlearn.methods.forget_vectors_losses` has the other form of the objective.
Vectors of several forget sets are learned together (:func:`learn_forget_vectors`); a new request
can be answered by a weighted sum of given ones (:mod:`jaxunlearn.methods.forget_vectors_compose`).

What this is not: whoever calls the model without δ gets the original; retained inputs carry δ too;
a random set of samples cannot be told from the rest by one δ for all. It suppresses at the input,
and erases nothing.

Defaults are those of the reference code (Sun et al.), but for its choice of β and epoch by class
from evaluation data: β is one number, or chosen from a grid by training data alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.forget_vectors_checks import check_inputs, checked_betas, checked_flags
from jaxunlearn.methods.forget_vectors_config import ForgetVectorsConfig
from jaxunlearn.methods.forget_vectors_effect import chosen, effect, random_set_note
from jaxunlearn.methods.forget_vectors_losses import paper_weights
from jaxunlearn.methods.forget_vectors_run import descend, own_flags, starts

NEEDS = frozenset({"forget", "retain"})
SCOPES = frozenset({"class", "classes", "samples"})


class ForgetVectors(NamedTuple):
    """Vectors of K forget sets.

    Attributes:
      deltas: ``[K, *input]``, in pixels of [0, 1].
      history: ``loss``, ``forget``, ``retain`` and ``norm``, ``[K, epochs]`` each.
    """

    deltas: Float[Array, "K ..."]
    history: dict[str, np.ndarray]


def forget_vectors(
    key: PRNGKeyArray,
    problem: UnlearningProblem,
    config: ForgetVectorsConfig | None = None,
) -> Unlearned:
    """Learn the vector of a problem.

    ``epochs`` passes over all data for each β, forward and backward to the inputs; no gradient of
    weights. The model runs in inference mode.

    Args:
      key: start, batch order, augmentation.
      problem: model and data; scopes class, classes and samples. Its ``pixel_scale`` says what
        stored inputs are in pixels of [0, 1].
      config: settings.

    Returns:
      The variables as they were, and a collection ``{"guard": {"delta": δ}}``. ``info``: ``epochs``
      with the mean losses; ``beta`` and its ``grid``; ``with_vector`` and ``without_vector``, error
      on the forget data (UA), accuracy on the retain data (RA) and their sum, on training data;
      ``norm_l2``, ``norm_linf``; ``outside``, share of pixels of ``x + δ`` outside [0, 1];
      ``lambda_1`` and ``norm_coefficient`` of the paper's form; ``steps``, ``forget_passes``,
      ``retain_passes``; ``notes``.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem` and :func:`check_inputs`.
      FloatingPointError: a loss or a vector is no longer finite.

    Examples:
      >>> from jaxunlearn.batches import Batches
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
      >>> unlearned = forget_vectors(jax.random.key(1), problem)
      >>> unlearned.variables["guard"]["delta"].shape
      (6,)
      >>> unlearned.info["with_vector"]["forget_error"]
      1.0
    """
    config = config or ForgetVectorsConfig()
    check_problem(problem, method="forget_vectors", needs=NEEDS, scopes=SCOPES)
    check_inputs(problem, config)
    flags, betas = own_flags(problem), np.array(config.betas)
    repeated = np.repeat(flags, len(betas), axis=0)
    grid = betas if len(betas) > 1 else None
    found = learn_forget_vectors(key, problem, repeated, config, grid)
    deltas = jnp.concatenate([found.deltas, jnp.zeros_like(found.deltas[:1])])
    judged = effect(problem, deltas, np.repeat(flags, len(deltas), axis=0), config)
    best, figures, notes = chosen(config, judged)
    delta = found.deltas[best]
    passes = config.epochs * len(betas)
    info = {
        "epochs": _rows(found.history, best),
        **figures,
        "with_vector": judged.figures(best),
        "without_vector": judged.figures(-1),
        "norm_l2": float(jnp.linalg.norm(delta.ravel())),
        "norm_linf": float(jnp.max(jnp.abs(delta))),
        "outside": float(judged.outside[best]),
        **_paper_form(config, float(betas[best]), problem),
        "steps": passes * -(-flags.size // config.batch_size),
        "forget_passes": passes,
        "retain_passes": passes,
        "notes": notes + random_set_note(problem),
    }
    return Unlearned({**problem.variables, "guard": {"delta": delta}}, info)


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


def _rows(history: dict[str, np.ndarray], k: int) -> list[dict[str, int | float]]:
    """Losses of one vector, by epoch."""
    names = {"loss": "loss", "forget": "loss_forget", "retain": "loss_retain", "norm": "norm"}
    return [
        {"epoch": epoch + 1, **{new: float(history[old][k, epoch]) for old, new in names.items()}}
        for epoch in range(history["loss"].shape[1])
    ]


def _paper_form(
    config: ForgetVectorsConfig, beta: float, problem: UnlearningProblem
) -> dict[str, float]:
    """λ₁ and the coefficient of the norm in the form of the paper, whatever form was used."""
    assert problem.retain is not None
    if config.objective == "paper":
        retain, norm = config.paper_retain_weight, config.paper_norm_weight
    else:
        sizes = problem.forget.num_examples, problem.retain.num_examples
        retain, norm, *_ = paper_weights(config, beta, *sizes)
    return {"lambda_1": retain, "norm_coefficient": norm}
