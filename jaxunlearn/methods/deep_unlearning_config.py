"""Settings of Deep Unlearning."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

import numpy as np

from jaxunlearn.methods.base import UnlearningProblem, covers_retained, stored_classes

DeepPatches = Literal["exact", "crop3k"]
DeepSolver = Literal["auto", "cholesky", "dual", "eigh", "randomized"]
Selection = Literal["train", "test"]
ForgetCount = Literal["per_class", "union"]
Composition = Literal["rows", "balanced"]
_CHOICES = {
    "patches": get_args(DeepPatches),
    "solver": get_args(DeepSolver),
    "select_on": get_args(Selection),
    "forget_count": get_args(ForgetCount),
    "retain_weights": get_args(Composition),
}
Alphas = float | tuple[float, ...]


@dataclass(frozen=True)
class DeepUnlearningConfig:
    """Settings of Deep Unlearning; the defaults are those of the reference code's tuning.

    Attributes:
      alpha_retain: one number or a grid; the larger, the more of the retain space is spared.
      alpha_forget: one number or a grid; the larger, the more of the forget space is removed.
      samples: retain images (as many of each class), and forget images of each class, that the
        Grams are taken of, drawn at random; None takes all. Given Grams have theirs already.
      forget_count: of several classes: ``samples`` images of each, or of all together (``union``).
      retain_weights: ``"rows"``, or ``"balanced"``: classes count the same, whatever their Grams'
        traces.
      layer_filter: shell patterns of the layers to edit, such as ``("head",)``; None edits all.
      sequential: several classes are forgotten one after another, each from the edited weights.
      curve: also edit the first class, the first two, ..., and score each; with ``sequential`` that
        comes by itself.
      select_on: a grid is scored on training images, or on the problem's ``selection``, which the
        command line fills with test data: an upper bound, as in the reference code's tuning.
      select_images: training images that score a grid, half of them to be forgotten.
      solver: ``"auto"`` is ``"cholesky"``, and ``"dual"`` for layers with fewer rows than features
        (on one device, without given Grams, and not balanced); ``"dual"`` keeps the rows of every
        layer; ``"eigh"`` also reports the spectra; ``"randomized"`` truncates the forget side where
        that changes its projector by no more than 1 % (Cholesky for the retain side).
      patches: ``"crop3k"`` takes those of one random window of three kernels a side, padded anew,
        as the reference code does.
      max_rows: at most so many rows of a convolution or an attention layer, drawn at random
        (reference code: 10,000, before that 50,000). As there, all images are one batch, whose
        patches are held at once.
      augment_samples: augment the images that the Grams are taken of (reference code).
      stale_grams: go on with the problem's Grams after an edit, although they are of the model
        before it.
      batch_size: images per forward pass.
    """

    alpha_retain: Alphas = (10.0, 30.0, 100.0, 300.0, 1000.0)
    alpha_forget: Alphas = (1.0, 3.0, 10.0, 30.0, 100.0)
    samples: int | None = 900
    forget_count: ForgetCount = "per_class"
    retain_weights: Composition = "rows"
    layer_filter: tuple[str, ...] | None = None
    sequential: bool = False
    curve: bool = False
    select_on: Selection = "train"
    select_images: int = 10_000
    solver: DeepSolver = "auto"
    patches: DeepPatches = "exact"
    max_rows: int | None = None
    augment_samples: bool = False
    stale_grams: bool = False
    batch_size: int = 256

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: write one of {allowed}")
        for name in ("alpha_retain", "alpha_forget"):
            if not isinstance(given := getattr(self, name), int | float | tuple):
                object.__setattr__(self, name, tuple(float(alpha) for alpha in given))
            alphas = _several(getattr(self, name))
            if not alphas or not all(isfinite(alpha) and alpha > 0 for alpha in alphas):
                raise ValueError(
                    f"{name} = {getattr(self, name)}: wanted one or more positive numbers, such as "
                    "100.0 or [30.0, 100.0]"
                )
        for name in ("samples", "max_rows", "select_images", "batch_size"):
            number, least = getattr(self, name), 2 if name == "select_images" else 1
            if number is not None and number < least:
                raise ValueError(f"{name} = {number}: wanted at least {least}")
        if self.reference_rows and self.solver == "dual":
            raise ValueError(
                'patches = "crop3k" and max_rows make Grams; write solver = "cholesky" with them'
            )

        if self.retain_weights == "balanced" and self.solver == "dual":
            raise ValueError(
                'retain_weights = "balanced" adds Grams up; write solver = "cholesky" with it'
            )
        if self.solver == "randomized" and min(_several(self.alpha_forget)) < 1:
            raise ValueError(
                f'alpha_forget = {self.alpha_forget} with solver = "randomized": its bound needs 1 '
                'or more; write solver = "cholesky"'
            )

    @property
    def reference_rows(self) -> bool:
        """Whether the rows of a layer are chosen as in the reference code."""
        return self.patches == "crop3k" or self.max_rows is not None

    @property
    def grid(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Values of ``alpha_retain`` and of ``alpha_forget``."""
        return _several(self.alpha_retain), _several(self.alpha_forget)

    @property
    def searches(self) -> bool:
        """Whether there is more than one pair."""
        return max(map(len, self.grid)) > 1


def check_settings(problem: UnlearningProblem, config: DeepUnlearningConfig) -> None:
    """Refuse settings that do not fit the problem, before work starts."""
    several = len(problem.forget_classes) > 1
    scores = config.searches or (several and (config.sequential or config.curve))
    if config.select_on == "test":
        if problem.selection is None:
            raise ValueError(
                'select_on = "test" needs UnlearningProblem(selection=(forget, retain)); write '
                'select_on = "train" to choose on training data'
            )
        present = set(np.unique(problem.selection[0].labels).tolist())
        if missing := sorted(set(problem.forget_classes) - present):
            raise ValueError(f"the forget data of selection hold no example of classes {missing}")
    if scores and config.select_on == "train" and problem.retain is None:
        raise ValueError(
            "a grid of alphas and a curve are scored on retain images, of which the problem has "
            "none; write one number for alpha_retain and one for alpha_forget, or pass retain="
        )
    if (config.sequential or config.curve) and problem.forget_classes == ():
        raise ValueError("sequential and curve are for classes; the request is a set of samples")
    if problem.mesh is not None and config.solver == "dual":
        raise ValueError('solver = "dual" keeps rows, on one device; write solver = "cholesky"')
    if problem.mesh is not None and config.max_rows is not None:
        raise ValueError("max_rows draws rows on one device; leave mesh out, or max_rows")
    if config.augment_samples and problem.augment is None:
        raise ValueError(
            "augment_samples: the problem has no augmentation; pass augment=, or in a run's config "
            "write train.crop or train.flip"
        )
    if problem.grams is not None:
        _check_store(problem, config, several)


def _check_store(problem: UnlearningProblem, config: DeepUnlearningConfig, several: bool) -> None:
    if config.reference_rows or config.augment_samples or config.solver == "dual":
        raise ValueError(
            "grams are given, so patches, max_rows, augment_samples and the dual solver have no "
            "say; leave them at their defaults, or leave grams out"
        )
    if not covers_retained(problem):
        classes = stored_classes(problem)
        if "total" not in (problem.grams or {}):
            raise ValueError(
                f'grams has the classes {classes} and no "total", so that retained classes among 0 '
                f"to {problem.num_classes - 1} are missing; see accumulate_class_grams"
            )
        if config.retain_weights == "balanced" or config.sequential or config.curve:
            raise ValueError(
                'retain_weights = "balanced", sequential and curve need the Grams of every '
                f'retained class; grams has the "total" and {classes}: see accumulate_class_grams'
            )
    if config.sequential and several and not config.stale_grams:
        raise ValueError(
            "sequential: after the first edit the given grams are those of another model; leave "
            "grams out, or write stale_grams = true to go on with them"
        )


def _several(alphas: Alphas) -> tuple[float, ...]:
    return alphas if isinstance(alphas, tuple) else (alphas,)
