"""Typed run configurations: one TOML file, one result.

A table of the file is a section, a section is a frozen dataclass. What a user can get wrong is
refused before work starts: unknown keys with the nearest name, wrong types and ranges with what
came and what was wanted, keys that contradict each other. All faults of a file are reported
together, one line each, with the full dotted key.
"""

import copy
import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from jaxunlearn.evaluate_config import EvaluateConfig
from jaxunlearn.typed import typed

T = TypeVar("T")
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclass(frozen=True)
class TriggerConfig:
    """``[data.trigger]``: the square patch of scope "backdoor", and the class it stands for."""

    target: Natural = 0
    size: Positive = 4  # side in pixels, smaller than the image
    value: Annotated[float, Field(ge=0, le=1)] = 1.0  # brightness, share of the source's scale
    corner: Literal["top_left", "top_right", "bottom_left", "bottom_right"] = "bottom_right"


@dataclass(frozen=True)
class DataConfig:
    """``[data]``: the data set and what of it is to be forgotten, as ``data.split`` takes it.

    ``trigger`` belongs to scope "backdoor", as ``backdoor.plant_backdoor`` takes it.
    """

    forget: int | tuple[int, ...] | float
    source: str = "digits"
    data_dir: str | None = None
    scope: Literal["class", "classes", "samples", "random", "backdoor"] = "class"
    split_seed: Natural = 0
    mean: tuple[float, ...] | None = None  # model input = (x / scale - mean) / std; by default
    std: tuple[float, ...] | None = None  # the source's own constants
    scale: Annotated[float, Field(gt=0)] | None = None
    validation: Share = 0.0  # of the training set, for early stopping and tuning
    surrogate: str | None = None  # images of another distribution: a source, as ``source``
    trigger: TriggerConfig = field(default_factory=TriggerConfig)

    def __post_init__(self) -> None:
        _require(
            self.scope != "backdoor" or isinstance(self.forget, float),
            f'forget = {self.forget!r} with scope = "backdoor"; wanted the share of the training '
            "images that get the trigger, in (0, 1), such as 0.1",
        )
        _require(
            self.scope == "backdoor" or self.trigger == TriggerConfig(),
            f'a trigger with scope = "{self.scope}"; only scope = "backdoor" reads one: '
            "write that, or leave the trigger out",
        )


@dataclass(frozen=True)
class ModelConfig:
    """``[model]``: a network of ours by ``name``, or the user's by ``factory``; never both.

    All other keys of the table are ``options``, the arguments of the network.
    """

    name: str | None = "mlp"
    factory: str | None = None  # "package.module:function"
    options: dict[str, Any] = field(default_factory=dict)
    fast_convolutions: bool = True  # on one CPU device; False: XLA's

    def __post_init__(self) -> None:
        _require(
            (self.name is None) != (self.factory is None),
            f"name = {self.name!r} and factory = {self.factory!r}; write exactly one of them",
        )
        _require(
            self.factory is None or all(self.factory.partition(":")),
            f"factory = {self.factory!r}; write 'package.module:function'",
        )


@dataclass(frozen=True)
class TrainConfig:
    """``[train]``: SGD of the original and the retrained model, or where trained weights lie.

    ``checkpoint`` (an orbax folder) or ``weights`` (a third-party file) takes its place.
    The defaults are the recipe of the digits MLP.
    """

    epochs: Positive = 60
    batch_size: Positive = 96
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    momentum: Share = 0.9
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    warmup_epochs: Natural = 0
    milestones: tuple[Positive, ...] = ()  # epochs after warm-up where "steps" applies decay
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    patience: Positive | None = None  # epochs without validation gain; then the best weights
    crop: Natural = 0
    flip: bool = False
    checkpoint: str | None = None
    weights: str | None = None
    rules: str | None = None  # "package.module:RULES", which array of weights goes where

    def __post_init__(self) -> None:
        _require(
            self.warmup_epochs < self.epochs,
            f"warmup_epochs = {self.warmup_epochs}, wanted fewer than epochs = {self.epochs}",
        )
        _require(
            bool(self.milestones) == (self.schedule == "steps"),
            f'milestones = {list(self.milestones)} with schedule = "{self.schedule}"; '
            'schedule = "steps" needs milestones, and no other schedule reads them',
        )
        _require(
            list(self.milestones) == sorted(set(self.milestones)),
            f"milestones = {list(self.milestones)}, wanted epochs in rising order",
        )
        _require(
            self.checkpoint is None or self.weights is None,
            "checkpoint and weights exclude each other; write one of them",
        )
        _require(
            self.rules is None or (self.weights is not None and all(self.rules.partition(":"))),
            f"rules = {self.rules!r} with weights = {self.weights!r}; rules are written "
            "'package.module:RULES' and say where the arrays of a weights file go",
        )


@dataclass(frozen=True)
class RetrainConfig:
    """``[retrain]``: the reference, trained like the original but without the forget data."""

    enabled: bool = True
    checkpoint: str | None = None
    references: Positive = 1  # retrained models; the first is compared, all show what chance does

    def __post_init__(self) -> None:
        _require(
            self.references == 1 or (self.enabled and self.checkpoint is None),
            f"references = {self.references} with enabled = {self.enabled}, checkpoint = "
            f"{self.checkpoint!r}; more than one retrained model has to be trained here",
        )


@dataclass(frozen=True)
class UnlearnConfig:
    """``[unlearn]``: the method; all other keys are ``options``, those of the method's config."""

    method: str = "unsc"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig:
    """A whole run: train, retrain, unlearn, evaluate, and the folder for the report."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    retrain: RetrainConfig = field(default_factory=RetrainConfig)
    unlearn: UnlearnConfig = field(default_factory=UnlearnConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    seed: Natural = 0
    out: str = "runs/run"
    devices: Positive = 1  # that share each batch; on the CPU backend virtual ones

    def __post_init__(self) -> None:
        _require(
            self.train.patience is None or self.data.validation > 0,
            f"train.patience = {self.train.patience} needs validation data; "
            "write data.validation = 0.1, say, or leave patience out",
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's TOML file; ``out`` defaults to ``runs/<stem of the file>``.

    Args:
      path: the file.
      overrides: ``section.key=value`` with TOML values; what is no TOML is taken as a string.

    Raises:
      FileNotFoundError: no such file.
      ValueError: invalid TOML, or all faults of the content, one line each.

    Examples:
      >>> path = getfixture("tmp_path") / "toy.toml"
      >>> _ = path.write_text("data.forget = 3")
      >>> config = load_config(path, ["data.source=tfds:cifar10", "train.epochs=5"])
      >>> config.data.source, config.train.epochs, config.out
      ('tfds:cifar10', 5, 'runs/toy')
    """
    path, tables = Path(path), read_tables(path)
    try:
        return config_from_mapping(tables, overrides)
    except ValueError as error:
        raise ValueError(f"{path}:\n{indent(str(error), '  ')}") from error


def read_tables(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file, and an ``out`` after its name if they have none.

    Raises:
      FileNotFoundError: no such file.
      ValueError: invalid TOML.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted the TOML file of a run")
    try:
        return {"out": f"runs/{path.stem}"} | tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error


def config_from_mapping(mapping: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The run config that a mapping like that of a TOML file describes.

    Examples:
      >>> config_from_mapping({"data": {"forget": 3}, "unlearn": {"energy": 0.9}}).unlearn
      UnlearnConfig(method='unsc', options={'energy': 0.9})
    """
    tables = copy.deepcopy(dict(mapping))
    for override in overrides:
        apply_override(override, tables)
    for section, kind in (("model", ModelConfig), ("unlearn", UnlearnConfig)):
        named = {field.name for field in dataclasses.fields(kind)} - {"options"}
        if isinstance(table := tables.get(section), dict):
            options = {key: table.pop(key) for key in list(table) if key not in named}
            tables[section] = table | {"options": options}
            if table.get("factory") is not None:  # the default network gives way to the user's
                tables[section].setdefault("name", None)
    return typed(RunConfig, tables, where="")


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The JSON-able mapping from which ``config_from_mapping`` gives the same config again.

    Examples:
      >>> config = config_from_mapping({"data": {"forget": [1, 3], "scope": "classes"}})
      >>> config_from_mapping(to_mapping(config)) == config
      True
    """
    tables = json.loads(json.dumps(dataclasses.asdict(config)))
    for section in ("model", "unlearn"):
        tables[section] |= tables[section].pop("options")
    return tables


def fingerprint(mapping: Mapping[str, Any]) -> str:
    """Twelve hex digits that name a mapping's content, whatever the order of its keys.

    Examples:
      >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
      True
    """
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:12]


def apply_override(override: str, tables: dict[str, Any]) -> None:
    """Set one key of nested tables in place, as ``section.key=value`` says."""
    key, _, text = override.partition("=")
    *sections, name = key.strip().split(".")
    _require(
        bool(name and text), f"override {override!r}: write section.key=value, e.g. train.epochs=10"
    )
    for section in sections:
        tables = tables.setdefault(section, {})
        _require(isinstance(tables, dict), f"override {override!r}: {section} is not a table")
    try:
        tables[name] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        tables[name] = text.strip()
