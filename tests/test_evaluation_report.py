import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.evaluation import metrics
from jaxunlearn.evaluation.membership import svc_confidence_optml
from jaxunlearn.evaluation.report import SPLITS, evaluate_model, gap_to_retrain, json_value, predict
from jaxunlearn.evaluation.representation import pca_embedding, pseudo_label_histogram

K = 4
SIZES = {"forget_train": 30, "retain_train": 70, "forget_test": 10, "retain_test": 25}
EMPTY = (np.zeros((0, K), np.float32), np.zeros(0, np.int32))


@pytest.fixture(scope="module")
def outputs():
    """Class 0 is forgotten; the model is surer of what it was trained on."""
    rng = np.random.default_rng(0)

    def draw(split, n):
        labels = np.zeros(n, np.int32) if "forget" in split else rng.integers(1, K, n, np.int32)
        sure = 4.0 if "train" in split else 1.0
        return (rng.normal(size=(n, K)) + sure * np.eye(K)[labels]).astype(np.float32), labels

    return {split: draw(split, n) for split, n in SIZES.items()}


@pytest.fixture(scope="module")
def report(outputs):
    return evaluate_model(outputs, K)


def _linear(variables, inputs):
    return inputs @ variables["kernel"]


def _batches(inputs, batch_size, padding):
    for start in range(0, len(inputs), batch_size):
        part = inputs[start : start + batch_size]
        missing = batch_size - len(part)
        filled = np.concatenate([part, np.full((missing, *inputs.shape[1:]), padding, np.float32)])
        mask = np.arange(batch_size) < len(part)
        yield {"inputs": filled, "labels": np.zeros(batch_size, np.int32), "mask": mask}


def test_predict_equals_one_pass_over_everything_whatever_the_padding():
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(11, 3)).astype(np.float32)
    variables = {"kernel": rng.normal(size=(3, K)).astype(np.float32)}
    for batch_size, padding in ((4, 0.0), (4, np.nan), (11, 0.0)):
        logits = predict(_linear, variables, _batches(inputs, batch_size, padding))
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, inputs @ variables["kernel"], rtol=1e-5, atol=1e-6)


def test_a_ragged_last_batch_weighs_by_its_examples():
    inputs = np.eye(2, dtype=np.float32)[[0, 0, 0, 0, 1]]
    logits = predict(_linear, {"kernel": np.eye(2, dtype=np.float32)}, _batches(inputs, 4, 0.0))
    # Right on four of five; the mean of the two batches' accuracies would be 1/2.
    assert metrics.accuracy(logits, np.zeros(5, np.int32)) == (0.8, 5)


def test_predict_compiles_once_for_all_models_and_splits():
    traces = []

    def apply_fn(variables, inputs):
        traces.append(inputs.shape)
        return inputs @ variables["kernel"]

    for scale in (1.0, 2.0):
        for n in (5, 8):
            inputs = np.ones((n, 3), np.float32)
            variables = {"kernel": jnp.full((3, K), scale)}
            assert (predict(apply_fn, variables, _batches(inputs, 4, 0.0)) == 3 * scale).all()
    assert traces == [(4, 3)]


def test_predict_refuses_no_batches_and_outputs_that_are_no_logits():
    with pytest.raises(ValueError, match="no batches to predict on"):
        predict(_linear, {"kernel": np.eye(3, dtype=np.float32)}, [])
    with pytest.raises(ValueError, match=r"gave \(4,\) for a batch of 4: wanted logits"):
        predict(lambda _, x: x.sum(axis=1), {}, _batches(np.ones((4, 3), np.float32), 4, 0.0))


def test_a_models_numbers_equal_the_metrics_of_its_splits(outputs, report):
    for split, (logits, labels) in outputs.items():
        rate, total = metrics.accuracy(logits, labels)
        assert report["accuracy"][split] == rate
        assert report["counts"][split]["total"] == total == SIZES[split]
        assert report["counts"][split]["correct"] == round(rate * total)
        confusion = metrics.confusion_matrix(logits, labels)
        assert report["accuracy_macro"][split] == metrics.macro_accuracy(confusion)


@pytest.mark.parametrize("side", ["train", "test"])
def test_confusion_and_per_class_pool_forget_and_retain(outputs, report, side):
    parts = [outputs[f"{role}_{side}"] for role in ("forget", "retain")]
    logits, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    confusion = metrics.confusion_matrix(logits, labels)
    assert report["confusion"][side] == confusion.tolist()
    assert report["per_class"][side] == metrics.per_class_accuracy(confusion).tolist()


def test_the_attack_learns_from_retain_and_judges_the_forget_set(outputs, report):
    retain, test, forget = (
        metrics.confidence(*outputs[split])
        for split in ("retain_train", "retain_test", "forget_train")
    )
    attack = svc_confidence_optml(retain, test, forget)
    assert report["mia"] == report["mia_detail"]["efficacy"] == attack.efficacy
    assert report["mia_detail"]["count"] == SIZES["forget_train"]
    assert report["mia_detail"]["members"] == SIZES["retain_test"]
    drawn = evaluate_model(outputs, K, members="random", seed=1)
    expected = svc_confidence_optml(retain, test, forget, members="random", seed=1)
    assert drawn["mia_detail"] == {
        "attack": "svc_confidence_optml",
        **json_value(expected._asdict()),
    }


def test_numbers_of_an_empty_split_are_null_and_the_report_is_json(outputs):
    report = evaluate_model(outputs | {"forget_test": EMPTY}, K)
    assert report["accuracy"]["forget_test"] is report["accuracy_macro"]["forget_test"] is None
    assert report["counts"]["forget_test"] == {"correct": 0, "total": 0}
    assert report["per_class"]["test"][0] is None
    assert report["mia"] is not None
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_without_non_members_the_attack_is_null_with_a_reason(outputs):
    report = evaluate_model(outputs | {"retain_test": EMPTY}, K)
    assert report["mia"] is None
    assert report["mia_detail"]["reason"] == "no examples in retain_test"


def test_gaps_are_differences_to_the_retrained_model_and_zero_for_itself(outputs, report):
    retrained = evaluate_model(
        outputs | {"forget_train": EMPTY, "retain_test": outputs["retain_train"]}, K
    )
    gaps = gap_to_retrain({"original": report, "retrained": retrained, "unlearned": None})
    assert set(gaps) == {"original"}
    for split in ("retain_train", "forget_test", "retain_test"):
        difference = report["accuracy"][split] - retrained["accuracy"][split]
        assert gaps["original"][split] == difference
    assert gaps["original"]["forget_train"] is gaps["original"]["mia"] is None
    itself = gap_to_retrain({"unlearned": report, "retrained": report})["unlearned"]
    assert itself == dict.fromkeys((*SPLITS, "mia"), 0.0)
    assert gap_to_retrain({"original": report, "retrained": None}) is None


def test_splits_that_do_not_fit_are_refused(outputs):
    with pytest.raises(ValueError, match=r"splits \['forget'.*wanted \['forget_test'"):
        evaluate_model({"forget": outputs["forget_train"]}, K)
    with pytest.raises(ValueError, match=r"forget_test: .*\(10, 4\), wanted .*\(10, 5\)"):
        evaluate_model({"forget_test": outputs["forget_test"]} | outputs, K + 1)
    logits, labels = outputs["retain_test"]
    with pytest.raises(ValueError, match=r"retain_test: .*\(25, 4\), wanted .*\(24, 4\)"):
        evaluate_model(outputs | {"retain_test": (logits, labels[1:])}, K)


def test_embedding_is_the_pooled_svd_with_one_plane_for_all_models():
    rng = np.random.default_rng(2)
    features = {
        name: rng.normal(size=(20, 6)) * np.arange(1, 7) for name in ("original", "unlearned")
    }
    pooled = np.concatenate(list(features.values()))
    u, s, _ = np.linalg.svd(pooled - pooled.mean(axis=0), full_matrices=False)
    expected = u[:, :2] * s[:2]
    embedding = pca_embedding(features)
    stacked = np.concatenate(list(embedding.values()))
    signs = np.sign((stacked * expected).sum(axis=0))
    np.testing.assert_allclose(stacked, expected * signs, atol=1e-5)
    # The sign convention: each axis' largest loading is positive, for the mirrored data as well.
    mirrored = pca_embedding({name: -z for name, z in features.items()})
    np.testing.assert_allclose(mirrored["original"], -embedding["original"], atol=1e-5)


def test_embedding_refuses_features_that_share_no_plane():
    for features in ({}, {"a": np.ones((3, 1))}, {"a": np.ones((3, 2)), "b": np.ones((3, 4))}):
        with pytest.raises(ValueError, match="wanted one width d >= 2"):
            pca_embedding(features)
    with pytest.raises(ValueError, match="no NaN or inf"):
        pca_embedding({"a": np.array([[0.0, np.inf]])})


def test_pseudo_labels_are_compared_by_histogram_and_by_example():
    pseudo, retrained = np.array([1, 1, 2, 3]), np.array([1, 2, 1, 1])
    labels = pseudo_label_histogram(pseudo, retrained, K)
    assert labels.histogram.tolist() == [0, 2, 1, 1]
    assert labels.retrained_histogram.tolist() == [0, 3, 1, 0]
    assert (labels.total_variation, labels.agreement) == (0.25, 0.25)
    alone = pseudo_label_histogram(pseudo, None, K)
    assert alone[1:] == (None, None, None)
    with pytest.raises(ValueError, match=r"classes run from 1 to 3: wanted 0\.\.2"):
        pseudo_label_histogram(pseudo, None, 3)
    with pytest.raises(ValueError, match="no labels to count"):
        pseudo_label_histogram(pseudo[:0], None, K)
