"""Settings of SCAR."""

from dataclasses import dataclass

from jaxunlearn.methods.phases import BatchNorm, Optimizer, check_descent


@dataclass(frozen=True)
class ScarConfig:
    """Settings of SCAR; the defaults are those of its code for a class of CIFAR-10.

    Attributes:
      forget_weight: λ₁.
      retain_weight: λ₂.
      power: δ, of the features; below 1 they must not be negative.
      shrink_diagonal: γ₁.
      shrink_off_diagonal: γ₂.
      surrogate_batches: steps for each forget batch, one surrogate batch each; not more than there
        are.
      stop_below: stop once the accuracy on the forget data is below this, asked after each epoch
        from the third; None never. Of forgotten classes alone.
      weight_floor: for samples, each epoch weighs the distance of an example by the accuracy of its
        class on the forget data, and by 0 where that is below this.
      epochs: passes over the forget data, at most.
      optimizer: ``"adam"`` or ``"sgd"``.
      learning_rate: constant.
      momentum: of SGD.
      weight_decay: of all leaves, added to the gradient before the optimiser.
      forget_batch_size: forget examples per step.
      batch_size: surrogate images per step.
      batch_norm: ``"train"`` updates the batch statistics, ``"eval"`` freezes them and dropout.
    """

    forget_weight: float = 1.0
    retain_weight: float = 5.0
    power: float = 0.5
    shrink_diagonal: float = 3.0
    shrink_off_diagonal: float = 3.0
    surrogate_batches: int = 6
    stop_below: float | None = 0.01
    weight_floor: float = 0.8
    epochs: int = 30
    optimizer: Optimizer = "adam"
    learning_rate: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    forget_batch_size: int = 1024
    batch_size: int = 1024
    batch_norm: BatchNorm = "train"

    def __post_init__(self) -> None:
        check_descent(self)
        for name in ("forget_weight", "retain_weight", "shrink_diagonal", "shrink_off_diagonal"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: wanted at least 0")
        if not 0 < self.power <= 1:
            raise ValueError(f"power = {self.power}: wanted a number in (0, 1]")
        if self.surrogate_batches < 1:
            raise ValueError(f"surrogate_batches = {self.surrogate_batches}: wanted at least 1")
