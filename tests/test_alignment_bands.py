"""Bands of the digits MLP: what alignment must show, as the mean over the ten classes of a seed."""

import pytest

from benchmarks.dimensional_alignment_toy import SETTINGS, bands, toy_cases

JUDGED = ("random labels", "SD + DA, λ = 1", "SD + DA, λ = 100")
# The one that does not hold: -3.1, -1.8 and -4.8 on seeds 0, 1 and 2.
MISSED = {2: "SD + DA: NMI within 4 of retrained"}


def held(seed):
    settings = {name: SETTINGS[name] for name in JUDGED}
    return bands(list(toy_cases(seed, settings, probe=False)))


def test_every_band_holds_on_the_first_seed():
    assert [name for name, (_, holds) in held(0).items() if not holds] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_every_band_but_one_holds_on_the_other_seeds(seed):
    failing = {name for name, (_, holds) in held(seed).items() if not holds}
    assert failing == {MISSED[seed]} if seed in MISSED else not failing
