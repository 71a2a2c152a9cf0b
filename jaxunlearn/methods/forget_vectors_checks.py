"""What forget vectors refuse before work starts."""

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from jaxunlearn.methods.base import UnlearningProblem
from jaxunlearn.methods.forget_vectors_config import ForgetVectorsConfig

NEEDS = frozenset({"forget", "retain"})
SCOPES = frozenset({"class", "classes", "samples"})


def check_inputs(problem: UnlearningProblem, config: ForgetVectorsConfig | None = None) -> None:
    """Refuse inputs to which no vector can be added. Traces the model, computes next to nothing.

    Raises:
      ValueError: no retain data; forget and retain inputs of different shapes or dtypes; variables
        with a guard already; integers that ``pixel_scale`` does not turn into pixels in [0, 1];
        ``clip`` with inputs outside that range; a model that does not accept floats; a bank of
        classes of which one has no example; the plain sum for a request that is no set of classes.
    """
    if problem.retain is None:
        raise ValueError("forget_vectors trains on retain data: pass retain=Batches(...)")
    if "guard" in problem.variables:
        raise ValueError(
            "the variables have a collection 'guard' already, which a new vector would replace: "
            "pass the original's variables and forget everything together, or compose vectors"
        )
    forget, retain = problem.forget.inputs, problem.retain.inputs
    if (forget.shape[1:], forget.dtype) != (retain.shape[1:], retain.dtype):
        raise ValueError(
            f"forget inputs {forget.shape} {forget.dtype}, retain inputs {retain.shape} "
            f"{retain.dtype}: one vector is added to all, wanted one shape and dtype"
        )
    config = config or ForgetVectorsConfig()
    _check_pixels((forget, retain), config, problem.pixel_scale)
    _check_bank(problem, config)
    floats = jax.ShapeDtypeStruct((problem.forget.batch_size, *forget.shape[1:]), jnp.float32)
    try:
        jax.eval_shape(problem.apply_fn, problem.variables, floats)
    except (flax.errors.FlaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"the model does not accept floats {floats.shape}, which inputs with a vector added "
            f"are; forget_vectors is for images, not for ids: {error}"
        ) from error


def _check_pixels(inputs: tuple[Array, Array], config: ForgetVectorsConfig, scale: float) -> None:
    if not 0 < scale < float("inf"):
        raise ValueError(f"pixel_scale = {scale}: wanted a positive number, 255 for uint8 images")
    whole = not jnp.issubdtype(inputs[0].dtype, jnp.floating)
    if not (whole or config.clip):
        return  # floats may have been normalised
    low, high = min(x.min().item() for x in inputs), max(x.max().item() for x in inputs)
    if high > scale or (config.clip and low < 0):
        raise ValueError(
            f"inputs from {low} to {high} with pixel_scale = {scale}: their ratio is a pixel, "
            f"wanted in [0, 1]{'; write 255 for uint8 images' if whole else ' by clip = True'}"
        )


def _check_bank(problem: UnlearningProblem, config: ForgetVectorsConfig) -> None:
    assert problem.retain is not None
    if config.bank == "none":
        return
    if config.composition == "sum" and not problem.forget_classes:
        raise ValueError(
            'composition = "sum" for a set of samples, which no vectors of classes belong to: '
            'write composition = "learned"'
        )
    seen = {*np.unique(problem.forget.labels).tolist(), *np.unique(problem.retain.labels).tolist()}
    if missing := sorted(set(range(problem.num_classes)) - seen):
        raise ValueError(
            f'bank = "classes" learns a vector for each of {problem.num_classes} classes, and '
            f'{missing} have no example: write bank = "none", or pass vectors of your own to '
            "compose"
        )


def checked_flags(
    problem: UnlearningProblem, flags: Shaped[Array | np.ndarray, "K N"]
) -> Bool[np.ndarray, "K N"]:
    """Which examples each set forgets, ``[K, N]``.

    Args:
      problem: the data, N in all.
      flags: as they came.

    Raises:
      ValueError: another number of examples; a set that forgets none or all.
    """
    assert problem.retain is not None  # check_inputs
    gone, kept = problem.forget.num_examples, problem.retain.num_examples
    rows = np.asarray(flags) != 0
    if not len(rows) or rows.shape[1] != gone + kept:
        raise ValueError(
            f"flags {rows.shape}: wanted [K, {gone + kept}], one for each of the {gone} forget "
            f"examples and then of the {kept} retain examples"
        )
    if uniform := np.flatnonzero(rows.all(1) | ~rows.any(1)).tolist():
        raise ValueError(
            f"flags of the sets {uniform} are all alike; wanted examples to forget and to retain"
        )
    return rows


def checked_betas(
    config: ForgetVectorsConfig, betas: Float[Array | np.ndarray, " K"] | None, count: int
) -> Float[np.ndarray, " K"]:
    """β of each of ``count`` sets.

    Args:
      config: whose β is taken by default.
      betas: as they came, or None.
      count: K.

    Raises:
      ValueError: a grid in the settings and no betas; not K positive numbers; betas in the paper's
        form.
    """
    if betas is not None and config.objective == "paper":
        raise ValueError('betas with objective = "paper", whose forget loss has no weight')
    if betas is None and len(config.betas) > 1:
        raise ValueError(
            f"beta = {config.beta} for {count} sets: repeat the rows of flags for each, and pass "
            "betas with one number for each row"
        )
    weights = np.full(count, config.betas[0]) if betas is None else np.asarray(betas)
    if weights.shape != (count,) or not (weights > 0).all():
        raise ValueError(f"betas {weights}: wanted {count} positive numbers, one for each set")
    return weights
