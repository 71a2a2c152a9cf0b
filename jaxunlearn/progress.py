"""A progress bar for the epochs of a training."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def epoch_progress(console: Console | None, title: str, total: int) -> Any:
    """A progress bar as a context that gives ``on_epoch``; None without a console."""
    if console is None:
        return nullcontext(None)
    return _Bar(console, title, total)


class _Bar:
    """Epochs done, loss and accuracies of the last one, and the time left."""

    def __init__(self, console: Console, title: str, total: int):
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task(title, total=total, figures="")

    def __enter__(self) -> Callable[[dict[str, float]], None]:
        self.progress.start()
        return self._show

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def _show(self, figures: dict[str, float]) -> None:
        shown = [f"loss {figures['loss']:.3f}", f"accuracy {100 * figures['accuracy']:.1f} %"]
        if "validation" in figures:
            shown.append(f"validation {100 * figures['validation']:.1f} %")
        self.progress.update(self.task, completed=figures["epoch"], figures="  ".join(shown))
