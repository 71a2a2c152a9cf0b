"""Audits of simulated families, whose truth is known."""

import json

import numpy as np
import pytest

from jaxunlearn.evaluation.audit import SPLITS, AuditDraws, audit
from jaxunlearn.evaluation.audit_measures import measures

N, K = 8, 5
SIZES = dict(zip(SPLITS, (20, 40, 30, 30, 40), strict=True))
SPLIT = np.repeat(list(SIZES), list(SIZES.values()))
LABELS = np.random.default_rng(0).integers(0, K, len(SPLIT))
DRAWS = AuditDraws(halves=40, permutations=139, bootstraps=10)  # fewer permutations: no p below .05
FORGET_METRICS = ("forget_gap", "ulira", "klom_forget")


def family(models, forget=1.0, retain=6.0, seed=0, noise=1.0):
    """Logits with a lead of the true class that depends on the split, and noise of the model."""
    rng = np.random.default_rng(seed)
    lead = np.where(SPLIT == "retain", retain, np.where(SPLIT == "forget", forget, 1.0))
    logits = noise * rng.normal(size=(models, len(SPLIT), K))
    logits[:, np.arange(len(SPLIT)), LABELS] += lead
    return logits.astype(np.float32)


def families(seed=0, **others):
    original = family(N, forget=5.0, seed=seed + 1)
    retrained = family(2 * N, seed=seed + 2)
    return {"original": original, "do_nothing": original, "retrained": retrained} | others


@pytest.fixture(scope="module")
def result():
    head_edit = family(N, forget=5.0, seed=1)
    gone = (SPLIT == "forget") | (SPLIT == "held_out")
    head_edit[:, gone, LABELS[gone]] = -1e4
    logits = families(
        perfect=family(N, seed=9),
        half=family(N, forget=3.0, seed=10),
        damaged=family(N, retain=2.0, seed=11),
        head_edit=head_edit,
    )
    return audit(logits, LABELS, SPLIT, goal="untraining", draws=DRAWS)


def test_what_equals_retraining_is_inside_and_what_does_not_is_outside(result):
    assert result.content["verdict"] == {
        "original": "outside",
        "do_nothing": "outside",
        "perfect": "inside",
        "half": "outside",
        "damaged": "outside",
        "head_edit": "outside",
        "retrained": "inside",
    }


def test_the_reasons_name_what_speaks_against_a_family(result):
    reasons = result.content["reasons"]
    assert reasons["perfect"] == reasons["retrained"] == []
    assert set(FORGET_METRICS) <= set(reasons["do_nothing"])
    assert "retain_gap" in reasons["damaged"]
    assert not set(FORGET_METRICS) & set(reasons["damaged"])
    assert "klom_forget" in reasons["head_edit"]


def test_every_row_has_a_value_an_interval_a_band_and_a_verdict(result):
    primary = result.content["primary"]
    for name, metric in result.content["metrics"].items():
        assert set(metric["rows"]) == set(result.content["verdict"])
        for row in metric["rows"].values():
            assert np.isfinite(row["value"])
            if name in primary:
                low, high = row["interval"]
                assert low <= high
                assert row["p"] <= row["p_holm"] <= 1
            if "band" in row:
                assert row["band"][0] <= row["band"][1]
                assert row["verdict"] in ("inside", "outside", "undecided")
    json.dumps(result.content, allow_nan=False)


def test_the_original_and_doing_nothing_have_the_same_numbers(result):
    for metric in result.content["metrics"].values():
        assert metric["rows"]["original"] == metric["rows"]["do_nothing"]


def test_the_forgotten_lead_shows_in_the_direction_that_each_metric_states(result):
    for measure in measures(N):
        if measure.forgetting:
            rows = result.content["metrics"][measure.name]["rows"]
            perfect, idle = rows["perfect"]["value"], rows["do_nothing"]["value"]
            assert idle > perfect if measure.extreme != "low" else idle < perfect


def test_tables_per_example_average_to_the_metrics(result):
    assert result.arrays["perfect/epsilon"].shape == (SIZES["forget"],)
    idle, perfect = (result.arrays[f"{name}/klom"].mean() for name in ("do_nothing", "perfect"))
    assert idle > 2 * perfect


@pytest.mark.slow
def test_null_retrained_models_under_another_name_are_rarely_outside():
    again = {f"again {seed}": family(N, seed=100 + seed) for seed in range(5)}
    found = audit(families(seed=50, **again), LABELS, SPLIT, goal="untraining", draws=DRAWS)
    verdicts = [found.content["verdict"][name] for name in again]
    assert verdicts.count("outside") <= 1
    assert verdicts.count("inside") >= 2


def test_without_power_nothing_is_inside():
    # The originals never knew the forget data better than retrained models do.
    original = family(N, seed=1)
    logits = families(perfect=family(N, seed=9)) | {"original": original, "do_nothing": original}
    content = audit(logits, LABELS, SPLIT, goal="untraining", draws=DRAWS).content
    assert content["verdict"]["perfect"] == "undecided"


def test_the_goal_of_removing_a_concept_has_numbers_and_no_verdict():
    quick = AuditDraws(halves=10, permutations=9, bootstraps=10)
    content = audit(families(), LABELS, SPLIT, goal="unlearning", draws=quick).content
    assert set(content["verdict"].values()) == {None}
    assert content["metrics"]["forget_gap"]["rows"]["original"]["value"] > 0.2


@pytest.mark.slow
def test_order_of_examples_names_of_classes_and_shifts_of_logits_change_nothing(result):
    rng = np.random.default_rng(5)
    order, names = rng.permutation(len(SPLIT)), rng.permutation(K)
    quick = AuditDraws(halves=10, permutations=9, bootstraps=10)
    base = families(perfect=family(N, seed=9))
    shift = rng.normal(size=(1, len(SPLIT), 1)).astype(np.float32)
    columns = np.argsort(names)
    moved = {name: (stack + shift)[:, order][..., columns] for name, stack in base.items()}
    one = audit(base, LABELS, SPLIT, goal="untraining", draws=quick).content
    two = audit(moved, names[LABELS][order], SPLIT[order], goal="untraining", draws=quick).content
    for name in ("forget_gap", "klom_forget", "klom_retain", "ulira", "tug_of_war"):
        for row, other in zip(
            *(found["metrics"][name]["rows"].values() for found in (one, two)), strict=True
        ):
            assert row["value"] == pytest.approx(other["value"], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"goal": "forgetting"}, "goal = 'forgetting': write \"untraining\""),
        ({"logits": {"original": None}}, r"no \['original'\]; wanted original, do_nothing"),
        ({"logits": {"retrained": family(N)}}, r"logits of retrained: .* wanted \(16, 160"),
        ({"logits": {"do_nothing": family(N, seed=3)}}, "do_nothing differs from the original"),
        ({"logits": {"x": np.full((N, len(SPLIT), K), np.nan, np.float32)}}, "of x are not finite"),
        ({"split": np.where(SPLIT == "test", "retain", SPLIT)}, r"missing \['test'\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"goal": "untraining", "split": SPLIT, "logits": {}} | change
    logits = {k: v for k, v in (families() | given["logits"]).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        audit(logits, LABELS, given["split"], goal=given["goal"], draws=DRAWS)


def test_the_list_of_primary_metrics_is_fixed_by_the_number_of_models():
    assert "ulira" in {m.name for m in measures(8) if m.primary}
    assert "ulira" not in {m.name for m in measures(32) if m.primary}
    assert {"forget_gap", "retain_gap", "test_gap", "klom_forget", "klom_retain"} <= {
        m.name for m in measures(32) if m.primary
    }
