"""An audit's folder read again: every number and page from ``audit.npz`` and ``audit.json`` alone.

``audit.npz`` has the logits of all families, so nothing is trained; ``audit.json`` has the goal and
the draws of chance.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn.evaluation.audit import AuditDraws, audit
from jaxunlearn.evaluation.report import json_value
from jaxunlearn.report.audit_files import write_audit

SCHEMA_VERSION = 2
_EXAMPLES = ("labels", "split", "rows")
_LOGITS = "logits/"


class StoredAudit(NamedTuple):
    """What a folder holds.

    Attributes:
      content: of ``audit.json``.
      arrays: of ``audit.npz``.
    """

    content: dict[str, Any]
    arrays: dict[str, np.ndarray]


def read_audit(folder: str | Path) -> StoredAudit:
    """Read ``audit.json`` and ``audit.npz``.

    Args:
      folder: of ``jaxunlearn audit``.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: another schema version, or arrays without logits.
    """
    content = json.loads((Path(folder) / "audit.json").read_text(encoding="utf-8"))
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{folder}/audit.json: schema version {version!r}, expected {SCHEMA_VERSION}: write it "
            "again with `jaxunlearn audit CONFIG`, which trains no model that is there"
        )
    with np.load(Path(folder) / "audit.npz") as stored:
        arrays = {name: stored[name] for name in stored}
    if missing := [name for name in (*_EXAMPLES, f"{_LOGITS}retrained") if name not in arrays]:
        raise ValueError(f"{folder}/audit.npz: no {missing}; wanted the file of `jaxunlearn audit`")
    return StoredAudit(content, arrays)


def remake_audit(folder: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Compute all numbers, figures and pages of an audit again; nothing is trained.

    Args:
      folder: of ``jaxunlearn audit``.
      out: where the files go; by default where they came from.

    Returns:
      The content of ``audit.json``: what was computed again, and settings, seconds, failures and
      environment as they were.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: see :func:`read_audit`.
    """
    content, arrays = read_audit(folder)
    logits = {n.removeprefix(_LOGITS): arrays[n] for n in arrays if n.startswith(_LOGITS)}
    result = audit(
        logits,
        arrays["labels"],
        arrays["split"],
        goal=content["goal"],
        draws=AuditDraws(**content["draws"]),
    )
    content = json_value(content | result.content)
    given = {n: arrays[n] for n in arrays if n.startswith(_LOGITS) or n in _EXAMPLES}
    write_audit(Path(out or folder), content, given | result.arrays)
    return content
