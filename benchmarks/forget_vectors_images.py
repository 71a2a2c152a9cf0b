r"""How far do forget vectors reach on images: every class, two classes, a random tenth?

The frozen model of a config. Vectors are learned on a tenth of every class, for 20 epochs, and
judged on all images of the forgotten class (or the random tenth), on 5,000 fixed retain images and
on the whole test set. Each class gets the smallest weight of the forget data (β) of the grid with
which 99 % of the images that it was learned on are wrong: no test data, no retrained model. Beside
every vector stand the model without it and a random vector of the same norm. Two classes, and a
random tenth of all images, are answered directly and by a weighted sum of the classes' vectors.

    python -m benchmarks.forget_vectors_images configs/cifar10_resnet20_forget_vector.toml

Vectors are kept in the run folder as they come, so that a run that was stopped goes on; their
seconds are those of the run that learned them. ``--share 1`` learns on all data. ``--timed`` only
measures ten vectors together against one after another, on a fiftieth.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.common import method_key, print_table, save_results, stored
from jaxunlearn.batches import Batches
from jaxunlearn.config import load_config, to_mapping
from jaxunlearn.evaluation.membership import svc_confidence_optml
from jaxunlearn.evaluation.metrics import confidence
from jaxunlearn.evaluation.report import predict
from jaxunlearn.experiment import run
from jaxunlearn.forget_vector_report import guarded, with_random_delta
from jaxunlearn.methods import (
    ForgetVectorsConfig,
    UnlearningProblem,
    compose,
    learn_forget_vectors,
)
from jaxunlearn.methods.forget_vectors_effect import ENOUGH, effect
from jaxunlearn.preparation import prepare, unlearning_problem

COLUMNS = ("ua", "ra", "ta", "pr", "mia_efficacy", "norm", "outside")
PAIR = (0, 1)


class Request(NamedTuple):
    """What is to be forgotten, as rows of the train and test sets; learned on a share of it."""

    forget: np.ndarray
    retain: np.ndarray
    forget_test: np.ndarray
    retain_test: np.ndarray
    classes: tuple[int, ...]


def main() -> None:
    """Learn, judge, save, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    parser.add_argument("--share", type=float, default=0.1, help="of every class, to learn on")
    parser.add_argument("--betas", type=float, nargs="+", default=[3.0, 5.0, 10.0])
    parser.add_argument("--random-betas", type=float, nargs="+", default=[3.0, 10.0])
    parser.add_argument("--timed", action="store_true", help="only together against one by one")
    options = parser.parse_args()
    name = f"{options.config.stem}s"
    bench = Bench(options.config, options.overrides, 0.02 if options.timed else options.share)
    settings = {
        "config": {k: v for k, v in to_mapping(bench.prepared.config).items() if k != "out"},
        "recipe": asdict(bench.config),
        "learned on": len(bench.rows),
    }
    if options.timed:
        seconds = timed(bench)
        claim = "Ten vectors mapped over in one program, against one after another."
        save_results(f"{name}_timed", claim=claim, settings=settings, rows=seconds)
        print_table(seconds, {"way": "", "seconds": ".1f"})
        return
    bank, rows = by_class(bench, sorted(options.betas))
    rows += by_request(bench, bank, min(options.betas), options.random_betas)
    settings |= {"share": options.share, "betas": options.betas, "summary": summarised(rows)}
    claim = " ".join(__doc__.split("\n\n")[1].split())
    save_results(name, claim=claim, settings=settings, rows=rows)
    print_table(settings["summary"], {"setting": ""} | dict.fromkeys(COLUMNS, ".3f"))
    requests = [row for row in rows if row["what"] == "request"]
    print_table(requests, {"setting": "", "ua": ".3f", "ra": ".3f", "ta": ".3f"})


class Bench:
    """A model, its data, and the share of them that vectors are learned on."""

    def __init__(self, path: Path, overrides: list[str], share: float):
        run(load_config(path, overrides), until="train")
        self.prepared = prepare(load_config(path, overrides))
        self.config: ForgetVectorsConfig = self.prepared.method_config
        self.variables = stored(self.prepared, "original")
        self.key = method_key(self.prepared.config.seed)
        self.train, self.test = self.prepared.source.train, self.prepared.source.test
        self.labels = np.asarray(self.train.labels)
        self.classes = np.arange(self.prepared.source.num_classes)
        rng = np.random.default_rng(self.prepared.config.seed)
        self.order = rng.permutation(len(self.labels))
        own = [self.order[self.labels[self.order] == c] for c in self.classes]
        self.rows = np.sort(np.concatenate([r[: round(share * len(r))] for r in own]))
        self.folder = Path(self.prepared.config.out) / f"vectors_{share:g}"
        self.folder.mkdir(parents=True, exist_ok=True)
        scale = self.prepared.config.data.scale or self.prepared.source.scale
        self.scale = scale
        self.forward = guarded(self.prepared.network.apply_fn, scale=scale, clip=self.config.clip)

    def of_classes(self, classes: tuple[int, ...]) -> Request:
        """Forget all images of these classes."""
        gone, test = np.isin(self.labels, classes), np.isin(self.test.labels, classes)
        return self._request(gone, np.flatnonzero(test), np.flatnonzero(~test), classes)

    def at_random(self, share: float) -> Request:
        """Forget this share of the images of every class."""
        gone = np.zeros(len(self.labels), bool)
        for c in self.classes:
            own = self.order[self.labels[self.order] == c]
            known = np.isin(own, self.rows)
            for part in (own[known], own[~known]):  # of what is learned on, and of the others
                gone[part[: round(share * len(part))]] = True
        return self._request(gone, np.zeros(0, int), np.arange(len(self.test.labels)), ())

    def _request(self, gone: np.ndarray, *test: Any) -> Request:
        return Request(np.flatnonzero(gone), self.order[~gone[self.order]], *test)

    def problem(self, request: Request) -> UnlearningProblem:
        """The share of a request that is learned on."""
        gone, kept = (r[np.isin(r, self.rows)] for r in (request.forget, np.sort(request.retain)))
        return replace(
            unlearning_problem(self.prepared, self.variables),
            forget=self._batches(gone),
            retain=self._batches(kept),
            forget_classes=request.classes,
        )

    def _batches(self, rows: np.ndarray) -> Batches:
        return Batches(self.train.inputs[rows], self.labels[rows], self.config.batch_size)

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, np.ndarray]:
        """What was made before, or what is made now, with its seconds."""
        file = self.folder / f"{name}.npz"
        if not file.exists():
            started = time.perf_counter()
            made = {k: np.asarray(v) for k, v in make().items()}
            made["seconds"] = np.array(time.perf_counter() - started)
            np.savez(file.with_suffix(".part.npz"), **made)
            file.with_suffix(".part.npz").rename(file)
            print(f"{name}: {made['seconds']:.0f} s", flush=True)
        with np.load(file) as found:
            return dict(found)

    def learned(self, name: str, request: Request, beta: float) -> dict[str, np.ndarray]:
        """The vector of a request, and its figures on what it was learned on."""

        def make() -> dict[str, Any]:
            problem = self.problem(request)
            flags = np.arange(len(self.rows))[None] < problem.forget.num_examples
            config = replace(self.config, beta=beta)
            delta = learn_forget_vectors(self.key, problem, flags, config).deltas
            found = effect(problem, delta, flags, config)
            return {
                "delta": delta[0],
                "ua": found.forget_error[0],
                "ra": found.retain_accuracy[0],
                "outside": found.outside[0],
            }

        return self.kept(f"{name}_{beta:g}", make)

    def figures(self, variables: Any, request: Request) -> dict[str, float | None]:
        """UA, RA, TA, PR and the membership attack of a model, guarded or not."""
        sample = request.retain[:5000]
        parts = [
            (self.train.inputs[request.forget], self.labels[request.forget]),
            (self.train.inputs[sample], self.labels[sample]),
            (self.test.inputs, np.asarray(self.test.labels)),
        ]
        inputs, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
        logits = predict(self.forward, variables, Batches(inputs, labels, 500))
        right, p = logits.argmax(-1) == labels, np.asarray(confidence(logits, labels))
        ends = np.cumsum([len(part[1]) for part in parts])[:-1]
        (forget, retain, test), (p_f, p_r, p_t) = np.split(right, ends), np.split(p, ends)
        unseen = test[request.forget_test]
        attack = svc_confidence_optml(p_r, p_t[request.retain_test], p_f)
        return {
            "ua": 1 - forget.mean(),
            "ra": retain.mean(),
            "ta": test[request.retain_test].mean(),
            "pr": 1 - unseen.mean() if unseen.size else None,
            "mia_efficacy": attack.efficacy,
        }

    def rows_of(self, delta: np.ndarray, request: Request, **row: Any) -> Iterator[dict[str, Any]]:
        """The figures with a vector and with a random one of its norm."""
        variables = {**self.variables, "guard": {"delta": jax.numpy.asarray(delta)}}
        random = with_random_delta(self.key, variables)
        for model, own in (("with", variables), ("random", random)):
            shifted = self.train.inputs[self.rows[:1000]] / self.scale + own["guard"]["delta"]
            size = {
                "norm": float(np.linalg.norm(delta)),
                "norm_linf": float(np.abs(own["guard"]["delta"]).max()),
                "outside": float(np.mean((shifted < 0) | (shifted > 1))),
            }
            yield row | {"model": model} | self.figures(own, request) | size


def by_class(bench: Bench, betas: list[float]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Bank of the smallest β, and rows of every class: with that β, and with the one chosen."""
    rows, bank = [], []
    for c in bench.classes.tolist():
        request, tried = bench.of_classes((c,)), []
        for beta in betas:
            tried.append((beta, bench.learned(f"class_{c}", request, beta)))
            if tried[-1][1]["ua"] >= ENOUGH:
                break
        bank.append(tried[0][1]["delta"])
        enough = tried[-1][1]["ua"] >= ENOUGH
        best = tried[-1] if enough else max(tried, key=lambda t: t[1]["ua"])
        base = {"what": "class", "class": c}
        none = {"model": "without", "norm": 0.0, "norm_linf": 0.0, "outside": 0.0}
        without = bench.figures(bench.variables, request)
        rows.append(base | {"setting": "no vector"} | without | none)
        judged: dict[float, list[dict[str, Any]]] = {}
        for setting, (beta, found) in ((f"β = {betas[0]:g}", tried[0]), ("β chosen", best)):
            if beta not in judged:
                judged[beta] = list(bench.rows_of(found["delta"], request))
            own = {"beta": beta, "seconds": float(found["seconds"])}
            own |= {"setting": setting, "ua_learned": float(found["ua"])}
            rows += [base | own | row for row in judged[beta]]
        print(rows[-2], flush=True)
    return np.stack(bank), rows


def by_request(
    bench: Bench, bank: np.ndarray, beta: float, random_betas: list[float]
) -> list[dict[str, Any]]:
    """Two classes, and a random tenth at several β: directly, and from the bank."""
    pair, sample = bench.of_classes(PAIR), bench.at_random(0.1)
    title = f"classes {PAIR[0]} and {PAIR[1]}"
    asked = [(title, pair, [beta]), ("random 10 %", sample, sorted(random_betas))]
    rows = []
    for title, request, used in asked:
        stem = title.replace(" %", "").replace(" ", "_")
        ways = {f"{title}, no vector": (np.zeros_like(bank[0]), 0.0)}
        for beta in used:
            direct = bench.learned(stem, request, beta)
            ways[f"{title}, direct, β = {beta:g}"] = direct["delta"], float(direct["seconds"])
            weighed = composed(bench, stem, request, bank, beta)
            delta = np.tensordot(weighed["weights"], bank, 1)
            ways[f"{title}, weighted sum, β = {beta:g}"] = delta, float(weighed["seconds"])
        if request.classes:
            ways[f"{title}, plain sum"] = bank[list(request.classes)].sum(0), 0.0
        for setting, (delta, seconds) in ways.items():
            row = {"what": "request", "setting": setting, "seconds": seconds}
            rows.append(next(bench.rows_of(delta, request, **row)))
            print(rows[-1], flush=True)
    return rows


def composed(
    bench: Bench, stem: str, request: Request, bank: np.ndarray, beta: float
) -> dict[str, np.ndarray]:
    """Learned weights of the bank."""

    def make() -> dict[str, Any]:
        config = replace(bench.config, beta=beta)
        return {"weights": compose(bench.key, bench.problem(request), bank, config).weights}

    return bench.kept(f"{stem}_composed_{beta:g}", make)


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over the classes, of every setting and model."""
    own = [row for row in rows if row["what"] == "class"]
    summary = []
    for setting, model in dict.fromkeys((row["setting"], row["model"]) for row in own):
        part = [row for row in own if (row["setting"], row["model"]) == (setting, model)]
        line: dict[str, Any] = {"setting": f"{setting}, {model}"}
        for name in COLUMNS:
            values = [row[name] for row in part]
            line |= {name: float(np.mean(values)), f"{name}_sd": float(np.std(values, ddof=1))}
        summary.append(line)
    return summary


def timed(bench: Bench) -> list[dict[str, Any]]:
    """Seconds of one epoch of ten vectors, either way; programs are compiled beforehand."""
    problem = bench.problem(bench.of_classes((0,)))
    labels = np.concatenate([problem.forget.labels, problem.retain.labels])
    flags, config = labels[None] == bench.classes[:, None], replace(bench.config, epochs=1)
    ways, rows = {"together": len(flags), "one after another": 1}, []
    for _ in range(3):
        for way, at_once in ways.items():
            started = time.perf_counter()
            found = learn_forget_vectors(bench.key, problem, flags, config, at_once=at_once)
            jax.block_until_ready(found.deltas)
            rows.append({"way": way, "seconds": time.perf_counter() - started})
    return rows[len(ways) :]  # the first of each compiled


if __name__ == "__main__":
    main()
