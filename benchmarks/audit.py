"""An audit whose result is committed: ``results/audit_NAME.json`` and its figure.

    python -m benchmarks.audit configs/digits_audit.toml

As ``jaxunlearn audit``: what is stopped goes on. ``seconds`` are those of each stage.
"""

import argparse
import shutil
from pathlib import Path

from rich.console import Console

from benchmarks.common import RESULTS
from jaxunlearn.audit_config import load_audit
from jaxunlearn.auditing import run_audit
from jaxunlearn.report.audit import verdicts
from jaxunlearn.stages import write_json


def main() -> None:
    """Carry it out, keep what is committed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    options = parser.parse_args()
    name = options.config.stem
    asked = load_audit(options.config, [*options.overrides, f"out='runs/{name}'"])
    content = run_audit(asked, console=Console())
    content["config"].pop("out")
    content["config"]["data"].pop("data_dir")
    write_json(RESULTS / f"audit_{name}.json", content)
    shutil.copy(Path("runs") / name / "audit.png", RESULTS / f"audit_{name}.png")
    print("\n".join(verdicts(content)))
    print({stage: round(seconds, 1) for stage, seconds in content["seconds"].items()})


if __name__ == "__main__":
    main()
