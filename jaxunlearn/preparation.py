"""Everything of a run that is checked and loaded before work starts."""

import dataclasses
import difflib
import os
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxunlearn.activations import with_features
from jaxunlearn.backdoor import plant_backdoor
from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers
from jaxunlearn.config import RunConfig, TrainConfig, UnlearnConfig
from jaxunlearn.data import Source, Splits, split
from jaxunlearn.methods import METHODS, Method, UnlearningProblem
from jaxunlearn.methods.base import Recipe
from jaxunlearn.network import Network, build_network, given_variables
from jaxunlearn.paths import reference_data, resolve_path
from jaxunlearn.preprocessing import augmenter
from jaxunlearn.sharding import run_mesh
from jaxunlearn.shift_assessment import check_shifts
from jaxunlearn.sources import load_source
from jaxunlearn.steps import Augment, TrainState, train_step
from jaxunlearn.surrogates import surrogate_images
from jaxunlearn.training import sgd
from jaxunlearn.typed import typed


class Prepared(NamedTuple):
    """Everything of a run that is checked and loaded before work starts.

    Attributes:
      given: trained variables that the config names, by model; None where a model is to be trained.
      surrogate: images of another distribution, for methods that hold the model in place by them.
      mesh: the devices of the run; None for one.
    """

    config: RunConfig
    source: Source
    splits: Splits
    network: Network
    method: Method
    method_config: Any
    augment: Augment | None
    given: dict[str, Any]
    mesh: Mesh | None
    surrogate: np.ndarray | None


def prepare(config: RunConfig) -> Prepared:
    """Load the data, resolve the request, build the model and check every setting of a run.

    Nothing is computed or written. Given checkpoints are read, and where there is something to
    train, one step of it is traced.

    Raises:
      ValueError: anything that a configuration can get wrong.
      FileNotFoundError: data, weights or a checkpoint that is not there.

    Examples:
      >>> from jaxunlearn.config import config_from_mapping
      >>> prepared = prepare(config_from_mapping({"data": {"forget": 3}}))
      >>> len(prepared.splits.forget), prepared.method.name
      (146, 'unsc')
    """
    method, method_config = _method(config.unlearn)
    _check_files(config)
    mesh = run_mesh(config.devices)
    source, splits = _requested(config)
    network = build_network(config.model, config.data, source)
    train, retrain = config.train, config.retrain
    augment = augmenter(crop=train.crop, flip=train.flip) if train.crop or train.flip else None
    given = {
        "original": given_variables(network, config.model, train, section="train"),
        "retrained": given_variables(network, config.model, retrain, section="retrain"),
    }
    surrogate = _surrogate(config, source)
    prepared = Prepared(
        config, source, splits, network, method, method_config, augment, given, mesh, surrogate
    )
    prepared = with_method(prepared, config.unlearn)
    _check_features(prepared)
    if config.evaluate.shifts.enabled:
        scale = config.data.scale or source.scale
        check_shifts(network.apply_fn, network.template, source, scale)
    _check_training(prepared)
    return prepared


def with_method(prepared: Prepared, unlearn: UnlearnConfig) -> Prepared:
    """The same run with another method, whose settings are checked. Data and network are kept.

    Raises:
      ValueError: an unknown method, settings that it refuses or lacks, a scope that it lacks.

    Examples:
      >>> from jaxunlearn.config import config_from_mapping
      >>> prepared = prepare(config_from_mapping({"data": {"forget": 3}}))
      >>> with_method(prepared, UnlearnConfig("finetune", {"epochs": 2})).method_config.epochs
      2
    """
    method, method_config = _method(unlearn)
    config = dataclasses.replace(prepared.config, unlearn=unlearn)
    _check_scope(method, config, prepared.splits)
    if getattr(method_config, "select_on", None) == "test" and not len(prepared.splits.forget_test):
        raise ValueError(
            'unlearn.select_on = "test": forgotten samples have no test data; write "train"'
        )
    prepared = prepared._replace(config=config, method=method, method_config=method_config)
    try:
        method.check(unlearning_problem(prepared, prepared.network.template), method_config)
    except ValueError as error:
        raise ValueError(f"unlearn: {error}") from error
    return prepared


def training_batches(prepared: Prepared, rows: np.ndarray) -> Batches:
    """Rows of the train set in batches of the training's size."""
    train = prepared.source.train
    return Batches(train.inputs[rows], train.labels[rows], prepared.config.train.batch_size)


def unlearning_problem(prepared: Prepared, variables: Any) -> UnlearningProblem:
    """What a run hands to its method: the model with these variables, the data of the request."""
    splits, train, selection = prepared.splits, prepared.config.train, None
    strange = prepared.surrogate
    held_out, held_out_forget = (
        training_batches(prepared, rows) if len(rows) else None
        for rows in (retained_validation(prepared), forgotten_validation(prepared))
    )
    if getattr(prepared.method_config, "select_on", None) == "test":
        test, size = prepared.source.test, prepared.config.train.batch_size
        forget, retain = (
            Batches(test.inputs[at], test.labels[at], size)
            for at in (splits.forget_test, splits.retain_test)
        )
        selection = forget, retain
    return UnlearningProblem(
        apply_fn=prepared.network.apply_fn,
        variables=variables,
        forget=training_batches(prepared, splits.forget),
        retain=training_batches(prepared, splits.retain),
        num_classes=prepared.source.num_classes,
        forget_classes=splits.forget_classes,
        augment=prepared.augment,
        pixel_scale=prepared.config.data.scale or prepared.source.scale,
        mesh=prepared.mesh,
        held_out=held_out,
        held_out_forget=held_out_forget,
        init_fn=prepared.network.init,
        recipe=Recipe(partial(optimizer_of, train), train.epochs, train.batch_size),
        selection=selection,
        surrogate=strange
        if strange is None
        else Batches(strange, np.zeros(len(strange), np.int32), train.batch_size),
    )


def optimizer_of(config: TrainConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """The optimiser that ``[train]`` describes."""
    return sgd(
        learning_rate=config.learning_rate,
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        warmup_epochs=config.warmup_epochs,
        milestones=config.milestones,
        decay=config.decay,
    )


def retained_validation(prepared: Prepared) -> np.ndarray:
    """Validation rows of the retrained model: those of no forgotten class."""
    source, splits = prepared.source, prepared.splits
    labels = source.train.labels[splits.validation]
    return splits.validation[~np.isin(labels, splits.forget_classes)]


def forgotten_validation(prepared: Prepared) -> np.ndarray:
    """Validation rows like the forget data: those of forgotten classes, or all for samples."""
    source, splits = prepared.source, prepared.splits
    if not splits.forget_classes:
        return splits.validation
    labels = source.train.labels[splits.validation]
    return splits.validation[np.isin(labels, splits.forget_classes)]


def has_reference(config: RunConfig) -> bool:
    """Whether the run has a retrained model, trained or given."""
    return config.retrain.enabled or config.retrain.checkpoint is not None


def _method(unlearn: UnlearnConfig) -> tuple[Method, Any]:
    """The method and its settings, checked by themselves: before the data are read."""
    name = unlearn.method
    if name not in METHODS:
        nearest = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown method {name!r}; did you mean {nearest!r}? There are {', '.join(METHODS)}"
        )
    method = METHODS[name]
    return method, typed(method.config, unlearn.options, where="unlearn")


def _data_dir(config: RunConfig) -> str | None:
    """The config's or the flag's; else TFDS_DATA_DIR; else that of the reference data."""
    if config.data.data_dir is not None:
        return str(resolve_path(config.data.data_dir))
    if os.environ.get("TFDS_DATA_DIR") or (root := reference_data()) is None:
        return None
    return str(root / "data" / "tfds") if (root / "data" / "tfds").is_dir() else None


def _requested(config: RunConfig) -> tuple[Source, Splits]:
    """The data, poisoned if the request is to remove a backdoor, and the request resolved."""
    data = config.data
    source = load_source(data.source, data_dir=_data_dir(config), split_seed=data.split_seed)
    drawn: Any = {"validation": data.validation, "seed": data.split_seed}
    if data.scope != "backdoor":
        return source, split(source, scope=data.scope, forget=data.forget, **drawn)
    assert isinstance(data.forget, float)  # DataConfig
    if data.scale is not None:  # what is white, is said by the config
        source = dataclasses.replace(source, scale=data.scale)
    return plant_backdoor(source, data.trigger, share=data.forget, **drawn)


def _surrogate(config: RunConfig, source: Source) -> np.ndarray | None:
    """The images that ``data.surrogate`` names, in the form of the data."""
    if (name := config.data.surrogate) is None:
        return None
    try:
        return surrogate_images(load_source(name, data_dir=_data_dir(config)), source)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"data.surrogate: {error}") from error


def _check_files(config: RunConfig) -> None:
    """What is not there is missed before the data are read, which may take a while."""
    named = {
        "data.data_dir": config.data.data_dir,
        "train.checkpoint": config.train.checkpoint,
        "train.weights": config.train.weights,
        "retrain.checkpoint": config.retrain.checkpoint,
    }
    for key, path in named.items():
        try:
            if path is not None:
                resolve_path(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{key}: {error}") from error


def _check_scope(method: Method, config: RunConfig, splits: Splits) -> None:
    scope = {0: "samples", 1: "class"}.get(len(splits.forget_classes), "classes")
    if scope not in method.scopes:
        raise ValueError(
            f"method {method.name!r} does not support scope {scope!r}, only "
            f"{', '.join(sorted(method.scopes))}; this request has data.scope = "
            f"{config.data.scope!r} with {len(splits.forget_classes)} classes forgotten as a whole"
        )


def _check_features(prepared: Prepared) -> None:
    """Read the features that the config names from shapes alone: what it gets wrong comes up now.

    A model without layers that are known is judged by its outputs, unless a layer is asked for.
    """
    wanted, network = prepared.config.evaluate.representation, prepared.network
    inputs = prepared.source.train.inputs[:1]
    if not wanted.enabled:
        return
    try:
        specs = describe_layers(network.apply_fn, network.template, inputs)
        forward = with_features(network.apply_fn, specs, wanted.layer)
        _, z = jax.eval_shape(lambda v, x: forward(v, x), network.template, inputs)
    except ValueError as error:
        if wanted.layer is None:
            return
        raise ValueError(f"evaluate.representation.layer = {wanted.layer!r}: {error}") from error
    if wanted.rank is not None and wanted.rank > z.shape[1]:
        raise ValueError(
            f"evaluate.representation.rank = {wanted.rank}: the model has {z.shape[1]} features"
        )


def _check_training(prepared: Prepared) -> None:
    """Trace one training step, where there is something to train: what it refuses comes up now."""
    config, given, network = prepared.config, prepared.given, prepared.network
    retrains = config.retrain.enabled and given["retrained"] is None
    if retrains and config.train.patience and not len(retained_validation(prepared)):
        raise ValueError(
            f"train.patience = {config.train.patience}: all validation data are of the forgotten "
            "classes, so the retrained model has none; raise data.validation or leave patience out"
        )
    if given["original"] is not None and not retrains:
        return
    batches = training_batches(prepared, prepared.splits.train[: config.train.batch_size])
    optimizer = optimizer_of(config.train, 1)

    def step(key: jax.Array, variables: Any) -> Any:
        consts = {"inputs": batches.inputs, "labels": batches.labels, "key": key}
        indices = jnp.arange(batches.num_examples)
        x = {"indices": indices, "mask": indices >= 0, "step": jnp.int32(0)}
        state = TrainState(variables, optimizer.init(variables["params"]))
        return train_step(network.apply_fn, optimizer, augment=prepared.augment)(consts, state, x)

    try:
        jax.eval_shape(step, jax.random.key(0), network.template)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"model {config.model.name or config.model.factory} cannot be trained: {error}"
        ) from error
