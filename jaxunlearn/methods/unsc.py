"""UNSC: unlearning via null-space calibration (Chen et al., IJCAI 2024, arXiv:2404.13588).

Every forget example is relabelled with the best remaining class of the original model, and the
model is fine-tuned on the forget data alone, while weights move only in directions to which the
retained data are blind. For a layer with retained input rows ``X``, kernel ``K`` and an orthonormal
basis ``S`` of the rows' leading directions,

    ỹ = argmax_{c ∉ C_f} f(x; θ_o)_c                 pseudo label, by the frozen original
    K <- K - η (I - S Sᵀ) ∇_K CE(f(x; θ), ỹ)          projected step on forget data

Since ``X S⊥ ≈ 0``, the layer's output on retained data stays, hence the next layer's input, and by
induction the whole model's output (Theorem 1). That takes everything but kernels frozen (biases,
norms and their statistics), inference mode, and a projection that comes last.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.epochs import epoch_inputs, run_epoch
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.layers import LayerSpec, path_name
from jaxunlearn.methods.base import (
    Unlearned,
    UnlearningProblem,
    all_finite,
    check_problem,
    stored_classes,
    stored_grams,
)
from jaxunlearn.methods.diagnostics import projection_figures
from jaxunlearn.methods.dropout import check_dropout, with_dropout
from jaxunlearn.methods.labels import excluded_classes, pseudo_label, pseudo_labels, random_label
from jaxunlearn.methods.subspaces import Grams, RetainedSpace, retained_spaces
from jaxunlearn.methods.unsc_config import UNSCConfig
from jaxunlearn.projectors import SpectralProjector
from jaxunlearn.sharding import replicate, unreplicate
from jaxunlearn.steps import Relabel, TrainState, train_step
from jaxunlearn.training import accuracy
from jaxunlearn.transforms import mask_updates, project_updates

NEEDS = frozenset({"forget", "retain"})
SCOPES = frozenset({"class", "classes", "samples"})


def unsc(
    key: PRNGKeyArray, problem: UnlearningProblem, config: UNSCConfig | None = None
) -> Unlearned:
    """Unlearn classes or samples by projected fine-tuning on pseudo labels.

    One forward pass over ``images_per_class`` retain examples of each class, one ``eigh`` per layer
    and class, then ``epochs`` passes over the forget data; retain data are not read after that.

    Args:
      key: subspace images, batch order, augmentation.
      problem: model and data; scopes class, classes and samples. For samples (an extension to the
        paper) the subspace is that of all classes, and only a sample's own label is excluded.
      config: settings.

    Returns:
      Variables in which only kernels of linear layers changed, and ``info``: per layer ``d_in``,
      ``rank``, ``energy`` (share of the retained trace inside the protected space), ``leak``
      (``‖SᵀΔK‖/‖ΔK‖``) and ``drift`` (``‖XΔK‖/‖XK‖`` on the retained rows, original inputs); per
      epoch ``losses`` and ``forget_accuracy``; ``pseudo_labels [n]``; ``steps``.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem`; settings that do not fit the
        model: ``dropout`` without an ``nn.Dropout``, one energy or number of images too few.
      FloatingPointError: the loss or a weight is no longer finite.
    """
    config = config or UNSCConfig()
    check_problem(problem, method="unsc", needs=NEEDS, scopes=SCOPES)
    specs = layers_to_project(problem, config)
    collect_key, order_key, step_key = jax.random.split(key, 3)
    spaces: dict[str, RetainedSpace] = {}
    if config.project:
        spaces = retained_spaces(
            class_grams(collect_key, problem, specs, config),
            builder=config.builder,
            energy=config.class_energy,
            merge_energy=config.merge_energy,
            rule=config.rank_rule,
            solver=config.solver,
        )
    projectors = {path: space.projector for path, space in spaces.items()}
    optimizer = optax.chain(_base_optimizer(config), _restrict(problem, specs, projectors))
    labels = pseudo_labels(problem)
    forget = problem.forget.with_batch_size(config.batch_size)
    variables, curves = _finetune(order_key, step_key, problem, forget, labels, config, optimizer)
    if spaces:
        params = problem.variables["params"], variables["params"]
        params = _project_change(tuple(specs.values()), projectors, *params)
        variables = {**variables, "params": params}
    info = curves | {
        "steps": len(curves["losses"]) * len(forget),
        "forget_passes": len(curves["losses"]),
        "pseudo_labels": np.asarray(labels),
        "layers": projection_figures(specs, spaces, problem.variables, variables) if spaces else {},
    }
    return Unlearned(variables, info)


def layers_to_project(problem: UnlearningProblem, config: UNSCConfig) -> dict[str, LayerSpec]:
    """The layers of the model; refuses settings that do not fit it. Traces, computes nothing."""
    if isinstance(config.energy, tuple) and len(config.energy) != problem.num_classes:
        raise ValueError(
            f"energy has {len(config.energy)} entries for {problem.num_classes} classes; write one "
            "per class, or one number"
        )
    if config.dropout:
        check_dropout(problem.apply_fn, problem.variables, problem.forget.inputs[:1])
    specs = describe_layers(problem.apply_fn, problem.variables, problem.forget.inputs[:1])
    if config.images_per_layer and len(config.images_per_layer) != len(specs):
        raise ValueError(
            f"images_per_layer has {len(config.images_per_layer)} entries for {len(specs)} layers: "
            f"{list(specs)}"
        )
    return specs


def class_grams(
    key: PRNGKeyArray,
    problem: UnlearningProblem,
    specs: Mapping[str, LayerSpec],
    config: UNSCConfig,
) -> Iterator[tuple[int, Grams]]:
    """``(class, {path: Gram})`` of the retained classes in increasing order (Algorithm 1)."""
    if problem.grams is not None:
        for k in stored_classes(problem):
            if k not in problem.forget_classes:
                yield k, {p: state.gram for p, state in stored_grams(problem, k, specs).items()}
        return
    assert problem.retain is not None  # check_problem
    counts = config.images_per_layer or (config.images_per_class,) * len(specs)
    readers = {
        count: layer_inputs(
            problem.apply_fn,
            {p: s for (p, s), c in zip(specs.items(), counts, strict=True) if c == count},
        )
        for count in dict.fromkeys(counts)
    }
    size = min(problem.retain.batch_size, config.images_per_class or problem.retain.batch_size)
    for k in np.unique(problem.retain.labels).tolist():
        draw_key, augment_key = jax.random.split(jax.random.fold_in(key, k))
        images = problem.retain.of_class(k).sample(draw_key, config.images_per_class)
        if config.augment_subspace and problem.augment is not None:
            views = problem.augment(augment_key, images.inputs)
            images = Batches(views, images.labels, images.batch_size)
        grams: Grams = {}
        for count, reader in readers.items():
            first = images.select(np.arange(min(count or images.num_examples, images.num_examples)))
            states = accumulate_gram(
                reader,
                problem.variables,
                first.with_batch_size(size),
                patches=config.patches,
                mesh=problem.mesh,
            )
            grams |= {path: state.gram for path, state in states.items()}
        yield k, {path: grams[path] for path in specs}


def _base_optimizer(config: UNSCConfig) -> optax.GradientTransformation:
    if config.optimizer == "adam":
        return optax.adam(config.learning_rate)
    return optax.sgd(config.learning_rate, momentum=config.momentum or None)


def _restrict(
    problem: UnlearningProblem,
    specs: Mapping[str, LayerSpec],
    projectors: Mapping[str, SpectralProjector],
) -> optax.GradientTransformation:
    """Updates of kernels into the retained null spaces; without these, of kernels as they are."""
    if projectors:
        return project_updates(projectors, specs, complement=True)
    kernels = {spec.kernel_path for spec in specs.values()}

    def keep(path: tuple, leaf: Array) -> Array:
        return jnp.asarray(path_name(path) in kernels, leaf.dtype)

    return mask_updates(jax.tree.map_with_path(keep, problem.variables["params"]))


def _finetune(
    order_key: PRNGKeyArray,
    step_key: PRNGKeyArray,
    problem: UnlearningProblem,
    forget: Batches,
    labels: Int[Array, " n"],
    config: UNSCConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[Mapping[str, Any], dict[str, list[float]]]:
    """Algorithm 2: projected steps on the relabelled forget data."""
    augment = problem.augment if config.augment else None
    # Labels of clean images never change, so they are computed once; those of augmented or random
    # ones are made per batch from the true labels.
    cached = config.labels == "pseudo" and augment is None
    step = train_step(
        with_dropout(problem.apply_fn) if config.dropout else problem.apply_fn,
        optimizer,
        train=config.dropout,
        augment=augment,
        relabel=None if cached else _relabeller(problem, config),
    )
    consts = {
        "inputs": forget.inputs,
        "labels": labels if cached else forget.labels,
        "key": step_key,
        "teacher": None if cached else problem.variables,
    }
    state = TrainState(dict(problem.variables), optimizer.init(problem.variables["params"]))
    consts, state = replicate(problem.mesh, (consts, state))
    losses, accuracies = [], []
    for epoch in range(config.epochs):
        xs = epoch_inputs(order_key, forget.num_examples, forget.batch_size, epoch)
        state, metrics = run_epoch(step, consts, state, xs, mesh=problem.mesh)
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"unsc: the loss is {metrics['loss']} in epoch {epoch + 1}: lower learning_rate"
            )
        losses.append(metrics["loss"])
        accuracies.append(accuracy(problem.apply_fn, state.variables, forget, mesh=problem.mesh))
        if config.stop_below is not None and accuracies[-1] < config.stop_below:
            break
    variables = unreplicate(problem.mesh, state.variables)
    if not all_finite(variables):
        raise FloatingPointError("unsc: the last step overflowed the weights: lower learning_rate")
    return variables, {"losses": losses, "forget_accuracy": accuracies}


@partial(jax.jit, static_argnums=0)
def _project_change(
    specs: tuple[LayerSpec, ...],
    projectors: Mapping[str, SpectralProjector],
    before: optax.Params,
    after: optax.Params,
) -> optax.Params:
    """``K_o + (I - P)(K_u - K_o)``.

    Most of a gradient lies in the retained space, so a projected step, though exact to 1e-7 of the
    gradient, may be 1e-5 of itself inside. The sum of all steps is not; projecting it again helps.
    """
    link = project_updates(projectors, {spec.path: spec for spec in specs}, complement=True)
    change, _ = link.update(jax.tree.map(jnp.subtract, after, before), link.init(before))
    return optax.apply_updates(before, change)


def _relabeller(problem: UnlearningProblem, config: UNSCConfig) -> Relabel:
    def relabel(
        key: PRNGKeyArray, consts: Mapping[str, Any], inputs: Array, labels: Int[Array, " b"]
    ) -> Int[Array, " b"]:
        excluded = excluded_classes(labels, problem.forget_classes, problem.num_classes)
        if config.labels == "random":
            return jax.vmap(random_label)(jax.random.split(key, labels.shape[0]), excluded)
        return jax.vmap(pseudo_label)(problem.apply_fn(consts["teacher"], inputs), excluded)

    return relabel
