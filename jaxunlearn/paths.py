"""Where the files that a config names lie."""

import os
from pathlib import Path


def reference_data() -> Path | None:
    """``$JAXUNLEARN_DATA``, else the folder ``shared`` beside the project's root, else None."""
    if named := os.environ.get("JAXUNLEARN_DATA"):
        return Path(named)
    sibling = Path(__file__).resolve().parents[2] / "shared"
    return sibling if sibling.is_dir() else None


def resolve_path(text: str) -> Path:
    """The file or folder that a config names: as given, else among the reference data.

    Expands ``~`` and environment variables. A relative path is looked for in the working directory,
    then in ``data/`` and ``data/weights/`` of ``reference_data()``.

    Raises:
      FileNotFoundError: names every place looked at.

    Examples:
      >>> resolve_path("/no/such.npz")
      Traceback (most recent call last):
      FileNotFoundError: /no/such.npz: not found at /no/such.npz...
    """
    given = Path(os.path.expandvars(text)).expanduser()
    root = reference_data()
    folders = [Path.cwd()] + ([root / "data", root / "data" / "weights"] if root else [])
    # Joining an absolute path discards the folder: then one place is left.
    places = list(dict.fromkeys(folder / given for folder in folders))
    for place in places:
        if place.exists():
            return place
    hint = "" if root else "; JAXUNLEARN_DATA, the folder of reference data, is not set"
    raise FileNotFoundError(f"{text}: not found at {' or '.join(map(str, places))}{hint}")
