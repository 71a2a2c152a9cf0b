"""What the benchmarks of speed share: timings, ratios, verdicts, the table."""

from importlib import import_module

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.speed import QUESTIONS
from benchmarks.speed.spectra import gapped_power_law, gram_of_spectrum, rows_of_spectrum
from benchmarks.tables import speed_table
from benchmarks.timing import Way, compare, described, ratio_of, time_together


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_states_its_claim_and_can_be_asked(question):
    module = import_module(f"benchmarks.speed.{question}")
    claim = module.__doc__.split("\n\n")[0]
    assert claim.endswith((".", ":"))
    assert "\n" not in claim
    assert callable(module.measure)


def test_each_way_is_run_once_to_compile_and_then_as_often_as_asked():
    runs = []
    ways = {
        "warm": Way(lambda: runs.append("warm"), 3),
        "cold": Way(lambda: runs.append("cold"), 1),
    }
    timings = time_together(ways)
    assert runs == ["warm", "warm", "cold", "warm", "warm"]
    assert [timings[name]["runs"] for name in ways] == [3, 1]
    assert timings["warm"]["wall_min"] <= timings["warm"]["wall"] <= timings["warm"]["wall_max"]


def test_the_ratio_is_naive_over_fast_and_is_judged_by_its_bar():
    x = jnp.ones(1000)
    ways = {
        "fast": Way(lambda: x, 3),
        "naive": Way(lambda: [float(x[i]) for i in range(20)], 3),
    }
    row = compare("sum", ways, fast="fast", naive="naive", bar=2)
    assert row["ratio"] == row["timings"]["naive"]["wall"] / row["timings"]["fast"]["wall"]
    assert row["ratio"] > 2
    assert row["holds"]


@pytest.mark.parametrize(
    ("ratio", "bar", "holds", "words"),
    [
        (6.0, 5.0, True, "6, bar 5: holds"),
        (4.0, 5.0, False, "4, bar 5: FAILS"),
        (4.0, None, None, "4"),
        (None, 5.0, None, "not here"),
    ],
)
def test_a_bar_holds_fails_or_is_not_judged(ratio, bar, holds, words):
    row = ratio_of(ratio, bar) | {"note": "not here"}
    assert row["holds"] is holds
    assert described(row) == words


def test_the_table_shows_failing_bars_and_leaves_out_points_of_curves():
    rows = [
        {"case": "a"} | ratio_of(4.0, 5.0, 3.0),
        {"case": "b"} | ratio_of(6.0, 5.0),
        {"case": "c"} | ratio_of(None, None),
        {"case": "d", "note": "needs two cores"} | ratio_of(None, 1.7),
    ]
    lines = speed_table([{"name": "q", "rows": rows}]).splitlines()[2:]
    assert lines == [
        "| q | a | 4 | 3 | ≥ 5 | **fails** |",
        "| q | b | 6 |  | ≥ 5 | holds |",
        "| q | d | needs two cores |  | ≥ 1.7 |  |",
    ]


def test_rows_and_grams_have_the_spectrum_they_are_asked_for():
    spectrum, energy = gapped_power_law(20, 5)
    X = np.float64(rows_of_spectrum(50, spectrum))
    for gram in (X.T @ X, np.float64(gram_of_spectrum(spectrum))):
        np.testing.assert_allclose(np.linalg.eigvalsh(gram)[::-1], spectrum, atol=1e-5)
    shares = np.cumsum(spectrum) / spectrum.sum()
    assert shares[3] < energy < shares[4]
