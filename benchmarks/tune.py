"""A search whose result is committed: ``results/tune_NAME.json``.

    python -m benchmarks.tune configs/digits_tune.toml

As ``jaxunlearn tune``; then the settings of the file and those that were found are run and judged
on test data too, which the search does not touch.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import print_table, save_results
from jaxunlearn.config import load_config, to_mapping
from jaxunlearn.experiment import run
from jaxunlearn.tune import tune
from jaxunlearn.tune_config import Search, load_search

COLUMNS = ("forget_train", "retain_train", "forget_test", "retain_test", "mia")


def main() -> None:
    """Search, run both settings, keep what is committed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    options = parser.parse_args()
    name = options.config.stem
    out = Path("runs") / name
    search = load_search(options.config, [*options.overrides, f"out='{out}'"])
    content = tune(search, console=Console())
    rows = _judged(search, out)
    settings = {
        "config": {k: v for k, v in to_mapping(search.base).items() if k != "out"},
        "tune": content["tune"],
        "seconds": content["seconds"],
        "best": content["best"],
        "statuses": [trial["status"] for trial in content["trials"]],
        "gaps": [trial["gap"] for trial in content["trials"]],
    }
    claim = "Settings found by a search on validation data, judged on test data."
    save_results(f"tune_{name}", claim=claim, settings=settings, rows=rows)
    print_table(rows, {"model": ""} | dict.fromkeys(COLUMNS, ".3f"))


def _judged(search: Search, out: Path) -> list[dict[str, Any]]:
    """Figures of the original and the retrained model, and of both settings."""
    config = load_config(out / "best.toml", [f"out='{out}/best'"])
    best = run(config)
    before = run(replace(config, unlearn=search.base.unlearn, out=f"{out}/before"))
    assert best is not None
    assert before is not None
    models = {
        "original": best["models"]["original"],
        "retrained": best["models"]["retrained"],
        "settings of the file": before["models"]["unlearned"],
        "settings found": best["models"]["unlearned"],
    }
    return [
        {"model": title, **model["accuracy"], "mia": model["mia"]}
        for title, model in models.items()
    ]


if __name__ == "__main__":
    main()
