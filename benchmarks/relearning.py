"""How far does relearning tell what was kept, and how much is chance?

The digits run of UNSC: the original, four retrained models, the unlearned one, the mildest head
edit and five random initialisations are relearned with five draws each, at both published rates.
Steps are those until the forget accuracy is within 5 % of the original's.

    python -m benchmarks.relearning             after jaxunlearn run configs/digits_unsc.toml
"""

from pathlib import Path
from typing import Any

import jax

from benchmarks.common import print_table, save_results, stored
from jaxunlearn.config import load_config
from jaxunlearn.evaluate_config import RelearnConfig
from jaxunlearn.preparation import optimizer_of, prepare, training_batches
from jaxunlearn.relearning import mild_head_edit, relearn_models
from jaxunlearn.training import fit

CONFIG = Path(__file__).parents[1] / "configs" / "digits_unsc.toml"
RATES, DRAWS, RETRAINED, UNTRAINED = (0.1, 0.01), 5, 4, 5


def main() -> None:
    """Relearn all models, save and print the ranges."""
    prepared = prepare(load_config(CONFIG))
    models = models_of(prepared)
    data = (
        training_batches(prepared, at) for at in (prepared.splits.forget, prepared.splits.retain)
    )
    forget, retain = data
    rows = []
    for rate in RATES:
        config = RelearnConfig(learning_rate=rate)
        for draw in range(DRAWS):
            key, apply_fn = jax.random.key(draw), prepared.network.apply_fn
            found = relearn_models(key, apply_fn, models, forget, retain, config)
            rows += [
                {"model": name.partition(", ")[0], "number": name, "rate": rate, "draw": draw}
                | {"steps": each.accuracy_steps, "censored": each.accuracy_censored}
                for name, each in found.models.items()
            ]
    claim = " ".join(__doc__.split("\n\n")[1].split())
    settings = {"config": f"configs/{CONFIG.name}", "rates": RATES, "draws": DRAWS}
    save_results("digits_relearning", claim=claim, settings=settings, rows=rows)
    print_table(ranges(rows), {"model": "", "rate": "", "steps": ""})


def models_of(prepared: Any) -> dict[str, Any]:
    """Those of the run, further retrained ones, the head edit and untrained ones."""
    train, network = prepared.config.train, prepared.network
    models = {name: stored(prepared, name) for name in ("original", "unlearned")}
    forget, retain = (
        training_batches(prepared, rows)
        for rows in (prepared.splits.forget, prepared.splits.retain)
    )
    for i in range(RETRAINED):
        init_key, fit_key = jax.random.split(jax.random.key(100 + i))
        optimizer = optimizer_of(train, len(retain))
        done = fit(
            fit_key,
            network.apply_fn,
            network.init(init_key),
            retain,
            optimizer=optimizer,
            epochs=train.epochs,
        )
        models[f"retrained, {i}"] = done.variables
    classes = prepared.splits.forget_classes
    _, models["head edit"] = mild_head_edit(network.apply_fn, models["original"], forget, classes)
    untrained = {f"random initialisation, {i}": jax.random.key(200 + i) for i in range(UNTRAINED)}
    return models | {name: network.init(key) for name, key in untrained.items()}


def ranges(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The least and the most steps of each model at each rate; ≥ where one is not back by then."""
    told = []
    for name in dict.fromkeys(row["model"] for row in rows):
        for rate in RATES:
            own = [row for row in rows if row["model"] == name and row["rate"] == rate]
            ends = [f(own, key=lambda row: (row["steps"], row["censored"])) for f in (min, max)]
            low, high = ("≥ " * end["censored"] + str(end["steps"]) for end in ends)
            steps = low if low == high else f"{low} to {high}"
            told.append({"model": name, "rate": rate, "steps": steps})
    return told


if __name__ == "__main__":
    main()
