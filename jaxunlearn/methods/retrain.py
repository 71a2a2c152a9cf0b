"""Retraining without the forget data: the reference of all methods, or of the last layers alone.

    θ_r = train(init(key'), D_r, recipe)

Exact unlearning, at the cost of a training. With ``last_k`` it is exact unlearning of the last k
layers, EU-k (arXiv:2201.06640): these are initialised anew and trained by the same recipe, all
below stays as it is, so what the features know of the forget data stays too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import optax
from jaxtyping import PRNGKeyArray

from jaxunlearn.capture import ApplyFn
from jaxunlearn.layers import leaves_by_path, path_name
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.last_layers import Cut, cut_of, hold_below, train_above
from jaxunlearn.methods.phases import Descent, Phase, check_trains, retained, run_phases
from jaxunlearn.sharding import replicate
from jaxunlearn.steps import Augment, train_step

NEEDS = frozenset({"retain", "init_fn", "recipe"})
SCOPES = frozenset({"class", "classes", "samples"})


@dataclass(frozen=True)
class RetrainConfig:
    """Settings of retraining; the recipe is the problem's.

    Attributes:
      last_k: train the last so many layers alone, the head included; None for all of the model.
      augment: augment as in training (if the problem has an augmentation).
    """

    last_k: int | None = None
    augment: bool = True


def retrain(
    key: PRNGKeyArray, problem: UnlearningProblem, config: RetrainConfig | None = None
) -> Unlearned:
    """Train a new model, or new last layers, on the retain data.

    Args:
      key: initialisation, batch order, augmentation, dropout.
      problem: model, retain data, ``init_fn`` and ``recipe``; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, and ``info``: see :func:`jaxunlearn.methods.phases.run_phases`. Those of the whole
      model are, to the bit, those of :func:`jaxunlearn.training.fit` on the retain data with the
      second of two keys, from an initialisation with the first.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem`; ``init_fn`` makes other
        variables than the problem's; fewer layers than ``last_k``.
      FloatingPointError: a loss or a weight is no longer finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxunlearn.batches import Batches
      >>> from jaxunlearn.methods.base import Recipe
      >>> from jaxunlearn.models import build
      >>> model, x = build("mlp", features=(8,), num_classes=3), jnp.eye(6)
      >>> init = lambda key: model.init(key, x)
      >>> problem = UnlearningProblem(
      ...     apply_fn=model.apply,
      ...     variables=init(jax.random.key(0)),
      ...     forget=Batches(x[:2], jnp.array([0, 0]), 2),
      ...     retain=Batches(x[2:], jnp.array([1, 2, 1, 2]), 4),
      ...     num_classes=3,
      ...     forget_classes=(0,),
      ...     init_fn=init,
      ...     recipe=Recipe(lambda steps_per_epoch: optax.sgd(0.1), epochs=3, batch_size=4),
      ... )
      >>> retrain(jax.random.key(1), problem).info["steps"]
      3
    """
    config = config or RetrainConfig()
    check_problem(problem, method="retrain", needs=NEEDS, scopes=SCOPES)
    cut, recipe = check_retrain(problem, config), problem.recipe
    assert recipe is not None  # check_problem
    assert problem.init_fn is not None
    init_key, fit_key = jax.random.split(key)
    order_key, step_key = jax.random.split(fit_key)
    retain = retained(fit_key, problem, 1.0, recipe.batch_size)
    augment = problem.augment if config.augment else None
    descent = _programs(problem.apply_fn, recipe.optimizer, len(retain), augment, cut)
    data = {"inputs": retain.inputs, "labels": retain.labels, "key": step_key}
    phase = Phase("retain", retain, order_key, descent.step, replicate(problem.mesh, data))
    start = _renewed(problem.variables, problem.init_fn(init_key), cut)
    return run_phases(
        "retrain", problem, descent.optimizer, [phase], recipe.epochs, variables=start
    )


def check_retrain(problem: UnlearningProblem, config: RetrainConfig) -> Cut | None:
    """Refuse settings that do not fit a model; where it is cut. Traces, computes nothing.

    Raises:
      ValueError: no train mode; fewer layers than ``last_k``; ``init_fn`` makes other variables
        than the problem's.
    """
    cut = cut_of(problem, config.last_k)
    check_trains(replace(problem, apply_fn=train_above(problem.apply_fn, cut)))
    if problem.init_fn is not None:
        made = _shapes(jax.eval_shape(problem.init_fn, jax.random.key(0)))
        if wrong := sorted({name for name, _ in made ^ _shapes(problem.variables)}):
            raise ValueError(
                f"init_fn makes another model: leaves {wrong[:4]} are missing, in excess or of "
                "another shape; pass the init_fn of the model that was trained"
            )
    return cut


@lru_cache(maxsize=64)
def _programs(
    apply_fn: ApplyFn,
    optimizer: Callable[[int], optax.GradientTransformation],
    steps_per_epoch: int,
    augment: Augment | None,
    cut: Cut | None,
) -> Descent:
    held = hold_below(optimizer(steps_per_epoch), cut)
    return Descent(held, train_step(train_above(apply_fn, cut), held, augment=augment))


def _renewed(variables: Mapping[str, Any], made: Mapping[str, Any], cut: Cut | None) -> Any:
    """Variables whose leaves above the cut are those that were made."""
    frozen, new = cut.frozen if cut else frozenset(), leaves_by_path(made)

    def leaf(tree_path: tuple, old: Any) -> Any:
        name = path_name(tree_path)
        return old if name in frozen else new[name]

    return jax.tree.map_with_path(leaf, dict(variables))


def _shapes(variables: Any) -> set[tuple[str, tuple]]:
    leaves = leaves_by_path(variables)
    return {(name, (tuple(leaf.shape), str(leaf.dtype))) for name, leaf in leaves.items()}
