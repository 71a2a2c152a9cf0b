"""Deep Unlearning: gradient-free class forgetting (Kodge, Saha, Roy, TMLR 2024, arXiv:2312.00761).

What a layer reads on forget data, and not also on retain data, is taken out of its kernel. With
``Ḡ = XᵀX / tr XᵀX`` of the layer's input rows, on retain data (r) and on forget data (f),

    P(α) = α Ḡ ((α-1) Ḡ + I)⁻¹               soft projector: eigenvalue s becomes αs / ((α-1)s + 1)
    K'   = K - P_f(α_f) (I - P_r(α_r)) K     one edit of every kernel, in closed form

All layers are edited from the original model's inputs, all pairs ``(α_r, α_f)`` of a grid from the
same Grams, with one factorisation per layer and alpha; the pair with the largest
``ACC_r · (1 - ACC_f)`` on training images is kept. Biases, norms and embeddings stay.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray

from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.layers import LayerSpec
from jaxunlearn.methods.alpha_grid import Grid, edited_kernels, with_kernels
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, all_finite, check_problem
from jaxunlearn.methods.collection import Task, collect
from jaxunlearn.methods.deep_unlearning_config import DeepUnlearningConfig, check_settings
from jaxunlearn.methods.diagnostics import edit_figures
from jaxunlearn.methods.selection import Selection, scored, selection_of
from jaxunlearn.methods.spaces import spectra

NEEDS = frozenset({"forget", "retain"})
SCOPES = frozenset({"class", "classes", "samples"})

Variables = Mapping[str, Any]
_NOT_FINITE = (
    "deep_unlearning: an edited kernel is not finite; wanted alphas of at most 3000, which are "
    "safe in float32, and Grams without negative eigenvalues"
)


def deep_unlearning(
    key: PRNGKeyArray, problem: UnlearningProblem, config: DeepUnlearningConfig | None = None
) -> Unlearned:
    """Unlearn classes or samples by one closed-form edit of the kernels.

    Two forward passes, over ``samples`` retain images and as many of each forgotten class; for
    ``r × f`` alphas, ``r + f`` Cholesky factorisations per layer (``d³/3`` flops each); for a grid
    one evaluation of ``select_images`` training images per pair. Memory: two Grams per layer, and
    one copy of the kernels per pair.

    Args:
      key: samples of images.
      problem: model and data; scopes class, classes and samples. For samples (an extension to the
        paper) that look like retained ones the edit is weak, as it must be: nothing is promised.
        With ``grams``, retain data are read only to score a grid.
      config: settings.

    Returns:
      Variables in which only kernels of linear layers changed, and ``info``: ``alpha_retain`` and
      ``alpha_forget`` (None if no pair of the grid scored above the unedited model, which is then
      returned); ``grid``, one row per pair with accuracies and score, and ``unedited``; per layer
      ``d_in``, ``d_out``, ``change``, ``retain_drift`` and ``forget_kept``, see
      :func:`jaxunlearn.methods.diagnostics.edit_figures`; ``images`` read; ``seconds`` of the
      parts; with ``curve`` or ``sequential``, ``curve``, accuracies by the number of classes
      forgotten, and its ``order``; with the latter ``steps``, the pair of each class (all else is
      of the last edit); with ``solver = "eigh"``, ``spectra`` of both sides; ``notes``.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem`; settings that do not fit the
        problem.
      FloatingPointError: an edited kernel is not finite.

    Examples:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> from jaxunlearn.batches import Batches
      >>> x, labels = jnp.eye(2), jnp.array([0, 1])
      >>> variables = {"params": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}
      >>> retain, forget = (Batches(x[k : k + 1], labels[k : k + 1], 1) for k in (0, 1))
      >>> problem = UnlearningProblem(nn.Dense(2).apply, variables, forget, retain, 2, (1,))
      >>> config = DeepUnlearningConfig(alpha_retain=100.0, alpha_forget=3.0)
      >>> edited = deep_unlearning(jax.random.key(0), problem, config).variables
      >>> edited["params"]["kernel"].round(3).tolist()
      [[1.0, 0.0], [0.0, 0.0]]
    """
    config = config or DeepUnlearningConfig()
    check_problem(problem, method="deep_unlearning", needs=NEEDS, scopes=SCOPES)
    specs = layers_to_edit(problem, config)
    task = Task(problem, config, specs, layer_inputs(problem.apply_fn, specs))
    classes = problem.forget_classes
    several = len(classes) > 1
    if config.sequential and several:
        return _one_after_another(key, task)
    variables, info = _edit(key, task, problem.variables, classes, classes, config.grid)
    if config.curve and several and info["alpha_retain"] is not None:
        info |= {"curve": _curve(key, task, variables, info), "order": "together"}
    return Unlearned(variables, info)


def _one_after_another(key: PRNGKeyArray, task: Task) -> Unlearned:
    """An edit for each class, from the weights that the one before left."""
    variables, classes = task.problem.variables, task.problem.forget_classes
    curve, steps, notes = [], [], []
    seconds: dict[str, float] = {}
    for i, k in enumerate(classes):
        gone, step_key = classes[: i + 1], jax.random.fold_in(key, i)
        variables, info = _edit(step_key, task, variables, (k,), gone, task.config.grid)
        curve.append(_point(step_key, task, variables, gone))
        names = ("alpha_retain", "alpha_forget", "unedited")
        steps.append({"class": k} | {name: info[name] for name in names})
        notes += [f"Class {k}: {note}" for note in info["notes"]]
        seconds = {part: seconds.get(part, 0) + s for part, s in info["seconds"].items()}
    # What is left of info describes the last edit; its grid would pass for that of all.
    info |= {"curve": curve, "order": "one after another", "steps": steps, "grid": []}
    return Unlearned(variables, info | {"seconds": seconds, "notes": notes})


def _curve(
    key: PRNGKeyArray, task: Task, variables: Variables, info: dict[str, Any]
) -> list[dict[str, Any]]:
    """The first class forgotten, the first two, and so on, each from the original model."""
    pair = [info["alpha_retain"]], [info["alpha_forget"]]
    classes, curve = task.problem.forget_classes, []
    for m in range(1, len(classes)):
        gone = classes[:m]
        edited, _ = _edit(key, task, task.problem.variables, gone, gone, pair)
        curve.append(_point(key, task, edited, gone))
    return [*curve, _point(key, task, variables, classes)]


def _edit(
    key: PRNGKeyArray,
    task: Task,
    variables: Variables,
    now: tuple[int, ...],
    gone: tuple[int, ...],
    alphas: Grid,
) -> tuple[Variables, dict[str, Any]]:
    """One request: collect, edit for every pair, keep the best."""
    collect_key, select_key = jax.random.split(key)
    seconds: dict[str, float] = {}
    with _timed(seconds, "grams"):
        collected = jax.block_until_ready(collect(collect_key, task, variables, now=now, gone=gone))
    with _timed(seconds, "solve"):
        edited = edited_kernels(
            task.specs, variables["params"], collected, alphas, solver=task.config.solver
        )
        jax.block_until_ready(edited)
    info: dict[str, Any] = {"grid": [], "unedited": None, "notes": _notes(task, now, gone)}
    best: tuple[int, int] | None = (0, 0)
    if max(map(len, alphas)) > 1:
        with _timed(seconds, "score"):
            best, found = _search(select_key, task, variables, edited, gone, alphas)
        info |= found
    counts = {side: int(next(iter(m.values())).count) for side, m in collected._asdict().items()}
    info |= {"images": counts, "seconds": seconds}
    if task.config.solver == "eigh":
        info["spectra"] = spectra(collected)
    if best is None:
        info["notes"].append(
            "No pair of the grid scored above the unedited model, which is returned as it was."
        )
        return variables, info | {"alpha_retain": None, "alpha_forget": None, "layers": {}}
    result = with_kernels(task.specs, variables, edited, *best)
    if not all_finite(result["params"]):
        raise FloatingPointError(_NOT_FINITE)
    info |= {"alpha_retain": alphas[0][best[0]], "alpha_forget": alphas[1][best[1]]}
    figures = edit_figures(task.specs, collected.retain, collected.forget, variables, result)
    return result, info | {"layers": figures}


def _search(
    key: PRNGKeyArray,
    task: Task,
    variables: Variables,
    edited: Mapping[str, Array],
    gone: tuple[int, ...],
    alphas: Grid,
) -> tuple[tuple[int, int] | None, dict[str, Any]]:
    """The first of the best pairs, None if no pair beats the unedited model; and all scores."""
    selection = _selection(key, task, gone)
    unedited = scored(task.problem, variables, selection)
    rows, best, most = [], None, unedited["score"]
    for i, alpha_retain in enumerate(alphas[0]):
        for j, alpha_forget in enumerate(alphas[1]):
            candidate = with_kernels(task.specs, variables, edited, i, j)
            if not all_finite(candidate["params"]):
                continue
            figures = scored(task.problem, candidate, selection)
            rows.append({"alpha_retain": alpha_retain, "alpha_forget": alpha_forget} | figures)
            if figures["score"] > most:
                best, most = (i, j), figures["score"]
    if not rows:
        raise FloatingPointError(_NOT_FINITE)
    found: dict[str, Any] = {"grid": rows, "unedited": unedited}
    return best, found


def _selection(key: PRNGKeyArray, task: Task, gone: tuple[int, ...]) -> Selection:
    config = task.config
    images = None if config.select_on == "test" else config.select_images
    return selection_of(key, task.problem, gone, images=images, batch_size=config.batch_size)


def _point(
    key: PRNGKeyArray, task: Task, variables: Variables, gone: tuple[int, ...]
) -> dict[str, Any]:
    """Accuracies with these classes gone."""
    return {"classes": gone} | scored(task.problem, variables, _selection(key, task, gone))


def layers_to_edit(
    problem: UnlearningProblem, config: DeepUnlearningConfig
) -> dict[str, LayerSpec]:
    """The layers that the config names; refuses settings that do not fit. Computes nothing."""
    check_settings(problem, config)
    specs = describe_layers(problem.apply_fn, problem.variables, problem.forget.inputs[:1])
    patterns = config.layer_filter or ("*",)
    if idle := [p for p in patterns if not any(fnmatchcase(path, p) for path in specs)]:
        raise ValueError(f"layer_filter: no layer matches {idle}; the model has {', '.join(specs)}")
    specs = {p: s for p, s in specs.items() if any(fnmatchcase(p, glob) for glob in patterns)}
    readers = Counter(spec.kernel_path for spec in specs.values())
    if tied := sorted(path for path, count in readers.items() if count > 1):
        raise ValueError(
            f"several layers share the kernels {tied}, so that one edit would undo the other; "
            "leave all of these layers but one out with layer_filter"
        )
    return specs


def _notes(task: Task, now: tuple[int, ...], gone: tuple[int, ...]) -> list[str]:
    notes = []
    if task.config.searches and task.config.select_on == "test":
        notes.append("The pair of alphas was chosen on test data: its figures are an upper bound.")
    if task.problem.grams is not None and now != gone:
        notes.append("Edited weights were edited again with the Grams of the model before.")
    return notes


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
