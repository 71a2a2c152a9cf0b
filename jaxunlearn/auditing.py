"""An audit: families of models, their answers to the same examples, and what these say.

Three independent streams of keys make N original, 2N retrained and, of every method, N unlearned
models, the i-th from the i-th original. Of each model its logits are kept, one file per model or
per chunk that was trained together: an audit that was stopped goes on.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from jaxunlearn.audit_config import Audit
from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn
from jaxunlearn.checkpoint import restore_variables, save_variables
from jaxunlearn.compare_config import Entry
from jaxunlearn.config import UnlearnConfig, fingerprint, to_mapping
from jaxunlearn.environment import describe_environment
from jaxunlearn.evaluation.audit import SPLITS, AuditDraws, audit
from jaxunlearn.evaluation.report import json_value, predict
from jaxunlearn.experiment import identity_of
from jaxunlearn.families import fit_family, member, trains_together
from jaxunlearn.forget_vector_report import guarded
from jaxunlearn.methods.base import all_finite
from jaxunlearn.preparation import (
    Prepared,
    optimizer_of,
    prepare,
    training_batches,
    unlearning_problem,
    with_method,
)
from jaxunlearn.report.audit_files import write_audit
from jaxunlearn.stored_audit import SCHEMA_VERSION

_TOGETHER = 32  # models in a chunk
_ANSWERED = 1000  # examples in a batch
_STREAMS = {"original": 0, "retrained": 1, "unlearned": 2}


class Sample(NamedTuple):
    """The examples that all models answer.

    Attributes:
      inputs: ``[n, ...]``.
      labels: ``[n]``.
      split: name of each example's split ``[n]``.
      rows: of each example in the train or the test set ``[n]``.
    """

    inputs: np.ndarray
    labels: np.ndarray
    split: np.ndarray
    rows: np.ndarray


def run_audit(asked: Audit, *, console: Console | None = None) -> dict[str, Any]:
    """Carry out an audit in its folder, ``asked.base.out``.

    The folder gets ``audit.html``, ``audit.json``, ``audit.md``, ``audit.png`` and ``audit.npz``
    (logits, labels, splits, rows and what is drawn, from which all can be had again:
    :func:`jaxunlearn.stored_audit.remake_audit`).

    Args:
      asked: from :func:`jaxunlearn.audit_config.load_audit`.
      console: where progress is shown; None shows none.

    Returns:
      The content of ``audit.json``: that of :func:`jaxunlearn.evaluation.audit.audit`, with
      ``config``, ``methods``, ``environment``, ``seconds`` of each stage, and ``failed``: methods
      that could not be judged, and why.

    Raises:
      ValueError: see :func:`jaxunlearn.preparation.prepare`; settings that a method refuses; splits
        without examples.
      FloatingPointError: a training diverged.
    """
    base, settings = prepare(asked.base), asked.settings
    controls = [Entry("do_nothing", UnlearnConfig("identity"))]
    if base.splits.forget_classes:
        controls.append(Entry("head_edit", UnlearnConfig("head_edit")))
    runs = {entry.title: with_method(base, entry.unlearn) for entry in (*controls, *asked.entries)}
    sample = _sample(base, settings.examples)
    families = _Families(base, sample, settings.models, len(runs), console)
    logits = {name: families.trained(name) for name in ("original", "retrained")}
    failed = {}
    for title, prepared in runs.items():
        try:
            logits[title] = families.unlearned(title, prepared)
        except FloatingPointError as error:
            failed[title] = str(error)
    started = time.perf_counter()
    draws = AuditDraws(
        permutations=settings.permutations, bootstraps=settings.bootstraps, seed=asked.base.seed
    )
    result = audit(logits, sample.labels, sample.split, goal=settings.goal, draws=draws)
    seconds = families.seconds | {"metrics": time.perf_counter() - started}
    content = json_value(
        {
            "schema_version": SCHEMA_VERSION,
            **result.content,
            "failed": failed,
            "config": {k: v for k, v in to_mapping(asked.base).items() if k != "unlearn"},
            "settings": asdict(settings),
            "environment": describe_environment(asked.base.devices),
            "forget_classes": base.splits.forget_classes,
            "class_names": base.source.class_names,
            "seconds": seconds,
        }
    )
    stored = {f"logits/{name}": stack for name, stack in logits.items()}
    examples = {name: getattr(sample, name) for name in ("labels", "split", "rows")}
    write_audit(Path(asked.base.out), content, stored | examples | result.arrays)
    return content


def _sample(base: Prepared, most: int) -> Sample:
    """Examples of every split, at most ``most`` of each, drawn by the seed."""
    rng = np.random.default_rng(base.config.seed)
    source, splits = base.source, base.splits
    test = rng.permutation(splits.retain_test)
    held_out = splits.forget_test
    if not len(held_out):  # samples: held-out data are any test images
        held_out, test = np.split(test, [len(test) // 3])
    population, test = np.split(test, [len(test) // 2])
    rows = {
        "forget": splits.forget,
        "retain": splits.retain,
        "held_out": held_out,
        "population": population,
        "test": test,
    }
    rows = {s: np.sort(rng.permutation(at)[:most]) for s, at in rows.items()}
    if empty := [name for name, at in rows.items() if len(at) < 2]:
        raise ValueError(f"no examples of {empty} for the audit: it needs test images of all kinds")
    parts = [
        (source.train if name in ("forget", "retain") else source.test, rows[name])
        for name in SPLITS
    ]
    inputs = np.concatenate([np.asarray(side.inputs)[at] for side, at in parts])
    labels = np.concatenate([np.asarray(side.labels)[at] for side, at in parts])
    split = np.repeat(SPLITS, [len(rows[name]) for name in SPLITS])
    return Sample(inputs, labels, split, np.concatenate([rows[name] for name in SPLITS]))


class _Families:
    """The families of an audit, each model made once and kept in the audit's folder."""

    def __init__(
        self, base: Prepared, sample: Sample, models: int, methods: int, console: Console | None
    ):
        self.base, self.sample, self.models, self.console = base, sample, models, console
        self.seconds: dict[str, float] = {}
        self.ready, self.wanted = 0, models * (3 + methods)
        self.batches = Batches(sample.inputs, sample.labels, _ANSWERED)
        stages = identity_of(base)
        stages.pop("unlearned")
        shown = {"forget": base.splits.forget.tolist(), "rows": sample.rows.tolist()}
        self.identity = {**stages, **shown, "models": models}
        self.folder = Path(base.config.out) / "families" / fingerprint(json_value(self.identity))
        batches = training_batches(base, base.splits.train)
        self.together = trains_together(base.network.apply_fn, base.network.template, batches)
        self.chunk = min(_TOGETHER, models) if self.together else 1

    def trained(self, name: str) -> np.ndarray:
        """Logits of the original or the retrained family; originals are kept for the methods."""
        base, config = self.base, self.base.config.train
        rows = base.splits.train if name == "original" else base.splits.retain
        batches = training_batches(base, rows)
        count = self.models * (1 if name == "original" else 2)
        keys = self._keys(name, count)
        apply_fn = base.network.apply_fn

        def make(first: int) -> np.ndarray:
            family = fit_family(
                keys[first : first + self.chunk],
                apply_fn,
                base.network.init,
                batches,
                optimizer=optimizer_of(config, len(batches)),
                epochs=config.epochs,
                augment=base.augment,
                together=self.together,
                mesh=base.mesh,
            )
            if name == "original":
                save_variables(self._originals(first), family)
            size = len(jax.tree.leaves(family)[0])
            return np.stack([self._answers(apply_fn, member(family, i)) for i in range(size)])

        return self._made(name, count, self.chunk, make)

    def unlearned(self, title: str, prepared: Prepared) -> np.ndarray:
        """Logits of what a method makes of every original."""
        keys, template = self._keys("unlearned", self.models), self.base.network.template
        scale = prepared.config.data.scale or prepared.source.scale
        clip = bool(prepared.method.guards and prepared.method_config.clip)
        front = guarded(prepared.network.apply_fn, scale=scale, clip=clip)

        def make(number: int) -> np.ndarray:
            first = number - number % self.chunk
            size = min(self.chunk, self.models - first)
            stack = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), template
            )
            family = self._restored(first, stack)
            problem = unlearning_problem(prepared, member(family, number - first))
            result = prepared.method.run(keys[number], problem, prepared.method_config)
            logits = self._answers(front, result.variables)
            if not (all_finite(result.variables) and np.isfinite(logits).all()):
                raise FloatingPointError(
                    f"{title}: weights or answers of model {number} are not finite"
                )
            return logits[None]

        settings: dict[str, Any] = asdict(prepared.config.unlearn)
        if "surrogate" in prepared.method.needs:
            settings["surrogate"] = prepared.config.data.surrogate
        name = f"{title}-{fingerprint(json_value(settings))}"
        return self._made(title, self.models, 1, make, file=name)

    def _answers(self, apply_fn: ApplyFn, variables: Any) -> np.ndarray:
        """Of one model at a time, so that doing nothing changes no bit."""
        return predict(apply_fn, variables, self.batches)

    def _keys(self, name: str, count: int) -> jax.Array:
        root = jax.random.fold_in(jax.random.key(self.base.config.seed), _STREAMS[name])
        return jax.random.split(root, count)

    def _originals(self, first: int) -> Path:
        return self.folder / "originals" / f"{first:05d}"

    def _restored(self, first: int, template: Any) -> Any:
        if getattr(self, "_cached", (None,))[0] != first:
            self._cached = first, restore_variables(self._originals(first), template)
        return self._cached[1]

    def _made(
        self,
        name: str,
        count: int,
        chunk: int,
        make: Callable[[int], np.ndarray],
        file: str | None = None,
    ) -> np.ndarray:
        """Logits ``[count, n, k]``: those that are kept, and the others made."""
        folder = self.folder / (file or name)
        folder.mkdir(parents=True, exist_ok=True)
        parts = []
        for first in range(0, count, chunk):
            path = folder / f"{first:05d}.npz"
            if fresh := not path.exists():
                started = time.perf_counter()
                logits = make(first)
                seconds = time.perf_counter() - started
                temporary = path.with_suffix(".part.npz")
                np.savez(temporary, logits=logits, seconds=seconds)
                temporary.rename(path)
            with np.load(path) as found:
                parts.append(found["logits"])
                self.seconds[name] = self.seconds.get(name, 0.0) + float(found["seconds"])
            self.ready += len(parts[-1])
            if fresh:
                self._tell(name, first + len(parts[-1]), count)
        return np.concatenate(parts)

    def _tell(self, name: str, done: int, count: int) -> None:
        """How far it is; the time left is that of models that take as long as those so far."""
        if self.console is not None and (done == count or done % max(1, count // 4) == 0):
            left = sum(self.seconds.values()) / self.ready * (self.wanted - self.ready)
            line = (
                f"{name}: {done} of {count} models; {self.ready} of {self.wanted} in all, "
                f"about {left:.0f} s left"
            )
            self.console.print(line, highlight=False, markup=False)
