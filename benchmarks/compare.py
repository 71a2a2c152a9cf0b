"""A comparison whose result is committed: ``results/compare_NAME.json`` and its figure.

    python -m benchmarks.compare configs/digits_compare.toml
    python -m benchmarks.compare configs/digits_compare.toml compare.seeds=[0]

As ``jaxunlearn compare``: what is stopped goes on.
"""

import argparse
import shutil
from pathlib import Path

from rich.console import Console

from benchmarks.common import RESULTS
from jaxunlearn.compare import compare
from jaxunlearn.compare_config import load_comparison
from jaxunlearn.report.comparison import findings
from jaxunlearn.stages import write_json


def main() -> None:
    """Carry it out, keep what is committed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    options = parser.parse_args()
    name = options.config.stem
    comparison = load_comparison(options.config, [*options.overrides, f"out='runs/{name}'"])
    content = compare(comparison, console=Console())
    content["config"].pop("out")
    content["config"]["data"].pop("data_dir")
    write_json(RESULTS / f"compare_{name}.json", content)
    shutil.copy(Path("runs") / name / "compare.png", RESULTS / f"compare_{name}.png")
    print("\n".join(findings(content)))


if __name__ == "__main__":
    main()
