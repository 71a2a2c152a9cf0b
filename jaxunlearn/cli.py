"""The command line: ``jaxunlearn run CONFIG``, its stages one by one, and a list of the methods."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Machine unlearning for JAX: train, unlearn, and see what was forgotten.",
)

Config = Annotated[
    Path, typer.Argument(help="TOML file of the run, such as configs/digits_unsc.toml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings in place of the file's: section.key=value, TOML values."),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Run folder; default runs/ and the config's name.")
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder of prepared tensorflow-datasets; or TFDS_DATA_DIR."),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights", help="Weights that PyTorch or Keras trained: .pth, .safetensors, .h5, .npz."
    ),
]
Devices = Annotated[
    int | None,
    typer.Option("--devices", help="Devices that share each batch; default 1. On a CPU, virtual."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    data_dir: DataDir = None,
    weights: Weights = None,
    devices: Devices = None,
    quiet: Quiet = False,
) -> None:
    """Train, unlearn, evaluate, report. Stages already done in the run folder are kept."""
    _carry_out("evaluate", config, overrides, out, data_dir, weights, devices, quiet)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    data_dir: DataDir = None,
    weights: Weights = None,
    devices: Devices = None,
    quiet: Quiet = False,
) -> None:
    """Only train the original and the retrained model."""
    _carry_out("train", config, overrides, out, data_dir, weights, devices, quiet)


@app.command()
def unlearn(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    data_dir: DataDir = None,
    weights: Weights = None,
    devices: Devices = None,
    quiet: Quiet = False,
) -> None:
    """Train where need be, then unlearn; no evaluation."""
    _carry_out("unlearn", config, overrides, out, data_dir, weights, devices, quiet)


@app.command()
def evaluate(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    data_dir: DataDir = None,
    weights: Weights = None,
    devices: Devices = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate and report what the run folder holds; missing stages are done first."""
    _carry_out("evaluate", config, overrides, out, data_dir, weights, devices, quiet)


@app.command()
def compare(
    config: Annotated[
        Path, typer.Argument(help="TOML file of a comparison: configs/digits_compare.toml.")
    ],
    overrides: Overrides = None,
    out: Out = None,
    models: Annotated[
        Path | None,
        typer.Option("--models", help="Folder of trained models, to share; default OUT/models."),
    ] = None,
    data_dir: DataDir = None,
    weights: Weights = None,
    devices: Devices = None,
    quiet: Quiet = False,
) -> None:
    """Several methods and seeds on one problem: compare.json, compare.md and a figure."""
    with _answered():
        from jaxunlearn.compare_config import load_comparison

        given = _given(overrides, out, data_dir, weights, devices)
        comparison = load_comparison(config, given)

        from jaxunlearn.compare import compare as run_comparison
        from jaxunlearn.report.comparison import findings

        console = _console()
        shown = None if quiet else console
        content = run_comparison(comparison, models=models, console=shown)
        for sentence in findings(content):
            console.print(sentence, highlight=False, markup=False)
        files = f"compare.json, compare.md and compare.png in {comparison.base.out}"
        console.print(files, highlight=False, markup=False, soft_wrap=True)


@app.command()
def tune(
    config: Annotated[
        Path, typer.Argument(help="TOML file of a search: a run's, with a table [tune].")
    ],
    overrides: Overrides = None,
    out: Out = None,
    data_dir: DataDir = None,
    weights: Weights = None,
    devices: Devices = None,
    quiet: Quiet = False,
) -> None:
    """Search a method's settings by the gap to the retrained model on validation data."""
    with _answered():
        from jaxunlearn.tune_config import load_search

        search = load_search(config, _given(overrides, out, data_dir, weights, devices))

        from jaxunlearn.tune import tune as run_search

        console = _console()
        best = run_search(search, console=None if quiet else console)["best"]
        told = f"least gap {best['gap']:.2%} with {best['settings']}"
        console.print(told, highlight=False, markup=False, soft_wrap=True)
        files = f"best.toml and tune.json in {search.base.out}"
        console.print(files, highlight=False, markup=False, soft_wrap=True)


@app.command()
def audit(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file of an audit: configs/digits_audit.toml.")
    ] = None,
    overrides: Overrides = None,
    out: Out = None,
    stored: Annotated[
        Path | None,
        typer.Option("--from", help="Folder of an audit: make its numbers and pages again."),
    ] = None,
    data_dir: DataDir = None,
    devices: Devices = None,
    quiet: Quiet = False,
) -> None:
    """Families of models against retrained ones: a verdict with bands, in audit.json."""
    with _answered():
        content, folder = (
            _audited(config, _given(overrides, out, data_dir, None, devices), quiet)
            if config is not None and stored is None
            else _audited_again(config, stored, out, [data_dir, devices])
        )
        from jaxunlearn.report.audit import verdicts

        console = _console()
        for sentence in verdicts(content):
            console.print(sentence, highlight=False, markup=False)
        files = f"audit.html, audit.json, audit.md, audit.png and audit.npz in {folder}"
        console.print(files, highlight=False, markup=False, soft_wrap=True)


def _audited(config: Path, given: list[str], quiet: bool) -> tuple[dict[str, Any], str]:
    """What an audit found, and its folder."""
    from jaxunlearn.audit_config import load_audit

    asked = load_audit(config, given)

    from jaxunlearn.auditing import run_audit

    return run_audit(asked, console=None if quiet else _console()), asked.base.out


def _audited_again(
    config: Path | None, stored: Path | None, out: Path | None, others: list[Any]
) -> tuple[dict[str, Any], Path]:
    """The same from an audit's files, which have all settings but where to write."""
    if config is not None or stored is None or any(other is not None for other in others):
        raise ValueError(
            "write jaxunlearn audit CONFIG, or jaxunlearn audit --from FOLDER with no option but "
            "--out: the settings are those of the folder"
        )
    from jaxunlearn.stored_audit import remake_audit

    return remake_audit(stored, out), out or stored


@app.command()
def methods() -> None:
    """List the unlearning methods, the data each needs and the scopes it supports."""
    with _answered():
        from jaxunlearn.methods import METHODS

        table = Table("method", "needs", "scopes", "what it does")
        for method in METHODS.values():
            scopes, needs = ", ".join(sorted(method.scopes)), ", ".join(sorted(method.needs))
            table.add_row(method.name, needs, scopes, method.summary)
        _console().print(table)


def main() -> None:
    """Entry point: Ctrl-C is answered, and ends the process with status 130."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a background job
        signal.signal(signal.SIGINT, _stop)
    app()


def _stop(*_: object) -> None:
    """End the process at once, which is safe: every write is complete or has not happened.

    Not by an exception: one that is raised inside a callback of the garbage collector, and JAX has
    such, is lost, and an interpreter that tears XLA down in the middle of its work may crash.
    """
    if os.isatty(1):
        os.write(1, b"\x1b[?25h\n")  # the cursor, which progress bars hide
    os.write(2, b"interrupted; the same command goes on where this one stopped\n")
    os._exit(130)


@contextmanager
def _answered() -> Iterator[None]:
    """Faults of the user's become one message on stderr and exit status 1."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        message = f"[bold red]error:[/] {escape(str(error))}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _console() -> Console:
    """As wide as the terminal; a file or pipe has no width, and gets one that no table exceeds."""
    return Console(width=None if sys.stdout.isatty() else 120)


def _given(
    overrides: list[str] | None,
    out: Path | None,
    data_dir: Path | None,
    weights: Path | None,
    devices: int | None,
) -> list[str]:
    """Overrides of the command line, its flags last."""
    paths = {"out": out, "data.data_dir": data_dir, "train.weights": weights}
    flags: dict[str, str | int] = {
        key: str(path) for key, path in paths.items() if path is not None
    }
    if devices is not None:
        flags["devices"] = devices
    # A JSON string is a TOML string.
    given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in flags.items()]
    return [*(overrides or []), *given]


def _carry_out(
    until: Literal["train", "unlearn", "evaluate"],
    config_file: Path,
    overrides: list[str] | None,
    out: Path | None,
    data_dir: Path | None,
    weights: Path | None,
    devices: int | None,
    quiet: bool,
) -> None:
    with _answered():
        # Imported here: help and usage errors need not wait for this, nor a config's for JAX.
        from jaxunlearn.config import load_config

        config = load_config(config_file, _given(overrides, out, data_dir, weights, devices))

        from jaxunlearn.experiment import run as run_experiment
        from jaxunlearn.report import console_table, features_table

        console = _console()
        report = run_experiment(config, until=until, console=None if quiet else console)
        if report is not None:
            console.print(console_table(report))
            if (features := features_table(report)) is not None:
                console.print(features)
            for note in report["notes"]:
                console.print(f"note: {note}", highlight=False, markup=False)
        shown = "checkpoints" if report is None else "report.html, report.md and report.json"
        console.print(f"{shown} in {config.out}", highlight=False, markup=False, soft_wrap=True)
