"""Forget vectors: one perturbation of all inputs, and no change of weights (arXiv:2412.16780).

A tensor δ of the shape of an input is added to every input of the frozen model, so that it fails on
the forget data and works on the rest. With margin ``m = l_y - max_{c≠y} l_c`` of ``l = f(x + δ)``,
each step descends on

    L(δ) = ( α Σ_retain cross-entropy + β Σ_forget max(m, -τ) + λ ‖δ‖ ) / n

with ``x`` from both sets in one shuffled stream, pixels in [0, 1], before the model's own
normalisation. :mod:`jaxunlearn.methods.forget_vectors_losses` has the other form of the objective.
Vectors of several forget sets are learned together (:func:`learn_forget_vectors`); a new request
can be answered by a weighted sum of given ones (:mod:`jaxunlearn.methods.forget_vectors_compose`),
and with ``bank = "classes"`` it is (:mod:`jaxunlearn.methods.forget_vectors_bank`).

What this is not: whoever calls the model without δ gets the original; retained inputs carry δ too;
a random set of samples cannot be told from the rest by one δ for all. It suppresses at the input,
and erases nothing.

Defaults are those of the reference code (Sun et al.), but for its choice of β and epoch by class
from evaluation data: β is one number, or chosen from a grid by training data alone.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.forget_vectors_bank import Answer, answer_from_bank
from jaxunlearn.methods.forget_vectors_checks import NEEDS, SCOPES, check_inputs
from jaxunlearn.methods.forget_vectors_config import ForgetVectorsConfig
from jaxunlearn.methods.forget_vectors_effect import chosen, effect, random_set_note
from jaxunlearn.methods.forget_vectors_learn import epoch_rows, learn_forget_vectors
from jaxunlearn.methods.forget_vectors_losses import paper_weights
from jaxunlearn.methods.forget_vectors_run import own_flags, share_of


def forget_vectors(
    key: PRNGKeyArray,
    problem: UnlearningProblem,
    config: ForgetVectorsConfig | None = None,
) -> Unlearned:
    """Learn the vector of a problem, or (``bank = "classes"``) add it up from vectors of classes.

    ``epochs`` passes over all data for each β, and for each class of a bank, forward and backward
    to the inputs; no gradient of weights. The model runs in inference mode.

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
      ``retain_passes``; ``notes``. With a bank also what :func:`answer_from_bank` says.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem` and :func:`check_inputs`.
      FloatingPointError: a loss or a vector is no longer finite.

    Examples:
      >>> import jax
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
    problem = share_of(problem, config.data_fraction, key)
    found = (_learned if config.bank == "none" else answer_from_bank)(key, problem, config)
    delta, judged = found.delta, found.judged
    passes, size = config.epochs * found.descents, own_flags(problem).size
    info = {
        **found.info,
        "with_vector": judged.figures(found.at),
        "without_vector": judged.figures(-1),
        "norm_l2": float(jnp.linalg.norm(delta.ravel())),
        "norm_linf": float(jnp.max(jnp.abs(delta))),
        "outside": float(judged.outside[found.at]),
        **_paper_form(config, found.info["beta"], problem),
        "steps": passes * -(-size // config.batch_size),
        "forget_passes": passes * config.data_fraction,
        "retain_passes": passes * config.data_fraction,
        "notes": found.notes,
    }
    return Unlearned({**problem.variables, "guard": {"delta": delta}}, info)


def _learned(key: PRNGKeyArray, problem: UnlearningProblem, config: ForgetVectorsConfig) -> Answer:
    """A vector of the request's own, the best of the grid."""
    flags, betas = own_flags(problem), np.array(config.betas)
    repeated = np.repeat(flags, len(betas), axis=0)
    grid = betas if len(betas) > 1 else None
    found = learn_forget_vectors(key, problem, repeated, config, grid)
    deltas = jnp.concatenate([found.deltas, jnp.zeros_like(found.deltas[:1])])
    judged = effect(problem, deltas, np.repeat(flags, len(deltas), axis=0), config)
    best, figures, notes = chosen(config, judged)
    history = {name: values[best] for name, values in found.history.items()}
    info = {"epochs": epoch_rows(history), **figures}
    notes += random_set_note(problem)
    return Answer(found.deltas[best], judged, best, info, len(betas), notes)


def _paper_form(
    config: ForgetVectorsConfig, beta: float | None, problem: UnlearningProblem
) -> dict[str, float | None]:
    """λ₁ and the coefficient of the norm in the form of the paper, whatever form was used."""
    assert problem.retain is not None
    if config.composition == "sum":  # nothing was learned for the request
        return {"lambda_1": None, "norm_coefficient": None}
    if beta is None:  # the paper's form
        retain, norm = config.paper_retain_weight, config.paper_norm_weight
    else:
        if config.bank != "none":  # the norm of w, which no batch divides
            config = replace(config, batch_size=1)
        sizes = problem.forget.num_examples, problem.retain.num_examples
        retain, norm, *_ = paper_weights(config, beta, *sizes)
    return {"lambda_1": retain, "norm_coefficient": norm}
