"""A budgeted search for a method's settings, by the gap to the retrained model on validation data.

    gap = mean of |Δ accuracy| on forget training data, retain training data and validation data

with Δ the difference to the retrained model of the same seed. Test data are never touched. The
validation data are the retained ones: without those of forgotten classes. Optuna proposes settings
(TPE) and keeps every trial in its journal, so a search that was stopped goes on.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from jaxunlearn.assessment import retain_sample
from jaxunlearn.batches import Batches
from jaxunlearn.config import UnlearnConfig, fingerprint, to_mapping
from jaxunlearn.environment import describe_environment
from jaxunlearn.evaluation.report import json_value
from jaxunlearn.experiment import run_folder, run_keys, trained
from jaxunlearn.forget_vector_report import guarded
from jaxunlearn.methods.base import all_finite
from jaxunlearn.preparation import (
    Prepared,
    has_reference,
    prepare,
    retained_validation,
    unlearning_problem,
    with_method,
)
from jaxunlearn.report.files import json_bytes, write_files
from jaxunlearn.stages import measured
from jaxunlearn.training import accuracy
from jaxunlearn.tune_config import Axis, Search

SCHEMA_VERSION = 1
_WORST = 1.0  # of a trial that failed: no gap is larger


def tune(search: Search, *, console: Console | None = None) -> dict[str, Any]:
    """Carry out a search in its folder, ``search.base.out``.

    The folder gets ``tune.json`` and ``best.toml``, a config that ``jaxunlearn run`` takes, with
    the settings of the least gap; ``journal.log``, Optuna's; and ``models/SEED``, trained models.

    Args:
      search: from :func:`jaxunlearn.tune_config.load_search`.
      console: where training and trials are shown; None shows none.

    Returns:
      The content of ``tune.json``: ``trials``, each with ``settings``, ``gap``, ``accuracy`` (by
      seed), ``seconds``, ``status`` and ``reason``; ``best``, one of them; ``seconds`` of all.

    Raises:
      ImportError: Optuna is not installed.
      ValueError: no retrained model or no validation data to compare on; see
        :func:`jaxunlearn.preparation.prepare`; no trial succeeded.
    """
    optuna, toml = _libraries()
    base, out = prepare(search.base), Path(search.base.out)
    _check(base, search)
    judges = [_judge(base, seed, out / "models", console) for seed in search.tune.seeds]
    journal = optuna.storages.journal.JournalFileBackend(str(out / "journal.log"))
    study = optuna.create_study(
        study_name=_study_name(search),
        storage=optuna.storages.JournalStorage(journal),
        load_if_exists=True,
    )
    while (done := len(_finished(study))) < search.tune.trials:
        study.sampler = optuna.samplers.TPESampler(seed=search.base.seed + done)
        trial = study.ask()
        settings = {key: _proposed(trial, key, axis) for key, axis in search.tune.space.items()}
        row = _trial(base, search.base.unlearn, settings, judges)
        trial.set_user_attr("row", row)
        study.tell(trial, row["gap"])
        if console is not None:
            said = f"gap {row['gap']:.2%}" if row["status"] == "ok" else row["reason"]
            line = f"trial {done + 1} of {search.tune.trials}: {settings}: {said}"
            console.print(line, highlight=False, markup=False)
    rows = [trial.user_attrs["row"] for trial in _finished(study)]
    fine = [row for row in rows if row["status"] == "ok"]
    if not fine:
        raise ValueError(
            f"none of {len(rows)} trials succeeded; the last one: {rows[-1]['reason']}"
        )
    best = min(fine, key=lambda row: row["gap"])
    content = {
        "schema_version": SCHEMA_VERSION,
        **_content(search),
        "tune": asdict(search.tune),
        "environment": describe_environment(search.base.devices),
        "trials": rows,
        "best": best,
        "seconds": float(sum(row["seconds"] for row in rows)),
    }
    content = json_value(content)
    files = {"best.toml": _best(search, best, toml), "tune.json": json_bytes(content)}
    write_files(out, files)
    return content


def _libraries() -> tuple[ModuleType, ModuleType]:
    """Optuna, quiet, and the TOML writer."""
    try:
        import optuna
        import tomli_w
    except ImportError as error:
        raise ImportError(f'{error}; a search needs pip install "jaxunlearn[tune]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna, tomli_w


def _check(base: Prepared, search: Search) -> None:
    """Refuse what cannot be judged, and values that the method refuses, before work starts."""
    if not has_reference(search.base):
        raise ValueError(
            "retrain.enabled = false: a search needs the retrained model to compare with; leave "
            "that key out, or set retrain.checkpoint"
        )
    if not len(retained_validation(base)):
        raise ValueError(
            "data.validation = 0: a search compares on validation data, never on test data; write "
            "data.validation = 0.1, say"
        )
    for key, axis in search.tune.space.items():
        for value in axis.ends:
            try:
                with_method(base, _with(search.base.unlearn, {key: value}))
            except ValueError as error:
                raise ValueError(f"tune.space.{key}, value {value!r}: {error}") from error


class _Judge(NamedTuple):
    """A seed's original model, and what accuracies its retrained model has.

    Attributes:
      key: of the method.
      original: variables.
      data: what is compared on.
      target: accuracies of the retrained model.
    """

    seed: int
    key: jax.Array
    original: Any
    data: dict[str, Batches]
    target: dict[str, float]


def _judge(base: Prepared, seed: int, models: Path, console: Console | None) -> _Judge:
    config = replace(base.config, seed=seed, out=str(models / str(seed)))
    seeded = base._replace(config=config)
    given, _, _ = trained(seeded, run_folder(seeded), console)
    train, splits, size = base.source.train, base.splits, config.evaluate.batch_size
    rows = {
        "forget_train": splits.forget,
        "retain_train": retain_sample(splits, config.evaluate, base.config.seed),
        "validation": retained_validation(base),
    }
    data = {name: Batches(train.inputs[at], train.labels[at], size) for name, at in rows.items()}
    target = {
        name: accuracy(base.network.apply_fn, given["retrained"], batches)
        for name, batches in data.items()
    }
    return _Judge(seed, run_keys(config)["unlearn"], given["original"], data, target)


def _trial(
    base: Prepared, unlearn: UnlearnConfig, settings: dict[str, Any], judges: list[_Judge]
) -> dict[str, Any]:
    """One trial on every seed; one that fails or diverges gets the largest gap there is."""
    row: dict[str, Any] = {"settings": settings, "accuracy": {}, "status": "ok", "reason": None}
    gaps = []
    with measured() as cost:
        try:
            prepared = with_method(base, _with(unlearn, settings))
            clip = prepared.method.guards and prepared.method_config.clip
            scale = base.config.data.scale or base.source.scale
            forward = guarded(base.network.apply_fn, scale=scale, clip=clip)
            for judge in judges:
                problem = unlearning_problem(prepared, judge.original)
                found = prepared.method.run(judge.key, problem, prepared.method_config)
                if found.info.get("diverged") or not all_finite(found.variables):
                    raise FloatingPointError("a loss or a weight was no longer finite")
                figures = {
                    n: accuracy(forward, dict(found.variables), b) for n, b in judge.data.items()
                }
                row["accuracy"][str(judge.seed)] = figures
                gaps.append(np.mean([abs(figures[n] - judge.target[n]) for n in figures]))
        except FloatingPointError as error:
            row |= {"status": "diverged", "reason": str(error)}
        except Exception as error:  # of any kind: the search goes on
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    gap = float(np.mean(gaps)) if row["status"] == "ok" else _WORST
    return json_value(row | {"gap": gap, "seconds": cost().seconds})


def _proposed(trial: Any, key: str, axis: Axis) -> Any:
    if axis.choices is not None:
        return trial.suggest_categorical(key, list(axis.choices))
    whole = isinstance(axis.low, int) and isinstance(axis.high, int)
    suggest = trial.suggest_int if whole else trial.suggest_float
    return suggest(key, axis.low, axis.high, log=axis.log)


def _finished(study: Any) -> list[Any]:
    """Trials that were told their gap; one that was killed was not."""
    return [
        trial for trial in study.trials if "row" in trial.user_attrs and trial.state.is_finished()
    ]


def _with(unlearn: UnlearnConfig, settings: Mapping[str, Any]) -> UnlearnConfig:
    return replace(unlearn, options={**unlearn.options, **settings})


def _content(search: Search) -> dict[str, Any]:
    """What the search is about; the folder and the place of the data are not of it."""
    config = to_mapping(search.base)
    config.pop("out")
    config["data"].pop("data_dir")
    return {"config": config}


def _study_name(search: Search) -> str:
    """Names the search, but for its budget: a larger one goes on with the trials there are."""
    tune = {key: value for key, value in asdict(search.tune).items() if key != "trials"}
    return fingerprint(json_value({"tune": tune, **_content(search)}))


def _best(search: Search, best: Mapping[str, Any], toml: ModuleType) -> bytes:
    """The search's file without ``[tune]``, with the settings that were found."""
    tables = {k: v for k, v in search.tables.items() if k != "out"}
    unlearn = {"method": search.base.unlearn.method, **tables.get("unlearn", {})}
    said = f"# Settings found by a search: a gap of {best['gap']:.2%} on validation data.\n"
    return (said + toml.dumps({**tables, "unlearn": {**unlearn, **best["settings"]}})).encode()
