"""Settings of dimensional alignment.

Reconstructed from the abstract and public summaries of arXiv:2407.17710; formulas and defaults are
jaxunlearn's.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from jaxunlearn.methods.phases import BatchNorm, check_descent

Distillation = Literal["masked", "none"]
Teacher = Literal["current", "original", "ema"]
Basis = Literal["epoch", "frozen", "batch"]
Alternation = Literal["epoch", "step", "joint"]
Stop = Literal["never", "target", "blind"]
_CHOICES = {
    "distillation": get_args(Distillation),
    "teacher": get_args(Teacher),
    "basis": get_args(Basis),
    "alternation": get_args(Alternation),
    "stop": get_args(Stop),
}


@dataclass(frozen=True)
class DimensionalAlignmentConfig:
    """Settings of dimensional alignment; all defaults are jaxunlearn's.

    Attributes:
      distillation: on forget data: ``"masked"``, the model's own opinion without the forgotten
        classes, or ``"none"``.
      teacher: whose opinion: the ``"current"`` model's, the ``"original"``'s, or ``"ema"``, an
        average of the models at the starts of the epochs.
      ema_decay: of that average.
      temperature: divides the logits of teacher and student.
      alignment_weight: λ, of the alignment loss; 0 leaves it out.
      energy: ρ, share of the trace that the retain space holds.
      rank: its number of directions instead, such as the number of retained classes.
      basis: when the retain space is computed: at the start of each ``"epoch"``, ``"frozen"`` from
        the original model, or from each retain ``"batch"``.
      basis_images: retain images that it is computed from, a fixed subset; None takes
        ``max(2048, 20 d)`` for ``d`` features.
      layer: module whose output the features are, by path or pattern; None reads the input of the
        last dense layer.
      retain_kl: weight of the divergence from the original's outputs on retain data, beside the
        cross-entropy.
      alternation: forget and recover phase one after the other in each ``"epoch"``, a ``"step"`` of
        each in turn, or ``"joint"`` steps on the sum of both losses.
      epochs: each one pass over the forget and the retain data (over the retain data alone, with
        forget batches recycled, if ``alternation`` is not ``"epoch"``).
      learning_rate: constant.
      momentum: of SGD; one optimiser state runs through both phases.
      weight_decay: of all leaves, added to the gradient before momentum.
      forget_batch_size: forget examples per step.
      batch_size: retain examples per step.
      retain_fraction: share of the retain data that is used at all, drawn once.
      batch_norm: in the forget phase; ``"eval"`` freezes batch statistics and dropout there, as a
        batch of one class shifts the statistics.
      augment: augment retain images as in training (if the problem has an augmentation).
      stop: ``"never"`` before ``epochs``; at a ``"target"``; or ``"blind"``, where the alignment of
        the forget data reaches that of the problem's ``held_out`` images under the same model.
      target_alignment: of ``stop = "target"``.
      target_forget_accuracy: to stop, accuracy on the forget data may not be above it; for samples
        write what a retrained model is expected to have.
    """

    distillation: Distillation = "masked"
    teacher: Teacher = "current"
    ema_decay: float = 0.5
    temperature: float = 1.0
    alignment_weight: float = 1.0
    energy: float = 0.95
    rank: int | None = None
    basis: Basis = "epoch"
    basis_images: int | None = None
    layer: str | None = None
    retain_kl: float = 0.0
    alternation: Alternation = "epoch"
    epochs: int = 10
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    forget_batch_size: int = 128
    batch_size: int = 128
    retain_fraction: float = 1.0
    batch_norm: BatchNorm = "train"
    augment: bool = True
    stop: Stop = "never"
    target_alignment: float | None = None
    target_forget_accuracy: float = 0.01

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: write one of {allowed}")
        check_descent(self)
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy = {self.energy}: wanted a share in (0, 1]")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay = {self.ema_decay}: wanted a number in [0, 1)")
        for name in ("alignment_weight", "retain_kl"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: wanted at least 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature}: wanted a positive number")
        for name in ("rank", "basis_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: wanted at least 1")
        for name in ("target_alignment", "target_forget_accuracy"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: wanted a fraction in [0, 1]")
        if (self.target_alignment is not None) != (self.stop == "target"):
            raise ValueError(
                f"target_alignment = {self.target_alignment} with stop = {self.stop!r}: "
                'stop = "target" needs one, and nothing else reads it'
            )

    @property
    def forgets(self) -> bool:
        """Whether there is a loss on forget data; without one the method is fine-tuning."""
        return self.distillation != "none" or self.alignment_weight > 0
