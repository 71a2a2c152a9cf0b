"""Unlearning by dimensional alignment (after Seo, Kim and Han, WACV 2025, arXiv:2407.17710).

In a retrained model the features of forgotten samples lie in the space that the retained features
span; in the original model a forgotten class has a direction of its own. Each epoch moves them
there without wrong labels, and then recovers. With features ``z`` (the input of the last dense
layer), logits ``l`` and ``P`` the projector on the leading eigenspace of the retain features,

    t = softmax(l without the forgotten classes)               the model's own opinion, a constant
    L_forget = mean(-Σ t log softmax(l)) + λ (1 - mean(‖P z‖ / ‖z‖))               on forget data
    L_recover = mean cross-entropy                                                 on retain data

``P`` is a constant too, refreshed at the start of each epoch: nothing is differentiated through an
eigendecomposition, whose gradient is huge where eigenvalues are close.

Reconstructed from the abstract and public summaries of arXiv:2407.17710; formulas and defaults are
jaxunlearn's. The paper's equations, settings and tables are not known to us.
"""

from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from jaxunlearn.activations import with_features
from jaxunlearn.capture import describe_layers
from jaxunlearn.layers import LayerSpec
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.dimensional_alignment_config import DimensionalAlignmentConfig
from jaxunlearn.methods.dimensional_alignment_run import Run, average
from jaxunlearn.methods.phases import check_losses, check_trains
from jaxunlearn.sharding import replicate, unreplicate

NEEDS = frozenset({"forget", "retain"})
SCOPES = frozenset({"class", "classes", "samples"})


def dimensional_alignment(
    key: PRNGKeyArray,
    problem: UnlearningProblem,
    config: DimensionalAlignmentConfig | None = None,
) -> Unlearned:
    """Unlearn by moving the features of forget data into the space of the retained ones.

    ``epochs`` passes over the forget and the retain data. For ``d`` features each epoch costs one
    more forward pass over ``max(2048, 20 d)`` retain images and over the forget data, and one
    ``eigh`` of ``[d, d]``.

    Args:
      key: subsets, batch order, augmentation, dropout.
      problem: model and data; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, and ``info``: ``epochs``, for the original (0) and after each epoch
      ``forget_accuracy``, ``alignment`` of the forget data, ``rank``, ``held_out_alignment`` and
      the mean losses; ``steps``, ``forget_passes``, ``retain_passes``.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem` and :func:`check_features`.
      FloatingPointError: a loss or a weight is no longer finite.

    Examples:
      >>> import jax.numpy as jnp
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
      >>> settings = DimensionalAlignmentConfig(rank=2, epochs=5, learning_rate=0.1)
      >>> epochs = dimensional_alignment(jax.random.key(1), problem, settings).info["epochs"]
      >>> epochs[-1]["alignment"] > epochs[0]["alignment"]
      True
    """
    config = config or DimensionalAlignmentConfig()
    check_problem(problem, method="dimensional_alignment", needs=NEEDS, scopes=SCOPES)
    run = Run.prepare(key, problem, config, *check_features(problem, config))
    state = run.start()
    teacher = replicate(problem.mesh, state.variables)
    projector, figures = run.measure(state.variables)
    rows: list[dict[str, Any]] = [{"epoch": 0, **figures}]
    while len(rows) <= config.epochs and not run.reached(rows[-1]):
        epoch = len(rows)
        state, losses = run.epoch(epoch - 1, run.consts(projector, teacher), state)
        check_losses("dimensional_alignment", epoch - 1, state, **losses)
        latest, figures = run.measure(state.variables)
        projector = projector if config.basis == "frozen" else latest
        rows.append({"epoch": epoch, **figures, **losses})
        if config.teacher == "ema":
            teacher = average(config.ema_decay, teacher, state.variables)
    variables = unreplicate(problem.mesh, state.variables)
    return Unlearned(variables, {"epochs": rows, **run.costs(len(rows) - 1)})


def check_features(
    problem: UnlearningProblem, config: DimensionalAlignmentConfig
) -> tuple[dict[str, LayerSpec], int]:
    """Layers of the model and number of its features. Traces, computes nothing.

    Raises:
      ValueError: no retain batches; a model that has no train mode; ``stop = "blind"`` without
        held-out images; no layer to read features from, or not one that ``layer`` names; a rank
        above their number.
    """
    if problem.retain is None:
        raise ValueError("dimensional_alignment trains on retain data: pass retain=Batches(...)")
    if config.stop == "blind" and problem.held_out is None:
        raise ValueError(
            'stop = "blind" needs retained images that the model was not trained on: pass '
            "held_out=Batches(...); in a config write data.validation = 0.1, say"
        )
    check_trains(problem)
    inputs = problem.forget.inputs[:1]
    specs = describe_layers(problem.apply_fn, problem.variables, inputs)
    forward = with_features(problem.apply_fn, specs, config.layer)
    _, z = jax.eval_shape(lambda v, x: forward(v, x), problem.variables, inputs)
    if config.rank is not None and config.rank > z.shape[1]:
        raise ValueError(f"rank = {config.rank}: the model has {z.shape[1]} features")
    return specs, z.shape[1]
