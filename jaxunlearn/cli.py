"""The command line: ``jaxunlearn run CONFIG``, its stages one by one, and a list of the methods."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
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
    typer.Option("--weights", help="Third-party weights (.npz) for the original model."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    data_dir: DataDir = None,
    weights: Weights = None,
    quiet: Quiet = False,
) -> None:
    """Train, unlearn, evaluate, report. Stages already done in the run folder are kept."""
    _carry_out("evaluate", config, overrides, out, data_dir, weights, quiet)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    data_dir: DataDir = None,
    weights: Weights = None,
    quiet: Quiet = False,
) -> None:
    """Only train the original and the retrained model."""
    _carry_out("train", config, overrides, out, data_dir, weights, quiet)


@app.command()
def unlearn(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    data_dir: DataDir = None,
    weights: Weights = None,
    quiet: Quiet = False,
) -> None:
    """Train where need be, then unlearn; no evaluation."""
    _carry_out("unlearn", config, overrides, out, data_dir, weights, quiet)


@app.command()
def evaluate(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    data_dir: DataDir = None,
    weights: Weights = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate and report what the run folder holds; missing stages are done first."""
    _carry_out("evaluate", config, overrides, out, data_dir, weights, quiet)


@app.command()
def methods() -> None:
    """List the unlearning methods, the data each needs and the scopes it supports."""
    from jaxunlearn.methods import METHODS

    table = Table("method", "needs", "scopes", "what it does")
    for method in METHODS.values():
        scopes, needs = ", ".join(sorted(method.scopes)), ", ".join(sorted(method.needs))
        table.add_row(method.name, needs, scopes, method.summary)
    Console().print(table)


def main() -> None:
    """Entry point; faults of the user's become one message and exit status 1, Ctrl-C 130."""
    errors = Console(stderr=True)
    try:
        app()
    except KeyboardInterrupt:
        errors.print("interrupted; the same command goes on where this one stopped")
        raise SystemExit(130) from None
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        errors.print(f"[bold red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


def _plain(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error))


def _carry_out(
    until: str,
    config_file: Path,
    overrides: list[str] | None,
    out: Path | None,
    data_dir: Path | None,
    weights: Path | None,
    quiet: bool,
) -> None:
    # Imported here: help and usage errors need not wait for JAX.
    from jaxunlearn.config import load_config
    from jaxunlearn.experiment import run as run_experiment
    from jaxunlearn.report import console_table

    console = Console()
    flags = {"out": out, "data.data_dir": data_dir, "train.weights": weights}
    given = [f"{key}={str(value)!r}" for key, value in flags.items() if value is not None]
    config = load_config(config_file, [*(overrides or []), *given])
    report = run_experiment(config, until=until, console=None if quiet else console)  # type: ignore[arg-type]
    if report is not None:
        console.print(console_table(report))
        for note in report["notes"]:
            console.print(f"note: {note}", highlight=False)
    shown = "report.html, report.md and report.json" if report is not None else "checkpoints"
    console.print(f"{shown} in {config.out}", highlight=False)
