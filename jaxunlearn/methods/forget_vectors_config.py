"""Settings of forget vectors."""

from dataclasses import dataclass
from typing import Literal, get_args

from jaxunlearn.methods.phases import check_descent

Objective = Literal["code", "paper"]
Start = Literal["zeros", "normal"]
ComposeStart = Literal["zeros", "ones", "normal"]
Ball = Literal["none", "l2", "linf"]
Bank = Literal["none", "classes"]
Composition = Literal["learned", "sum"]
_CHOICES = {
    "objective": get_args(Objective),
    "start": get_args(Start),
    "compose_start": get_args(ComposeStart),
    "ball": get_args(Ball),
    "bank": get_args(Bank),
    "composition": get_args(Composition),
}
_NOT_NEGATIVE = (
    "retain_weight",
    "norm_weight",
    "paper_retain_weight",
    "paper_norm_weight",
    "margin",
    "compose_learning_rate",
)


@dataclass(frozen=True)
class ForgetVectorsConfig:
    """Settings of forget vectors; the defaults are the reference code's, one beta for all classes.

    Attributes:
      objective: ``"code"``, the loss of the reference code, whose sums are divided by the whole
        batch, or ``"paper"``, the written one, a mean over each set and a squared norm.
      beta: β, weight of the forget loss (code form). Several form a grid: of those vectors whose
        error on the forget data is at least 99 %, the one of the smallest β is taken.
      retain_weight: α, of the cross-entropy on retain data (code form).
      norm_weight: λ, of the norm (code form).
      squared: square that norm; the reference code does not.
      paper_retain_weight: λ₁, of the cross-entropy on retain data (paper form).
      paper_norm_weight: λ₂, of the squared norm (paper form).
      margin: τ; a forget example counts no more once a wrong class leads by it.
      start: of a vector: ``"zeros"``, or ``"normal"``, of unit variance, far too large for pixels.
      epochs: passes over forget and retain data together.
      batch_size: examples per step, of both.
      data_fraction: share of forget and retain data that is used, the same of every class, drawn
        once.
      learning_rate: in the first epoch.
      learning_rate_decay: factor after each epoch.
      momentum: of SGD.
      weight_decay: of the vector, added to the gradient before momentum (code form; the paper form
        has none).
      augment: augment as in training (if the problem has an augmentation). The vector is added
        afterwards: it is fixed in the frame that the model sees.
      clip: cut the shifted pixels off at 0 and 1.
      ball: keep the vector in an ``"l2"`` or ``"linf"`` ball by a projection after each step.
      radius: of the ball, in pixels of [0, 1].
      compose_learning_rate: of the weights of a composition, in the first epoch.
      compose_start: of these weights.
      bank: ``"none"``: learn a vector for the request; ``"classes"``: learn one for every class, at
        the smallest β of a grid, and answer the request by a weighted sum of them.
      composition: these weights are ``"learned"``, or it is the plain ``"sum"`` of the vectors of
        the forgotten classes.
    """

    objective: Objective = "code"
    beta: float | tuple[float, ...] = 3.0
    retain_weight: float = 1.0
    norm_weight: float = 1.0
    squared: bool = False
    paper_retain_weight: float = 3.0
    paper_norm_weight: float = 0.01
    margin: float = 1.0
    start: Start = "zeros"
    epochs: int = 40
    batch_size: int = 256
    data_fraction: float = 1.0
    learning_rate: float = 0.2
    learning_rate_decay: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = True
    clip: bool = False
    ball: Ball = "none"
    radius: float | None = None
    compose_learning_rate: float = 0.02
    compose_start: ComposeStart = "zeros"
    bank: Bank = "none"
    composition: Composition = "learned"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: write one of {allowed}")
        check_descent(self)
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: wanted at least 0")
        if not self.learning_rate_decay > 0:
            raise ValueError(
                f"learning_rate_decay = {self.learning_rate_decay}: wanted a positive factor; 1 "
                "keeps the learning rate constant"
            )
        if not self.betas or not min(self.betas) > 0 or len(set(self.betas)) < len(self.betas):
            raise ValueError(
                f"beta = {self.beta}: wanted a positive number, or several different ones as a grid"
            )
        if self.objective == "paper" and isinstance(self.beta, tuple):
            raise ValueError(
                f'beta = {self.beta} with objective = "paper", whose forget loss has no weight: '
                "set paper_retain_weight instead"
            )
        if (self.radius is not None) != (self.ball != "none"):
            raise ValueError(
                f"radius = {self.radius} with ball = {self.ball!r}: a ball needs a radius, and "
                "nothing else reads it"
            )
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"radius = {self.radius}: wanted a positive number")
        self._check_bank()

    def _check_bank(self) -> None:
        if self.bank == "none" and self.composition == "sum":
            raise ValueError(
                'composition = "sum" with bank = "none", which leaves nothing to add up: write '
                'bank = "classes"'
            )
        if self.bank == "classes" and self.ball != "none":
            raise ValueError(
                f'ball = {self.ball!r} with bank = "classes": a sum of vectors leaves the ball '
                'that they are in; write ball = "none" or bank = "none"'
            )
        if self.composition == "sum" and len(self.betas) > 1:
            raise ValueError(
                f'beta = {self.beta} with composition = "sum", which learns nothing to choose by: '
                "write one number"
            )

    @property
    def betas(self) -> tuple[float, ...]:
        """The grid of β, in increasing order; one number is a grid of one."""
        return tuple(sorted(self.beta)) if isinstance(self.beta, tuple) else (self.beta,)

    @property
    def decay(self) -> float:
        """Weight decay of the objective's form."""
        return self.weight_decay if self.objective == "code" else 0.0
