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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.layers import LayerSpec
from jaxunlearn.methods.alpha_grid import Grid, edited_kernels, with_kernels
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, all_finite, check_problem
from jaxunlearn.methods.collection import Task, collect
from jaxunlearn.methods.deep_unlearning_config import DeepUnlearningConfig, check_settings
from jaxunlearn.methods.diagnostics import edit_figures
from jaxunlearn.methods.selection import Selection, scored, training_selection
from jaxunlearn.methods.spaces import spectra

NEEDS = frozenset({"forget", "retain"})
SCOPES = frozenset({"class", "classes", "samples"})

Variables = Mapping[str, Any]


def deep_unlearning(
    key: PRNGKeyArray, problem: UnlearningProblem, config: DeepUnlearningConfig | None = None
) -> Unlearned:
    """Unlearn classes or samples by one closed-form edit of the kernels.

    Two forward passes over ``samples`` images each, two Cholesky factorisations per layer and pair
    of alphas (``d³/3`` flops each), and for a grid one evaluation of ``select_images`` training
    images per pair. Memory: two Grams per layer, and one copy of the kernels per pair.

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
    """
    config = config or DeepUnlearningConfig()
    check_problem(problem, method="deep_unlearning", needs=NEEDS, scopes=SCOPES)
    check_settings(problem, config)
    specs = _layers_to_edit(problem, config)
    task = Task(problem, config, specs, layer_inputs(problem.apply_fn, specs))
    select_key, key = jax.random.split(key)
    selection = _selection(select_key, task)
    classes = problem.forget_classes
    if not config.sequential or len(classes) < 2:
        variables, info = _edit(key, task, problem.variables, selection, classes, classes)
        if config.curve and info["alpha_retain"] is not None:
            chosen = ([info["alpha_retain"]], [info["alpha_forget"]])
            info |= _curve_of_prefixes(key, task, selection, chosen)
        return Unlearned(variables, info)

    return _one_after_another(key, task, selection)


def _one_after_another(key: PRNGKeyArray, task: Task, selection: Selection | None) -> Unlearned:
    """An edit for each class, from the weights that the one before left."""
    variables, classes = task.problem.variables, task.problem.forget_classes
    curve, steps = [], []
    seconds: dict[str, float] = {}
    for i, k in enumerate(classes):
        gone = classes[: i + 1]
        step_key = jax.random.fold_in(key, i)
        variables, info = _edit(step_key, task, variables, selection, (k,), gone)
        curve.append(_point(task, variables, selection, gone))
        names = ("alpha_retain", "alpha_forget", "unedited")
        steps.append({"class": k} | {name: info[name] for name in names})
        seconds = {part: seconds.get(part, 0) + s for part, s in info["seconds"].items()}
    # What is left of info describes the last edit; its grid would pass for that of all.
    info |= {"curve": curve, "order": "one after another", "steps": steps, "seconds": seconds}
    return Unlearned(variables, info | {"grid": []})


def _edit(
    key: PRNGKeyArray,
    task: Task,
    variables: Variables,
    selection: Selection | None,
    now: tuple[int, ...],
    gone: tuple[int, ...],
    grid: Grid | None = None,
) -> tuple[Variables, dict[str, Any]]:
    """One request: collect, edit for every pair, keep the best."""
    specs, alphas = task.specs, grid or task.config.grid
    seconds: dict[str, float] = {}
    with _timed(seconds, "grams"):
        collected = jax.block_until_ready(collect(key, task, variables, now=now, gone=gone))
    with _timed(seconds, "solve"):
        edited = edited_kernels(
            specs, variables["params"], collected, alphas, solver=task.config.solver
        )
        jax.block_until_ready(edited)
    rows: list[dict[str, float]] = []
    unedited, best = None, (0, 0)
    pairs = [(i, j) for i in range(len(alphas[0])) for j in range(len(alphas[1]))]
    if len(pairs) > 1:
        assert selection is not None  # check_settings
        shown = selection.with_gone(gone) if gone else selection
        with _timed(seconds, "score"):
            unedited = scored(task.problem, variables, shown)
            for i, j in pairs:
                candidate = with_kernels(specs, variables, edited, i, j)
                row = {"alpha_retain": alphas[0][i], "alpha_forget": alphas[1][j]}
                rows.append(row | scored(task.problem, candidate, shown))
        best = pairs[int(np.argmax([row["score"] for row in rows]))]  # the first of equals
    info: dict[str, Any] = {"grid": rows, "unedited": unedited}
    counts = {side: int(next(iter(m.values())).count) for side, m in collected._asdict().items()}
    info |= {"images": counts, "seconds": seconds}
    info["notes"] = _notes(task, now, gone)
    if task.config.solver == "eigh":
        info["spectra"] = spectra(collected)
    if unedited is not None and max(row["score"] for row in rows) <= unedited["score"]:
        info["notes"].append(
            "No pair of the grid scored above the unedited model, which is returned as it was."
        )
        return variables, info | {"alpha_retain": None, "alpha_forget": None, "layers": {}}
    result = with_kernels(specs, variables, edited, *best)
    if not all_finite(result["params"]):
        raise FloatingPointError(
            "deep_unlearning: an edited kernel is not finite; wanted alphas of at most 3000, which "
            "are safe in float32, and Grams without negative eigenvalues"
        )
    info |= {"alpha_retain": alphas[0][best[0]], "alpha_forget": alphas[1][best[1]]}
    info["layers"] = edit_figures(specs, collected.retain, collected.forget, variables, result)
    return result, info


def _curve_of_prefixes(
    key: PRNGKeyArray, task: Task, selection: Selection | None, chosen: Grid
) -> dict[str, Any]:
    """The first class forgotten, the first two, and so on, each from the original model."""
    curve, classes = [], task.problem.forget_classes
    for m in range(1, len(classes) + 1):
        gone = classes[:m]
        variables, _ = _edit(key, task, task.problem.variables, None, gone, gone, chosen)
        curve.append(_point(task, variables, selection, gone))
    return {"curve": curve, "order": "together"}


def _point(
    task: Task, variables: Variables, selection: Selection | None, gone: tuple[int, ...]
) -> dict[str, Any]:
    assert selection is not None  # check_settings
    return {"classes": gone} | scored(task.problem, variables, selection.with_gone(gone))


def _selection(key: PRNGKeyArray, task: Task) -> Selection | None:
    problem, config = task.problem, task.config
    if config.select_on == "test":
        assert problem.selection is not None  # check_settings
        forget, retain = problem.selection
        size = config.batch_size
        return Selection(forget.with_batch_size(size), retain.with_batch_size(size))
    if problem.retain is None:
        return None
    return training_selection(
        key, problem, images=config.select_images, batch_size=config.batch_size
    )


def _layers_to_edit(
    problem: UnlearningProblem, config: DeepUnlearningConfig
) -> dict[str, LayerSpec]:
    specs = describe_layers(problem.apply_fn, problem.variables, problem.forget.inputs[:1])
    patterns = config.layer_filter
    if patterns is None:
        return specs
    if idle := [p for p in patterns if not any(fnmatchcase(path, p) for path in specs)]:
        raise ValueError(f"layer_filter: no layer matches {idle}; the model has {', '.join(specs)}")
    return {p: s for p, s in specs.items() if any(fnmatchcase(p, pattern) for pattern in patterns)}


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
