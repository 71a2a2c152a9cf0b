"""Everyday numbers of outputs: attacks, null and positive control, distances, scores, tables."""

import numpy as np
import pytest

from jaxunlearn.evaluation.output_metrics import (
    COMPARED,
    THRESHOLDS,
    attack_sides,
    attacks,
    distances,
    relative_attack,
    scores,
)
from jaxunlearn.evaluation.report import SPLITS, evaluate_model
from jaxunlearn.evaluation.rmia import Confidences, choose_offline_a, rmia
from jaxunlearn.output_assessment import enter_output_metrics
from jaxunlearn.report.outputs import (
    ATTACKS_HEADER,
    DISTANCES_HEADER,
    SCORES_HEADER,
    attack_rows,
    distance_rows,
    score_rows,
)

K, N = 4, 200


def model(seed, *, member=0.0, whole=True):
    """Logits whose margins grow on retain training data, and on forget data by ``member``."""
    rng, labels = np.random.default_rng(seed), np.arange(N) % K
    gain = {"forget_train": member, "retain_train": 2.0, "forget_test": 0.0, "retain_test": 0.0}
    outputs = {
        split: (rng.normal(size=(N, K)) + (1 + more) * np.eye(K)[labels], labels)
        for split, more in gain.items()
    }
    if not whole:
        outputs["forget_test"] = np.zeros((0, K)), np.zeros(0, int)
    return outputs


@pytest.mark.parametrize("whole", [True, False], ids=["classes", "samples"])
def test_sides_are_disjoint_and_of_samples_halves_of_the_test_images(whole):
    outputs = model(0, whole=whole)
    sides = attack_sides(outputs, seed=3)
    tests = [sides[name].logits for name in ("held_out", "population")]
    if whole:
        wanted = [outputs[split][0] for split in ("forget_test", "retain_test")]
        assert all(a is b for a, b in zip(tests, wanted, strict=True))
    else:
        rows = np.concatenate(tests)
        assert len(tests[0]) == len(tests[1]) == N // 2
        assert {tuple(row) for row in rows} == {tuple(row) for row in outputs["retain_test"][0]}


def accuracies(found):
    return {name: found[name]["accuracy"] for name in (*THRESHOLDS, "loss", "population")}


def test_attacks_find_members_and_nothing_where_there_is_nothing():
    told = accuracies(attacks(attack_sides(model(0, member=3.0))))
    nothing = accuracies(attacks(attack_sides(model(0))))
    for name in told:
        # Standard error of a share of 400: .025; of one half of them .035.
        assert nothing[name] == pytest.approx(0.5, abs=0.09), name
        assert told[name] > 0.65, name
    assert attacks(attack_sides(model(0)))["loss"]["indiscernibility"] > 0.85


def test_a_side_with_few_examples_is_a_reason_and_no_number():
    outputs = model(0) | {"forget_test": (np.ones((9, K)), np.zeros(9, int))}
    assert attacks(attack_sides(outputs)) == {
        "reason": "9 of held_out: wanted 10 examples of each or more"
    }


def test_rmia_has_all_retrained_models_behind_it_and_of_these_the_others():
    sides = {
        name: attack_sides(model(i, member=gain))
        for i, (name, gain) in enumerate(
            {"original": 3.0, "unlearned": 1.0, "retrained": 0}.items()
        )
    }
    references = [sides["retrained"], *(attack_sides(model(10 + i)) for i in range(3))]
    found = relative_attack(sides, references)
    assert {name: each["references"] for name, each in found.items()} == {
        "original": 4,
        "unlearned": 4,
        "retrained": 3,
    }
    assert found["original"]["auc"] > found["unlearned"]["auc"] > 0.6
    assert found["retrained"]["auc"] == pytest.approx(0.5, abs=0.09)
    assert not found["original"]["too_few"]
    assert found["retrained"]["too_few"]

    def chances(models):
        p = [
            {
                n: np.exp(s.logits - np.logaddexp.reduce(s.logits, axis=1)[:, None])
                for n, s in m.items()
            }
            for m in models
        ]
        picked = [[q[n][np.arange(N), np.arange(N) % K] for q in p] for n in Confidences._fields]
        return Confidences(*np.array(picked))

    known, original = chances(references), chances([sides["original"]])
    a = choose_offline_a(original, known).value
    assert found["original"]["offline_a"] == a
    slow = rmia(original, known, offline_a=a).auc[0]
    assert found["original"]["auc"] == pytest.approx(slow, abs=1e-3)  # float32 ties
    assert relative_attack(sides, references[:1]) == {}


def test_distances_are_means_over_retrained_models_beside_their_own():
    a, b, c = (model(seed) for seed in range(3))
    found = distances(a, [b, c])
    assert set(found) == set(COMPARED)
    p, q, r = (np.exp(x["forget_train"][0]) for x in (a, b, c))
    p, q, r = (x / x.sum(1, keepdims=True) for x in (p, q, r))

    def apart(x, y):
        return np.linalg.norm(x - y, axis=1).mean()

    first = found["forget_train"]["activation"]
    assert first["value"] == pytest.approx((apart(p, q) + apart(p, r)) / 2)
    assert first["retrained"] == pytest.approx(apart(q, r))
    equal = (p.argmax(1) == q.argmax(1)).mean(), (p.argmax(1) == r.argmax(1)).mean()
    assert found["forget_train"]["agreement"]["value"] == pytest.approx(np.mean(equal))
    assert np.isnan(distances(a, [b])["retain_test"]["js"]["retrained"])


def judged(share, mia=0.5):
    return {"accuracy": dict(zip(SPLITS, share, strict=True)), "mia": mia}


def test_scores_are_those_of_their_papers_and_none_where_undefined():
    original, retrained = judged((1.0, 1.0, 0.9, 0.9)), judged((0.0, 1.0, 0.0, 0.8), 1.0)
    found = scores(judged((0.1, 0.9, 0.2, 0.7), 0.8), original, retrained, scope="class")
    assert found["tow"] == pytest.approx(0.9**3)
    assert found["tow_mia"] == pytest.approx(0.8 * 0.9 * 0.9)
    assert found["aus"] == pytest.approx((1 - 0.2) / 1.2)
    assert found["retention"]["forget_train"] is None
    assert found["retention_deviation"] is None
    assert scores(retrained, original, None, scope="class") == {"aus": pytest.approx(0.9)}
    samples = judged((0.1, 0.9, None, 0.7), None)
    found = scores(samples, original, samples, scope="samples")
    assert found["tow_mia"] is None
    assert found["tow"] == 1
    assert found["aus"] == pytest.approx(0.8 / 1.6)


@pytest.fixture(scope="module")
def report():
    """The models of a report, with two retrained ones."""
    logits = {"original": model(0, member=3.0), "retrained": model(1), "unlearned": model(2)}
    models = {name: evaluate_model(each, K) for name, each in logits.items()}

    def with_features(outputs):
        return {s: (x, np.zeros((len(x), 0)), y) for s, (x, y) in outputs.items()}

    outputs = {name: with_features(each) for name, each in logits.items()}
    enter_output_metrics(models, outputs, [with_features(model(3))], seed=0)
    return {"models": models}


def test_every_model_gets_its_numbers_and_tables_have_rows_of_them(report):
    for name, found in report["models"].items():
        assert found["attacks"]["rmia"]["references"] == (1 if name == "retrained" else 2)
        assert ("distances" in found) == (name != "retrained")
        assert found["scores"]["aus"] is not None
    assert report["models"]["retrained"]["scores"]["tow"] == 1
    tables = (
        (attack_rows(report), ATTACKS_HEADER, 8),
        (distance_rows(report), DISTANCES_HEADER, 12),
        (score_rows(report), SCORES_HEADER, 4),
    )
    for rows, header, count in tables:
        assert len(rows) == count
        assert all(len(row) == len(header) for row in rows)
    row = {row[0]: row[1:] for row in attack_rows(report)}["loss, ten folds"]
    original = report["models"]["original"]["attacks"]["loss"]["accuracy"]
    assert row[0] == f"{100 * original:.1f} %"
    assert row[3] == "—", "there is no head edit here"
    gap = [report["models"][m]["attacks"]["loss"]["accuracy"] for m in ("unlearned", "retrained")]
    assert row[4].replace("−", "-") == f"{100 * (gap[0] - gap[1]):+.1f}"


def test_a_report_without_them_has_no_tables():
    older = {"models": {"original": {}, "retrained": None, "unlearned": {}}}
    assert [rows(older) for rows in (attack_rows, distance_rows, score_rows)] == [[], [], []]
