"""The head edit: forgotten classes are silenced in the last layer. A control, not a method.

    b_c ← -10⁴                              for every forgotten class c, in the bias of the head

Accuracy on these classes is then 0, on the others it stays or rises, and every attack that reads
outputs is deceived, while no feature has moved by a bit. A method that is not better than this at a
probe, at alignment or at relearning has edited outputs only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from jaxunlearn.activations import last_dense
from jaxunlearn.capture import describe_layers
from jaxunlearn.edits import silence_classes
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem

NEEDS: frozenset[str] = frozenset()
SCOPES = frozenset({"class", "classes"})


@dataclass(frozen=True)
class HeadEditConfig:
    """Settings of the head edit.

    Attributes:
      value: of the bias of forgotten classes; far below all logits.
    """

    value: float = -1e4

    def __post_init__(self) -> None:
        if not -float("inf") < self.value < 0:
            raise ValueError(f"value = {self.value}: wanted a finite number below 0, -1e4 say")


def head_edit(
    key: PRNGKeyArray, problem: UnlearningProblem, config: HeadEditConfig | None = None
) -> Unlearned:
    """Silence the forgotten classes in the bias of the last dense layer; reads no data.

    Args:
      key: not used.
      problem: the model; scopes class and classes.
      config: settings.

    Returns:
      Variables, and ``info``: counts that are 0.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem`; the last dense layer does not
        make the logits, or has no bias.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxunlearn.batches import Batches
      >>> from jaxunlearn.models import build
      >>> model, x = build("mlp", features=(8,), num_classes=3), jnp.eye(3)
      >>> forget, retain = Batches(x[:1], jnp.array([0]), 1), Batches(x[1:], jnp.array([1, 2]), 2)
      >>> variables = model.init(jax.random.key(0), x)
      >>> problem = UnlearningProblem(model.apply, variables, forget, retain, 3, (0,))
      >>> edited = head_edit(jax.random.key(1), problem).variables
      >>> edited["params"]["head"]["bias"].tolist()
      [-10000.0, 0.0, 0.0]
    """
    del key
    config = config or HeadEditConfig()
    check_problem(problem, method="head_edit", needs=NEEDS, scopes=SCOPES)
    variables = _silenced(problem, config)
    return Unlearned(variables, {"steps": 0, "forget_passes": 0.0, "retain_passes": 0.0})


def check_head(problem: UnlearningProblem, config: HeadEditConfig) -> None:
    """Refuse a model whose head cannot be edited. Traces, computes nothing.

    Raises:
      ValueError: the last dense layer does not make the logits, or has no bias.
    """
    jax.eval_shape(lambda v: _silenced(replace(problem, variables=v), config), problem.variables)


def _silenced(problem: UnlearningProblem, config: HeadEditConfig) -> Mapping[str, Any]:
    specs = describe_layers(problem.apply_fn, problem.variables, problem.forget.inputs[:1])
    head, k = last_dense(specs), problem.num_classes
    params = None
    if head.d_out == k:
        classes = problem.forget_classes
        params = silence_classes(problem.variables["params"], head, classes, value=config.value)
    if params is None:
        raise ValueError(
            f"head_edit edits the bias [{k}] of the last dense layer; {head.path!r} with kernel "
            f"{head.kernel_shape} has none. A mask of the logits would be no edit of variables; "
            "reports on forgotten classes lower the logits instead: run any other method"
        )
    return {**problem.variables, "params": params}
