"""A report as GitHub Markdown: the page without its figures."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from jaxunlearn.report.details import FACTS, details
from jaxunlearn.report.features import FEATURES_HEADER, feature_rows, features_reading
from jaxunlearn.report.tables import HEADER, summary_rows
from jaxunlearn.report.wording import LIMITS, findings, forgotten, reading, title


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown with GitHub tables.

    Args:
      report: the content of ``report.json``.

    Returns:
      The text; names from the report are escaped.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> print(render_markdown(example_report()).splitlines()[0])
      # Unlearning report: unsc on made-up
    """
    blocks = [
        f"# {_escape(title(report))}",
        f"Asked to forget {_escape(forgotten(report['problem']))}.",
        bullets(findings(report)),
        table(HEADER, summary_rows(report)),
        reading(report["problem"]),
    ]
    if rows := feature_rows(report):
        blocks += ["## Features", table(FEATURES_HEADER, rows)]
    if told := features_reading(report):
        blocks.append(told)
    if report["notes"]:
        blocks += ["## Notes", bullets(report["notes"])]
    for section in details(report):
        numeric = section.header != FACTS
        blocks += [f"## {_escape(section.title)}", table(section.header, section.rows, numeric)]
        blocks += [section.note] if section.note else []
    return "\n\n".join([*blocks, "## Limits", LIMITS]) + "\n"


def _escape(text: str) -> str:
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def bullets(sentences: Sequence[str]) -> str:
    """A list; names in it are escaped."""
    return "\n".join(f"- {_escape(sentence)}" for sentence in sentences)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: bool = True) -> str:
    """A GitHub table, numbers to the right; cells are escaped."""
    rule = [":--", *("--:" if numeric else ":--" for _ in header[1:])]
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)
