"""Writing an audit: all is rendered before a byte is written, each file is moved into place."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxunlearn.report.audit import audit_figure, render_audit
from jaxunlearn.report.audit_page import audit_figures, render_audit_page
from jaxunlearn.report.files import json_bytes, write_files


def write_audit(
    folder: Path, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, Path]:
    """Write ``audit.npz``, ``.md``, ``.png``, ``.html`` and, last, ``.json``, each whole or not.

    Args:
      folder: created if it is missing.
      content: of ``audit.json``, as JSON holds it.
      arrays: of ``audit.npz``: what the figures show, and whatever else is to be kept.

    Returns:
      File name to path.
    """
    image, packed = io.BytesIO(), io.BytesIO()
    audit_figure(content).savefig(image, format="png", dpi=120)
    np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
    page = render_audit_page(content, audit_figures(content, arrays))
    files = {
        "audit.npz": packed.getvalue(),
        "audit.md": render_audit(content).encode(),
        "audit.png": image.getvalue(),
        "audit.html": page.encode(),
        "audit.json": json_bytes(content),
    }
    return write_files(folder, files)
