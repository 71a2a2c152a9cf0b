"""Settings of UNSC."""

from dataclasses import dataclass
from typing import Literal, get_args

from jaxunlearn.layers import Patches
from jaxunlearn.linalg import RankRule
from jaxunlearn.methods.subspaces import Builder
from jaxunlearn.subspace import Solver

Labels = Literal["pseudo", "random"]
Optimizer = Literal["sgd", "adam"]
_CHOICES = {
    "builder": get_args(Builder),
    "rank_rule": get_args(RankRule),
    "solver": get_args(Solver),
    "patches": get_args(Patches),
    "labels": get_args(Labels),
    "optimizer": get_args(Optimizer),
}


@dataclass(frozen=True)
class UNSCConfig:
    """Settings of UNSC; the defaults are the paper's algorithm with the authors' CIFAR-10 steps.

    Attributes:
      builder: how the retained subspace is built, see :mod:`jaxunlearn.methods.subspaces`.
      energy: share of a class's trace to keep; one number, or one per class. By default .97
        (concat), ``.97 + .003 · class`` (gpm; the authors' rule for ten classes), .99 (pooled).
      merge_energy: share kept when concat merges the classes.
      rank_rule: ``"below"`` keeps one direction fewer, as the reference code does.
      solver: of the eigenspaces: ``"eigh"``, ``"randomized"``, or ``"auto"``, which is randomized
        for 1,024 features or more.
      patches: ``"valid"`` ignores padding and stride, as the reference code does.
      images_per_class: images whose Gram is taken, drawn at random; None takes all.
      images_per_layer: the first so many of these for each layer in turn (reference code).
      augment_subspace: augment these images.
      labels: ``"pseudo"``, or ``"random"``: uniform over the allowed classes, redrawn per batch.
      project: False fine-tunes the kernels without a projection (ablation).
      learning_rate: constant; tune it once per data set on training or validation data.
      epochs: passes over the forget data.
      batch_size: forget examples per step.
      optimizer: ``"sgd"`` or ``"adam"``; the projection follows it, so both stay in the null space.
      momentum: of SGD.
      augment: augment forget images as in training (if the problem has an augmentation).
      dropout: keep dropout on while unlearning, as the reference code does.
      stop_below: stop after the first epoch with less accuracy on the forget data than this.
    """

    builder: Builder = "concat"
    energy: float | tuple[float, ...] | None = None
    merge_energy: float = 0.99
    rank_rule: RankRule = "reach"
    solver: Solver = "auto"
    patches: Patches = "exact"
    images_per_class: int | None = 256
    images_per_layer: tuple[int, ...] | None = None
    augment_subspace: bool = False
    labels: Labels = "pseudo"
    project: bool = True
    learning_rate: float = 0.04
    epochs: int = 25
    batch_size: int = 512
    optimizer: Optimizer = "sgd"
    momentum: float = 0.0
    augment: bool = True
    dropout: bool = False
    stop_below: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: write one of {allowed}")
        energies = self.energy if isinstance(self.energy, tuple) else (self.energy,)
        for share in (*energies, self.merge_energy):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"an energy of {share} is not a share in (0, 1]; write 0.97, say")
        if isinstance(self.energy, tuple) and self.builder != "gpm":
            raise ValueError('one energy per class belongs to builder = "gpm"; write one number')
        if self.epochs < 1 or self.batch_size < 1 or self.learning_rate < 0:
            raise ValueError(
                f"epochs = {self.epochs}, batch_size = {self.batch_size}, learning_rate = "
                f"{self.learning_rate}: wanted at least 1, at least 1 and at least 0"
            )
        if not 0 <= self.momentum < 1 or (self.momentum and self.optimizer != "sgd"):
            raise ValueError(
                f"momentum = {self.momentum} with optimizer = {self.optimizer!r}: wanted a number "
                "in [0, 1), and 0 for any other optimizer than sgd"
            )
        if self.images_per_class is not None and self.images_per_class < 1:
            raise ValueError(
                f"images_per_class = {self.images_per_class}: wanted at least 1, or None for all"
            )
        if self.images_per_layer is not None and min(self.images_per_layer, default=1) < 1:
            raise ValueError(
                f"images_per_layer = {self.images_per_layer}: wanted at least 1 for every layer"
            )

    def class_energy(self, k: int) -> float:
        """Share of the trace of class ``k`` to keep."""
        if isinstance(self.energy, tuple):
            return self.energy[k]
        if self.energy is not None:
            return self.energy
        return {"concat": 0.97, "pooled": 0.99, "gpm": min(0.97 + 0.003 * k, 1.0)}[self.builder]
