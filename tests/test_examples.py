"""The examples run as they stand, and what they print is true."""

import math
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def printed(capsys):
    """Runs an example; gives what its ``main`` returns, once all of it has been printed."""

    def run(name):
        table = runpy.run_path(str(EXAMPLES / name))["main"]()
        output = capsys.readouterr().out
        for row in table:
            assert any(line.startswith(row) for line in output.splitlines())
        return table

    return run


def test_no_example_goes_untested():
    tested = {"data_parallel.py", "own_model.py", "own_optimizer.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_a_model_of_ones_own_forgets_the_class_and_keeps_the_others(printed):
    before, after = printed("own_model.py").values()
    assert before["forget"] > 0.9
    assert before["retain"] > 0.9
    assert after["forget"] < 0.1
    assert after["retain"] > before["retain"] - 0.02


def test_a_projection_at_the_end_of_the_chain_keeps_the_retained_outputs(printed):
    table = printed("own_optimizer.py")
    assert table.pop("before") == pytest.approx((1.0, 0.0), abs=0.01)
    # All three forget: the class gets about the 1/4 of a uniform prediction over four.
    assert {name: confidence for name, (confidence, _) in table.items()} == pytest.approx(
        dict.fromkeys(table, 0.25), abs=0.05
    )
    change = {name: change for name, (_, change) in table.items()}
    assert change["projection last"] < 0.1
    assert change["adamw"] > 20 * change["projection last"]
    assert change["projection first"] > 20 * change["projection last"]


@pytest.mark.slow
def test_one_device_a_mesh_and_pmap_give_the_same_numbers(printed):
    one, mesh, pmap = printed("data_parallel.py").values()
    assert mesh == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert pmap == pytest.approx(one, rel=1e-4, abs=1e-5)
    _, loss, change = one
    assert loss < 0.7 * math.log(4), "it learns"
    assert change < 0.01, "and the retained logits stay"
