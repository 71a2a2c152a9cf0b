import jax
import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import pair_confusion_matrix

from jaxunlearn.evaluation.clustering import (
    contingency,
    k_means,
    normalized_mutual_information,
    pair_f1,
)

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(0)
    means = 3 * rng.normal(size=(3, 4))
    return (rng.normal(size=(60, 4)) + means[rng.integers(0, 3, 60)]).astype(np.float32)


@pytest.fixture
def reference(golden):
    return np.load(golden / "feature_metrics.npz")


def _inertia(points, clusters):
    centres = np.asarray(clusters.centres, dtype=np.float64)
    return np.square(points - centres[np.asarray(clusters.assignment)]).sum()


def test_lloyd_from_given_centres_equals_the_public_reference(reference):
    clusters = k_means(KEY, reference["features"], 6, init=reference["init_centers"])
    np.testing.assert_array_equal(clusters.assignment, reference["kmeans_labels"])
    np.testing.assert_allclose(clusters.centres, reference["kmeans_centers"], atol=1e-5)
    assert float(clusters.inertia) == pytest.approx(reference["kmeans_inertia"], rel=1e-6)


def test_restarts_reach_the_best_known_inertia(reference):
    clusters = k_means(KEY, reference["features"], 6, restarts=32)
    assert float(clusters.inertia) <= reference["kmeans_best_inertia"] * (1 + 1e-6)
    # The same partition, under other names.
    table = contingency(clusters.assignment, reference["kmeans_best_labels"], 6, 6)
    assert (np.count_nonzero(table, axis=1) == 1).all()


@pytest.mark.parametrize("labelling", ["kmeans", "kmeans_best", "other"])
def test_scores_equal_the_public_reference(reference, labelling):
    clusters = reference[f"{labelling}_labels"]
    table = contingency(reference["labels"], clusters, 6, int(clusters.max()) + 1)
    nmi = normalized_mutual_information(table)
    assert nmi == pytest.approx(reference[f"nmi__{labelling}"], abs=1e-12)
    expected = reference[f"pair_precision_recall_f1__{labelling}"]
    np.testing.assert_allclose(pair_f1(table), expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learn_on_random_tables_and_ignore_the_order_of_rows(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, 50)
    clusters = np.where(rng.random(50) < 0.6, labels, rng.integers(0, 6, 50))
    table = contingency(labels, clusters, 5, 6)
    assert table.sum() == 50
    assert not table[4].any()
    nmi = normalized_mutual_info_score(labels, clusters)
    assert normalized_mutual_information(table) == pytest.approx(nmi, abs=1e-12)
    (_, apart), (split, together) = pair_confusion_matrix(labels, clusters)
    precision, recall = together / (together + apart), together / (together + split)
    f1 = 2 * precision * recall / (precision + recall)
    np.testing.assert_allclose(pair_f1(table), (precision, recall, f1), atol=1e-12)

    order = rng.permutation(50)
    np.testing.assert_array_equal(contingency(labels[order], clusters[order], 5, 6), table)


def test_pair_scores_of_a_table_counted_by_hand():
    # Pairs that share both: 3 + 1 + 6; a cluster: 6 + 3 + 10; a label: 6 + 6 + 6.
    table = np.array([[3, 1, 0], [1, 2, 1], [0, 0, 4]])
    scores = pair_f1(table)
    assert scores == pytest.approx((10 / 19, 10 / 18, 20 / 37), abs=1e-15)


def test_nmi_is_one_for_renamed_labels_and_zero_for_one_cluster():
    labels = np.array([0, 0, 0, 1, 1, 2])
    renamed = contingency(labels, np.array([2, 0, 1])[labels], 3, 3)
    assert normalized_mutual_information(renamed) == pytest.approx(1, abs=1e-15)
    assert pair_f1(renamed) == (1, 1, 1)
    one = contingency(labels, np.full(6, 1), 3, 3)
    assert normalized_mutual_information(one) == normalized_mutual_information(one.T) == 0
    assert pair_f1(one).recall == 1


def test_scores_that_are_undefined():
    assert normalized_mutual_information(np.array([[3]])) == normalized_mutual_info_score([0], [0])
    empty = contingency(np.zeros(0, int), np.zeros(0, int), 2, 2)
    assert np.isnan(normalized_mutual_information(empty))
    assert pair_f1(empty) == pair_f1(np.eye(3, dtype=int)) == (0, 0, 0)
    assert pair_f1(np.array([[1, 1]])) == (0, 0, 0)


def test_a_contingency_table_names_what_is_out_of_range():
    ones = np.ones(2, int)
    with pytest.raises(ValueError, match=r"labels run from 1 to 1: wanted 0\.\.0"):
        contingency(ones, ones, 1, 2)
    with pytest.raises(ValueError, match=r"clusters run from -1 to -1: wanted 0\.\.1"):
        contingency(ones, -ones, 2, 2)


def test_k_means_equals_a_python_loop(points):
    start = points[:3].astype(np.float64)
    centres, assignment = start.copy(), None
    for _ in range(100):
        gaps = np.square(points[:, None, :] - centres[None, :, :]).sum(axis=2)
        if (gaps.argmin(axis=1) == assignment).all():
            break
        assignment = gaps.argmin(axis=1)
        centres = np.stack([points[assignment == c].mean(axis=0) for c in range(3)])
    clusters = k_means(KEY, points, 3, init=points[:3])
    np.testing.assert_array_equal(clusters.assignment, assignment)
    np.testing.assert_allclose(clusters.centres, centres, atol=1e-5)
    assert float(clusters.inertia) == pytest.approx(gaps.min(axis=1).sum(), rel=1e-6)


def test_k_means_is_a_function_of_its_key_and_more_restarts_do_no_harm(points):
    first, again = k_means(KEY, points, 8), k_means(KEY, points, 8)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    single = [k_means(jax.random.key(seed), points, 8, restarts=1) for seed in range(8)]
    assert len({float(clusters.inertia) for clusters in single}) > 1
    assert float(first.inertia) <= np.median([float(clusters.inertia) for clusters in single])


def test_a_common_offset_changes_no_cluster(points):
    clusters, moved = (k_means(KEY, x, 3, init=x[:3]) for x in (points, points + 10_000))
    np.testing.assert_array_equal(clusters.assignment, moved.assignment)
    assert float(moved.inertia) == pytest.approx(float(clusters.inertia), rel=1e-2)


def test_seeds_find_clusters_that_lie_far_apart():
    rng = np.random.default_rng(0)
    corners = 100 * rng.normal(size=(8, 4))
    rows = (rng.normal(size=(60, 4)) + corners[np.arange(60) % 8]).astype(np.float32)
    # Seeds drawn uniformly share a corner in all but one of 400 draws, and Lloyd cannot part them.
    for seed in range(5):
        clusters = k_means(jax.random.key(seed), rows, 8, restarts=1)
        table = contingency(np.arange(60) % 8, clusters.assignment, 8, 8)
        assert normalized_mutual_information(table) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("iterations", [1, 100])
def test_rows_belong_to_the_nearest_centre_however_early_it_stops(points, iterations):
    clusters = k_means(KEY, points, 8, iterations=iterations)
    gaps = np.square(points[:, None, :] - np.asarray(clusters.centres)[None, :, :]).sum(axis=2)
    np.testing.assert_array_equal(clusters.assignment, gaps.argmin(axis=1))
    assert float(clusters.inertia) == pytest.approx(_inertia(points, clusters), rel=1e-6)


def test_empty_clusters_are_seeded_again(points):
    nowhere = np.full((3, 4), 1e3, np.float32)
    nowhere[0] = points[0]
    clusters = k_means(KEY, points, 3, init=nowhere)
    assert set(np.asarray(clusters.assignment).tolist()) == {0, 1, 2}
    # Without new seeds one cluster would keep every row.
    assert float(clusters.inertia) < np.square(points - points.mean(axis=0)).sum() / 2


@pytest.mark.parametrize("distinct", [1, 2, 3, 5])
def test_fewer_distinct_rows_than_clusters_give_numbers(points, distinct):
    rows = points[np.arange(60) % distinct]
    clusters = k_means(KEY, rows, 3)
    assert all(np.isfinite(leaf).all() for leaf in clusters)
    assert len(np.unique(clusters.assignment)) == min(distinct, 3)
    if distinct <= 3:
        assert float(clusters.inertia) < 1e-8


def test_features_that_are_all_zero_make_one_cluster():
    clusters = k_means(KEY, np.zeros((60, 4), np.float32), 3)
    assert len(np.unique(clusters.assignment)) == 1
    assert not np.asarray(clusters.centres).any()
    assert float(clusters.inertia) == 0


def test_k_means_says_what_it_cannot_cluster(points):
    with pytest.raises(ValueError, match=r"2 rows, k=3.*no more clusters than rows"):
        k_means(KEY, points[:2], 3)
    with pytest.raises(ValueError, match=r"restarts=0.*at least one"):
        k_means(KEY, points, 3, restarts=0)
    with pytest.raises(ValueError, match=r"init has shape \(2, 4\).*\(3, 4\)"):
        k_means(KEY, points, 3, init=points[:2])
    with pytest.raises(ValueError, match="init hold NaN"):
        k_means(KEY, points, 3, init=np.full((3, 4), np.nan))
    with pytest.raises(ValueError, match="features hold NaN, inf or numbers too large"):
        k_means(KEY, points * np.float32(1e30), 3)
