"""Bars of what a run took."""

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from jaxunlearn.report.drawing import GRID, ORIGINAL, RETRAINED, UNLEARNED, sheet, shorten

_COLOURS = {"unlearn": UNLEARNED, "retrain": RETRAINED}
_PART = "#8cc3e6"  # of the unlearning: a lighter blue
_LOG_RATIO = 50


def runtime_bars(
    seconds: Mapping[str, float | int | None],
    parts: Mapping[str, float | int | None] | None = None,
) -> Figure:
    """Seconds of each stage and, below, of the parts of the unlearning.

    The axis is logarithmic where the longest bar is more than 50 times the shortest.

    Args:
      seconds: stage to seconds; None, a stage that did not run here, draws nothing.
      parts: part of the unlearning to seconds.

    Returns:
      The figure, as tall as its number of bars asks for.

    Raises:
      ValueError: if no stage has a positive time.

    Examples:
      >>> figure = runtime_bars({"train": 7.5, "retrain": None, "unlearn": 0.25})
      >>> [text.get_text() for text in figure.axes[0].texts]
      ['7.5 s', '0.25 s']
    """
    known = {stage: s for stage, s in seconds.items() if s is not None}
    inside = {part: s for part, s in (parts or {}).items() if s is not None}
    bars = [(stage, s, _COLOURS.get(stage, ORIGINAL)) for stage, s in known.items()]
    bars += [(f"unlearn: {shorten(part, 30)}", s, _PART) for part, s in inside.items()]
    positive = [s for _, s, _ in bars if s > 0]
    if not any(s > 0 for s in known.values()):
        raise ValueError(f"seconds {dict(seconds)}: wanted one stage or more with a positive time")
    shortest, longest = min(positive), max(positive)
    log = longest > _LOG_RATIO * shortest
    figure, (axes,) = sheet(0.9 + 0.3 * len(bars))
    for row, (_, s, colour) in enumerate(bars):
        axes.barh(row, s, height=0.64, color=colour)
        at = max(s, shortest / 3) if log else s
        axes.annotate(
            f"{s:.3g} s" if s < 1000 else f"{s:,.0f} s",
            (at, row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    if inside:
        axes.axhline(len(known) - 0.5, color=GRID, linewidth=1)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], parse_math=False)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_xlabel("seconds")
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{s:g}"))
        axes.set_xlim(shortest / 3, longest * (longest / shortest) ** 0.12)
    else:
        axes.set_xlim(0, 1.12 * longest)
    scale = " The axis is logarithmic: lengths of bars are no shares." if log else ""
    missing = [stage for stage, s in seconds.items() if s is None]
    given = f" Not timed, for the model was given: {', '.join(missing)}." if missing else ""
    within = ", and below of the parts of the unlearning" if inside else ""
    figure.set_label(f"Wall time of each stage{within}.{scale}{given}")
    return figure
