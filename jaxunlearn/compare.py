"""Several methods and seeds on one problem, under one contract and in one table.

For every seed an original and a retrained model are trained, or taken from where an earlier
comparison left them; every method starts from the same original. A method that fails or diverges is
a row that says so. Rows are kept as they come, so a comparison that was stopped goes on.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from jaxunlearn.assessment import measured_rows
from jaxunlearn.batches import Batches
from jaxunlearn.compare_config import Comparison, Entry
from jaxunlearn.config import fingerprint, to_mapping
from jaxunlearn.environment import describe_environment
from jaxunlearn.evaluation.report import evaluate_model, gap_to_retrain, json_value, predict
from jaxunlearn.experiment import identity_of, run_folder, run_keys, trained
from jaxunlearn.forget_vector_report import guarded
from jaxunlearn.methods import METHODS
from jaxunlearn.methods.base import all_finite
from jaxunlearn.preparation import Prepared, has_reference, prepare, unlearning_problem, with_method
from jaxunlearn.report.comparison import summarised, write_comparison
from jaxunlearn.stages import measured, write_json

SCHEMA_VERSION = 1
_GAPS = ("forget_train", "retain_train", "retain_test", "mia")  # the papers' average gap
_COLLAPSED = 0.05  # above chance, on retain data

Judge = Callable[..., dict[str, Any]]  # variables, and clip of a guard


def compare(
    comparison: Comparison, *, models: Path | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Carry out a comparison in its folder, ``comparison.base.out``.

    The folder gets ``compare.json``, ``compare.md`` and ``compare.png``, ``rows/*.json`` as they
    come, and ``models/KEY`` with the trained models, where KEY names data, forget set, network,
    recipe and seed.

    Args:
      comparison: from :func:`jaxunlearn.compare_config.load_comparison`.
      models: where trained models are kept instead, to be shared by several comparisons.
      console: where training and rows are shown; None shows none.

    Returns:
      The content of ``compare.json``: ``rows``, one for each method and seed, after those of the
      original and the retrained model; ``summary``, one for each method.

    Raises:
      ValueError: see :func:`jaxunlearn.preparation.prepare`; settings that a method refuses, named
        by its title. What goes wrong later is a row's ``reason``.
    """
    base, out = prepare(comparison.base), Path(comparison.base.out)
    runs = {entry.title: _with_entry(base, entry) for entry in comparison.entries}
    judge = _judge(base)
    (out / "rows").mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in comparison.seeds:
        start = _start(base, seed, models or out / "models", judge, console)
        rows += start.rows
        for entry in comparison.entries:
            work = partial(_carried_out, runs[entry.title], entry, start, judge)
            rows.append(_kept(_row_file(out / "rows", entry, start, comparison), work))
            _tell(rows[-1], console)
    content = json_value(
        {
            "schema_version": SCHEMA_VERSION,
            "config": {k: v for k, v in to_mapping(comparison.base).items() if k != "unlearn"},
            "seeds": comparison.seeds,
            "methods": [asdict(entry) for entry in comparison.entries],
            "environment": describe_environment(comparison.base.devices),
            "forget_classes": base.splits.forget_classes,
            "rows": rows,
            "summary": summarised(rows),
            "notes": _notes(base),
        }
    )
    write_comparison(out, content)
    return content


class _Start(NamedTuple):
    """What all methods of a seed start from and are compared with.

    Attributes:
      key: of the methods.
      models: name of the folder that the models are in.
      original: variables.
      retrained: what the retrained model does, or None.
      rows: of the original and the retrained model.
    """

    seed: int
    key: jax.Array
    models: str
    original: Any
    retrained: dict[str, Any] | None
    rows: list[dict[str, Any]]


def _start(
    base: Prepared, seed: int, models: Path, judge: Judge, console: Console | None
) -> _Start:
    seeded = base._replace(config=replace(base.config, seed=seed))
    stages = identity_of(seeded)
    stages.pop("unlearned")
    name = fingerprint(json_value(stages | {"forget": base.splits.forget.tolist()}))
    seeded = seeded._replace(config=replace(seeded.config, out=str(models / name)))
    given, _, records = trained(seeded, run_folder(seeded), console)
    judged = {model: judge(v) for model, v in given.items() if v is not None}
    seconds = {"original": records["train"], "retrained": records.get("retrain", {})}
    rows = [
        _row(model, model, seed, figures, judged.get("retrained"))
        | {"seconds": None if "given" in seconds[model] else seconds[model]["seconds"]}
        for model, figures in judged.items()
    ]
    key = run_keys(seeded.config)["unlearn"]
    return _Start(seed, key, name, given["original"], judged.get("retrained"), rows)


def _row_file(folder: Path, entry: Entry, start: _Start, comparison: Comparison) -> Path:
    """Named after all that the row depends on."""
    evaluate = asdict(comparison.base.evaluate)
    content: dict[str, Any] = {"entry": asdict(entry), "models": start.models, "evaluate": evaluate}
    if entry.skip is None and "surrogate" in METHODS[entry.unlearn.method].needs:
        content["surrogate"] = comparison.base.data.surrogate
    title = re.sub(r"\W+", "_", entry.title).strip("_")
    return folder / f"{title}_{start.seed}_{fingerprint(json_value(content))}.json"


def _with_entry(base: Prepared, entry: Entry) -> Prepared:
    """The problem with a method of the comparison; refused now if it cannot be."""
    if entry.skip is not None and entry.unlearn.method not in METHODS:
        raise ValueError(f"compare.methods.{entry.title}: no method {entry.unlearn.method!r}")
    if entry.skip is not None:
        return base
    try:
        return with_method(base, entry.unlearn)
    except ValueError as error:
        raise ValueError(f"compare.methods.{entry.title}: {error}") from error


def _judge(base: Prepared) -> Judge:
    """Accuracies and the membership attack of variables, guarded where they hold a guard."""
    config, k = base.config, base.source.num_classes
    rows = measured_rows(base.source, base.splits, config.evaluate, config.seed)
    data = {
        split: Batches(examples.inputs[at], examples.labels[at], config.evaluate.batch_size)
        for split, (examples, at) in rows.items()
        if len(at)
    }
    scale = config.data.scale or base.source.scale
    fronts = {
        clip: guarded(base.network.apply_fn, scale=scale, clip=clip) for clip in (False, True)
    }
    empty = np.zeros((0, k), np.float32), np.zeros(0, np.int32)

    def judge(variables: Any, clip: bool = False) -> dict[str, Any]:
        outputs = dict.fromkeys(rows, empty)
        for split, batches in data.items():
            logits = predict(fronts[clip], variables, batches)
            outputs[split] = logits, np.asarray(batches.labels)
        evaluate = config.evaluate
        return evaluate_model(outputs, k, members=evaluate.members, seed=config.seed)

    return judge


def _carried_out(prepared: Prepared, entry: Entry, start: _Start, judge: Judge) -> dict[str, Any]:
    """A row of one method and seed, whatever becomes of it."""
    name = entry.unlearn.method
    row = _row(entry.title, name, start.seed, None, None)
    if entry.skip is not None:
        return row | {"status": "skipped", "reason": entry.skip}
    try:
        with measured() as cost:
            problem = unlearning_problem(prepared, start.original)
            result = prepared.method.run(start.key, problem, prepared.method_config)
            jax.block_until_ready(result.variables)
        seconds, info = cost().seconds, result.info
        if info.get("diverged") or not all_finite(result.variables):
            reason = "a loss or a weight was no longer finite"
            return row | {"status": "diverged", "reason": reason, "seconds": seconds}
        clip = prepared.method.guards and prepared.method_config.clip
        figures = judge(result.variables, clip)
    except FloatingPointError as error:
        return row | {"status": "diverged", "reason": str(error)}
    except Exception as error:  # of any kind: the other rows shall be made all the same
        return row | {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    row = _row(entry.title, name, start.seed, figures, start.retrained) | {"seconds": seconds}
    passes = {f"{side}_passes": info.get(f"{side}_passes") for side in ("forget", "retain")}
    used = {"needs": sorted(METHODS[name].needs), **passes}
    chance = 1 / prepared.source.num_classes
    if row["accuracy"]["retain_train"] < chance + _COLLAPSED:
        row |= {"status": "diverged", "reason": "the retain data are at the level of chance"}
    return row | {"data_used": used, "notes": info.get("notes", [])}


def _row(
    title: str,
    method: str,
    seed: int,
    model: dict[str, Any] | None,
    retrained: dict[str, Any] | None,
) -> dict[str, Any]:
    gap = None
    if model is not None and retrained is not None:
        signed = (gap_to_retrain({"it": model, "retrained": retrained}) or {})["it"]
        known = [abs(signed[name]) for name in _GAPS if signed[name] is not None]
        gap = signed | {"mean": float(np.mean(known))}
    return json_value(
        {
            "title": title,
            "method": method,
            "seed": seed,
            "status": "ok",
            "reason": None,
            "accuracy": None if model is None else model["accuracy"],
            "mia": None if model is None else model["mia"],
            "gap": gap,
            "seconds": None,
            "data_used": None,
            "notes": [],
        }
    )


def _kept(file: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row that an earlier call left, or one that is made now and left. Failures are repeated."""
    if file.exists():
        return json.loads(file.read_text())
    row = json_value(work())
    if row["status"] != "failed":
        write_json(file, row)
    return row


def _tell(row: Mapping[str, Any], console: Console | None) -> None:
    if console is None:
        return
    said = row["reason"] or ", ".join(
        f"{split} {value:.1%}" for split, value in row["accuracy"].items() if value is not None
    )
    line = f"seed {row['seed']}, {row['title']}: {row['status']}; {said}"
    console.print(line, highlight=False, markup=False)


def _notes(base: Prepared) -> list[str]:
    notes = [
        "Seconds are those of the call, with the compilation that its first one needs; of several "
        "seeds the table has the median."
    ]
    if not has_reference(base.config):
        notes.append("No retrained model, so there are no gaps, and nothing is called nearest.")
    return notes
