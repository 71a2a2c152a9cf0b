"""The one contract of all methods: ``(key, problem, config) -> Unlearned``.

A problem holds a trained model and its forget and retain data, never test data. What a method needs
and which scopes it supports is declared in its :class:`Method` and checked, with everything else a
caller can get wrong, before any compute.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn
from jaxunlearn.gram import GramState
from jaxunlearn.layers import LayerSpec
from jaxunlearn.steps import Augment


class Recipe(NamedTuple):
    """How the model was trained, for methods that train one anew.

    Attributes:
      optimizer: of the number of steps per epoch.
      epochs: passes over the data.
      batch_size: examples per step.
    """

    optimizer: Callable[[int], optax.GradientTransformation]
    epochs: int
    batch_size: int


@dataclass(frozen=True, eq=False)
class UnlearningProblem:
    """A trained model and what it shall forget.

    Attributes:
      apply_fn: ``(variables, inputs, **flax_apply_kwargs) -> logits [b, k]``; inference mode by
        default.
      variables: trained variables with a ``params`` collection.
      forget: forget data ``D_f``.
      retain: retain data ``D_r``; None for methods that do not read them, or with ``grams``.
      num_classes: ``k``.
      forget_classes: classes forgotten as a whole; empty if ``forget`` is a set of samples.
      augment: training-time augmentation ``(key, inputs) -> inputs``.
      grams: ``{class: {path: GramState}}``, and ``"total"`` for all training data together; methods
        that get them never touch ``retain`` for its Grams. Those of forgotten classes may be there;
        for a set of samples, class Grams are of the retain data.
      pixel_scale: ``inputs / pixel_scale`` are pixels in [0, 1]: 255 for uint8 images. Read by
        methods that change inputs.
      mesh: devices over which a method splits its batches; None for one. Variables and data lie on
        one device all the same, and so does the result.
      held_out: retained images that the model was not trained on, for methods that stop by them.
      held_out_forget: images distributed like the forget data that the model was not trained on,
        such as validation images of the forgotten classes; for methods that rewind by them.
      surrogate: images of another distribution, for methods that hold the model in place by them.
        Their labels are not read.
      init_fn: ``key -> variables``, untrained, for methods that need such a model.
      recipe: how the model was trained, for methods that retrain.
      selection: forget and retain data on which a method's settings are chosen in place of training
        data, where its config asks for that. Test data here make the result an upper bound.
    """

    apply_fn: ApplyFn
    variables: Mapping[str, Any]
    forget: Batches
    retain: Batches | None
    num_classes: int
    forget_classes: tuple[int, ...] = ()
    augment: Augment | None = None
    grams: Mapping[int | str, Mapping[str, GramState]] | None = None
    pixel_scale: float = 1.0
    mesh: Mesh | None = None
    held_out: Batches | None = None
    held_out_forget: Batches | None = None
    surrogate: Batches | None = None
    init_fn: Callable[[PRNGKeyArray], Mapping[str, Any]] | None = None
    recipe: Recipe | None = None
    selection: tuple[Batches, Batches] | None = None

    @property
    def scope(self) -> str:
        """``"class"``, ``"classes"`` or ``"samples"``."""
        return {0: "samples", 1: "class"}.get(len(self.forget_classes), "classes")


_FIELDS = {
    "held_out": "held_out=Batches(...), retained images that the model was not trained on",
    "held_out_forget": "held_out_forget=Batches(...), images like the forget data that the model "
    "was not trained on; in a run, set data.validation",
    "surrogate": "surrogate=Batches(...), images of another distribution; in a run, set "
    "data.surrogate",
    "init_fn": "init_fn=key -> variables, such as lambda key: model.init(key, x)",
    "recipe": "recipe=Recipe(optimizer=..., epochs=..., batch_size=...)",
}


class Unlearned(NamedTuple):
    """Edited variables, and what the method reports about its run."""

    variables: Mapping[str, Any]
    info: dict[str, Any]


class Method(NamedTuple):
    """A row of ``METHODS``: the method, its config type, the data it needs, its scopes.

    ``check(problem, config)`` refuses settings that do not fit a problem; shapes of variables will
    do, so that a run can ask before it trains. ``guards`` says that the result is the original with
    a collection ``guard`` (:mod:`jaxunlearn.guard`).
    """

    name: str
    run: Callable[[PRNGKeyArray, UnlearningProblem, Any], Unlearned]
    config: type
    needs: frozenset[str]
    scopes: frozenset[str]
    summary: str
    check: Callable[[UnlearningProblem, Any], object] = lambda problem, config: None
    guards: bool = False


def check_problem(
    problem: UnlearningProblem, *, method: str, needs: frozenset[str], scopes: frozenset[str]
) -> None:
    """Refuse a problem that a method cannot work on, before work starts.

    Raises:
      ValueError: a scope the method lacks; absent fields that it needs; forget classes out of
        range, absent from the forget data or still in the retain data; nothing left to retain; NaN
        or inf in data or weights; inputs that the model does not accept; another number of logits.
    """
    if problem.scope not in scopes:
        raise ValueError(
            f"{method} does not support scope {problem.scope!r}, only {sorted(scopes)}"
        )
    if "retain" in needs and problem.retain is None and problem.grams is None:
        raise ValueError(f"{method} needs retain data: pass retain=Batches(...), or grams={{...}}")
    for name, how in _FIELDS.items():
        if name in needs and getattr(problem, name) is None:
            raise ValueError(f"{method} needs {name}, which the problem lacks: pass {how}")
    _check_classes(problem)
    for where, batches in (("forget", problem.forget), ("retain", problem.retain)):
        if batches is not None and not all_finite(batches.inputs):
            raise ValueError(f"NaN or inf in the {where} inputs; remove or repair these examples")
    for path, finite in jax.tree.leaves_with_path(finite_leaves(problem.variables)):
        if not finite:
            raise ValueError(
                f"NaN or inf in variables{jax.tree_util.keystr(path)}; unlearning needs a model "
                "whose training did not diverge"
            )
    _check_model(problem)


def _check_classes(problem: UnlearningProblem) -> None:
    k, classes = problem.num_classes, set(problem.forget_classes)
    if len(classes) < len(problem.forget_classes):
        raise ValueError(
            f"forget_classes {problem.forget_classes} name a class twice; once is enough"
        )
    if wrong := sorted(c for c in classes if not 0 <= c < k):
        raise ValueError(f"forget_classes {wrong} are not among the classes 0 to {k - 1}")
    if len(classes) >= k:
        raise ValueError(f"all {k} classes would be forgotten; leave at least one to retain")
    forget = set(np.unique(problem.forget.labels).tolist())
    if outside := sorted(c for c in forget if not 0 <= c < k):
        raise ValueError(f"labels {outside} of the forget data are not among the {k} classes")
    if classes and forget != classes:
        raise ValueError(
            f"the forget data hold classes {sorted(forget)}, forget_classes says "
            f"{sorted(classes)}; for a class scope they must be the same"
        )
    retained = set() if problem.retain is None else set(np.unique(problem.retain.labels).tolist())
    if both := sorted(retained & classes):
        raise ValueError(f"the retain data still hold the forgotten classes {both}; take them out")


def _check_model(problem: UnlearningProblem) -> None:
    inputs = problem.forget.inputs
    batch = jax.ShapeDtypeStruct((problem.forget.batch_size, *inputs.shape[1:]), inputs.dtype)
    try:
        logits = jax.eval_shape(problem.apply_fn, problem.variables, batch)
    except (flax.errors.FlaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"the model does not accept forget inputs of shape {batch.shape} and dtype "
            f"{batch.dtype}: {error}"
        ) from error
    wanted = (problem.forget.batch_size, problem.num_classes)
    if logits.shape != wanted:
        raise ValueError(f"the model returns {logits.shape} for a batch; wanted logits {wanted}")


def stored_classes(problem: UnlearningProblem) -> list[int]:
    """Classes whose Grams a problem holds, in increasing order."""
    return sorted(int(k) for k in problem.grams or {} if not isinstance(k, str))


def covers_retained(problem: UnlearningProblem) -> bool:
    """Whether the Grams of all classes that are not forgotten as a whole are there."""
    retained = set(range(problem.num_classes)) - set(problem.forget_classes)
    return retained <= set(stored_classes(problem))


def stored_grams(
    problem: UnlearningProblem, name: int | str, specs: Mapping[str, LayerSpec]
) -> dict[str, GramState]:
    """The Grams of a class, or ``"total"``, of these layers.

    Raises:
      ValueError: a layer is missing, or its Gram has another shape.
    """
    assert problem.grams is not None
    stored = problem.grams[name]
    fits = {p for p, s in specs.items() if p in stored and stored[p].gram.shape == s.gram_shape}
    if wrong := sorted(specs.keys() - fits):
        raise ValueError(
            f"the Grams of {name if isinstance(name, str) else f'class {name}'} lack layers "
            f"{wrong} of the model, or have other shapes; accumulate them with this model's layers"
        )
    return {path: stored[path] for path in specs}


@jax.jit
def finite_leaves(tree: Any) -> Any:
    """For every array of a tree, whether it holds neither NaN nor inf; integers never do.

    Examples:
      >>> finite_leaves({"a": jnp.array([1.0, jnp.nan]), "b": jnp.array([1])})
      {'a': Array(False, dtype=bool), 'b': Array(True, dtype=bool)}
    """
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def all_finite(tree: Any) -> bool:
    """Whether all arrays of a tree hold neither NaN nor inf.

    Examples:
      >>> all_finite({"a": jnp.array([1.0, jnp.inf]), "b": jnp.array([1])})
      False
    """
    return all(jax.device_get(jax.tree.leaves(finite_leaves(tree))))
