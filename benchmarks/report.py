"""Run one config, as ``jaxunlearn run`` does, and keep its report among the committed results.

python -m benchmarks.report configs/digits_unsc.toml
python -m benchmarks.report configs/digits_unsc.toml data.forget=8 --name digits_unsc_class8
"""

import argparse
from pathlib import Path

from benchmarks.common import RESULTS
from jaxunlearn.config import load_config
from jaxunlearn.experiment import run
from jaxunlearn.stages import write_json


def main() -> None:
    """Run and save ``results/report_NAME.json``; stages done in ``runs/NAME`` are kept."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    parser.add_argument("--name", help="of the result and of its run folder; default the config's")
    options = parser.parse_args()
    name = options.name or options.config.stem
    config = load_config(options.config, [*options.overrides, f"out='runs/{name}'"])
    report = run(config)
    write_json(RESULTS / f"report_{name}.json", report)


if __name__ == "__main__":
    main()
