"""``[evaluate]`` of a run's file: what is measured of the models, and how."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class RepresentationConfig:
    """``[evaluate.representation]``: what is read from features, and how alignment is defined."""

    enabled: bool = True
    layer: str | None = None  # module whose output they are; None: what the head reads
    energy: Annotated[float, Field(gt=0, le=1)] = 0.95
    rank: Positive | None = None  # directions of the retain space, instead of an energy
    kind: Literal["ratio", "energy", "subspace"] = "ratio"
    center: bool = False
    feature_norm: Literal["l2"] | None = None
    profile: bool = False  # alignment of every layer: one more pass over forget and retain data


@dataclass(frozen=True)
class ShiftsConfig:
    """``[evaluate.shifts]``: the models on shifted copies of the images."""

    enabled: bool = False
    max_images: Positive = 2000  # of each split, drawn by the seed


@dataclass(frozen=True)
class ContourConfig:
    """``[evaluate.contour]``: the loss between the original and the unlearned model."""

    enabled: bool = False
    energy: Annotated[float, Field(gt=0, le=1)] = 0.97  # of what a layer reads on retain data
    points: Annotated[int, Field(ge=9, le=101)] = 17  # on each of two axes
    images: Positive = 256  # of each side, drawn by the seed, for the loss


@dataclass(frozen=True)
class RelearnConfig:
    """``[evaluate.relearn]``: how soon training brings the forget data back."""

    enabled: bool = False
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    batch_size: Positive = 128
    epochs: Positive = 100  # after which it is given up
    images: Positive = 500  # drawn with replacement, per epoch
    data: Literal["all", "forget"] = "all"  # drawn from: forget and retain data, or forget alone


@dataclass(frozen=True)
class EvaluateConfig:
    """``[evaluate]``: how the models are compared."""

    retain_sample: Positive | None = None  # None: 5,000 of more than 20,000 images, else all
    batch_size: Positive = 512
    members: Literal["first", "random"] = "first"  # retain images of the membership attack
    representation: RepresentationConfig = field(default_factory=RepresentationConfig)
    shifts: ShiftsConfig = field(default_factory=ShiftsConfig)
    relearn: RelearnConfig = field(default_factory=RelearnConfig)
    contour: ContourConfig = field(default_factory=ContourConfig)
