"""ROC curves of an audit's attacks, on two logarithmic axes: the left edge is what matters."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from jaxunlearn.report.drawing import FORGET_BAND, GRID, LINES, UNLEARNED, sheet, shorten

REFERENCES = ("original", "do_nothing", "retrained")
_LOWEST = 1e-3
_COLOURS = (UNLEARNED, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)))


class Attack(NamedTuple):
    """Curves of one attack.

    Attributes:
      title: above the panel.
      rates: false positive rates ``[t]``.
      curves: true positive rates ``[t]`` of each family.
      auc: of each family.
      negatives: how many there are of them: a rate below one of them is not drawn.
      fewest: false positives below which the panel is shaded.
    """

    title: str
    rates: Float[np.ndarray, " t"]
    curves: Mapping[str, Float[np.ndarray, " t"]]
    auc: Mapping[str, float]
    negatives: int
    fewest: int


def roc_panels(attacks: Sequence[Attack]) -> Figure:
    """A panel for each attack; the retrained family is the reference, the dotted line chance.

    Args:
      attacks: what to draw, left to right.

    Examples:
      >>> rates = np.array([0.1, 1.0])
      >>> attack = Attack("toy", rates, {"unsc": rates}, {"unsc": 0.5}, negatives=10, fewest=2)
      >>> roc_panels([attack]).axes[0].get_legend().get_texts()[0].get_text()
      'unsc, 0.500'
    """
    most = max(len(attack.curves) for attack in attacks)
    figure, panels = sheet(4.4 + 0.2 * -(-(most + 2) // 2), len(attacks))
    for axes, attack in zip(panels, attacks, strict=True):
        _panel(axes, attack)
    figure.set_label(
        "ROC curves of membership attacks, both axes logarithmic, with each family's AUC. Left: "
        "one attacker for all forget examples, by the margin. Right: an attacker who knows every "
        "example's margins under retrained models. The target is the retrained models' curve. "
        "A curve starts at the least rate that the negatives can show; where the ground is tinted "
        "it rests on a few false positives."
    )
    return figure


def family_line(name: str, number: int) -> dict[str, Any]:
    """Colour and dashes of a family's line; those of originals and retrained are fixed.

    Args:
      name: of the family.
      number: of it among the methods, from 0.

    Examples:
      >>> family_line("unsc", 0)["color"] == family_line("finetune", 6)["color"]
      True
      >>> family_line("unsc", 0)["linestyle"] == family_line("finetune", 6)["linestyle"]
      False
    """
    if name in REFERENCES:
        fixed = LINES["retrained" if name == "retrained" else "original"]
        kept = {key: fixed[key] for key in fixed if key in ("color", "linestyle", "zorder")}
        return kept | {"linewidth": 2}
    turn, colour = divmod(number, len(_COLOURS))
    dashes = _DASHES[turn % len(_DASHES)]
    return {"color": _COLOURS[colour], "linewidth": 1.6, "linestyle": dashes}


def _panel(axes: Axes, attack: Attack) -> None:
    seen = attack.rates >= 1 / attack.negatives - 1e-12
    left = max(_LOWEST, float(attack.rates[seen].min()))
    bottom = min(left, 0.1)
    axes.plot([bottom, 1], [bottom, 1], color="#9aa3af", linestyle=":", linewidth=1, label="chance")
    methods = [name for name in attack.curves if name not in REFERENCES]
    for name, curve in attack.curves.items():
        number = methods.index(name) if name in methods else 0
        label = f"{shorten(name, 24)}, {attack.auc[name]:.3f}"
        axes.plot(attack.rates[seen], curve[seen], label=label, **family_line(name, number))
    if (few := attack.fewest / attack.negatives) > left:
        label = f"fewer than {attack.fewest} false positives"
        axes.axvspan(left, min(few, 1), color=FORGET_BAND, zorder=0, label=label)
    axes.set(xscale="log", yscale="log", xlim=(left, 1), ylim=(bottom, 1.08))
    axes.set_title(attack.title, fontsize=9)
    axes.set_xlabel("false positive rate", fontsize=9)
    axes.set_ylabel("true positive rate", fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        low = axis.get_view_interval()[0]
        axis.set_ticks([rate for rate in _ticks(low) if rate >= low])
        axis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID)
    _legend(axes, len(attack.curves))


def _ticks(low: float) -> list[float]:
    """1, .1, .01, ...; with .2 and .5 where there is less than a decade or two."""
    steps = (1.0,) if low < 0.01 else (1.0, 2.0, 5.0)
    return [step * 10.0**power for power in range(-3, 1) for step in steps if step * 10**power <= 1]


def _legend(axes: Axes, families: int) -> None:
    """Below the panel: families first, in their order, then chance and the tint."""
    handles, labels = axes.get_legend_handles_labels()
    order = [*range(1, families + 1), 0, *range(families + 1, len(labels))]
    axes.legend(
        [handles[i] for i in order],
        [labels[i].replace("$", r"\$") for i in order],
        loc="upper left",
        bbox_to_anchor=(0, -0.13),
        ncols=2,
        title="family, AUC",
        title_fontsize=8,
        alignment="left",
        frameon=False,
        fontsize=8,
    )
