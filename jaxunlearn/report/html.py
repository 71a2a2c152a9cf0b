"""A report as one self-contained page: figures inside, no request to anywhere, no script."""

import base64
import io
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from jaxunlearn.report import wording
from jaxunlearn.report.details import FACTS, details
from jaxunlearn.report.features import FEATURES_HEADER, feature_rows, features_reading
from jaxunlearn.report.tables import HEADER, summary_rows


def render_html(report: Mapping[str, Any], figures: Mapping[str, Figure]) -> str:
    """The report as a page.

    Args:
      report: the content of ``report.json``.
      figures: heading to figure, in reading order; a figure's label is its caption.

    Returns:
      The page's text; names from the report are escaped.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> render_html(example_report(), {}).splitlines()[0]
      '<!DOCTYPE html>'
    """
    return fill(
        "template.html",
        title=wording.title(report),
        forgotten=wording.forgotten(report["problem"]),
        findings=wording.findings(report),
        header=HEADER,
        rows=summary_rows(report),
        reading=wording.reading(report["problem"]),
        features_header=FEATURES_HEADER,
        feature_rows=feature_rows(report),
        features_reading=features_reading(report),
        notes=report["notes"],
        figures=[(name, image_uri(f), f.get_label()) for name, f in figures.items()],
        sections=details(report),
        facts=FACTS,
        limits=wording.LIMITS,
    )


def fill(template: str, **values: Any) -> str:
    """A page of this package's templates; every value is escaped, a missing one is an error.

    Args:
      template: a file beside this one, which extends ``base.html``.
      **values: what it names.

    Examples:
      >>> fill("base.html", title="a < b").splitlines()[5]
      '<title>a &lt; b</title>'
    """
    environment = Environment(
        loader=PackageLoader("jaxunlearn.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def image_uri(figure: Figure) -> str:
    """The figure as an SVG data URI: sharp at any zoom, and ids of two figures cannot collide.

    The same figure gives the same text: no date, and a fixed salt for ids.

    Examples:
      >>> image_uri(Figure())[:26]
      'data:image/svg+xml;base64,'
    """
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "jaxunlearn"}):
        figure.savefig(file, format="svg", dpi=200, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
