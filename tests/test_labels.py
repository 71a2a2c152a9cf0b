"""Stand-in labels: the best allowed class, or a uniform one, against loops over examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxunlearn.batches import Batches
from jaxunlearn.methods import UnlearningProblem
from jaxunlearn.methods.labels import excluded_classes, pseudo_label, pseudo_labels, random_label
from jaxunlearn.models import MLP

K, N = 5, 11
MODEL = MLP(features=(6,), num_classes=K)


@pytest.fixture(scope="module")
def data():
    """Variables, inputs and labels of all classes."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(N, 4)), jnp.float32)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), inputs)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes
    )
    return variables, inputs, jnp.arange(N) % K


def slow_pseudo_label(logits, excluded):
    allowed = [c for c in range(len(logits)) if not excluded[c]]
    return max(allowed, key=lambda c: (logits[c], -c))


@settings(max_examples=50, deadline=None)
@given(
    # Few values, far apart: ties, and scores next to which a finite mask value would win.
    logits=st.lists(st.sampled_from([-3e38, -1.0, 0.0, 1.0, 3e38]), min_size=K, max_size=K),
    excluded=st.lists(st.booleans(), min_size=K, max_size=K).filter(lambda e: not all(e)),
)
def test_pseudo_label_is_the_best_allowed_class(logits, excluded):
    label = pseudo_label(jnp.array(logits), jnp.array(excluded))
    assert label == slow_pseudo_label(logits, excluded)


def test_class_scope_excludes_all_forgotten_classes_for_every_example():
    excluded = excluded_classes(jnp.array([1, 3, 3]), (3, 1), K)
    np.testing.assert_array_equal(excluded, np.tile([0, 1, 0, 1, 0], (3, 1)))


def test_sample_scope_excludes_an_example_s_own_label():
    labels = np.array([4, 0, 4])
    np.testing.assert_array_equal(excluded_classes(jnp.array(labels), (), K), np.eye(K)[labels])


def test_random_labels_are_uniform_over_the_allowed_classes():
    n = 6000
    excluded = jnp.array([False, True, False, True, False])
    keys = jax.random.split(jax.random.key(0), n)
    drawn = jax.vmap(random_label, in_axes=(0, None))(keys, excluded)
    counts = np.bincount(drawn, minlength=K)
    assert counts[1] == counts[3] == 0
    # Five standard deviations of a count of n draws with probability 1/3.
    np.testing.assert_allclose(counts[[0, 2, 4]], n / 3, atol=5 * np.sqrt(n * 2 / 9))


def test_requests_stacked_on_a_leading_axis_give_each_request_s_labels():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, K)))
    requests = jnp.stack([excluded_classes(jnp.arange(3), (c,), K) for c in range(K)])
    per_request = jax.vmap(jax.vmap(pseudo_label), in_axes=(None, 0))(logits, requests)
    slow = [[slow_pseudo_label(x, e) for x, e in zip(logits, r, strict=True)] for r in requests]
    np.testing.assert_array_equal(per_request, slow)


@pytest.mark.parametrize("classes", [(2,), (0, 2, 4), ()])
@pytest.mark.parametrize("batch_size", [4, 50])
def test_pseudo_labels_of_a_problem_equal_the_loop_over_its_examples(data, classes, batch_size):
    variables, inputs, labels = data
    forget = Batches(inputs, labels, batch_size)
    if classes:
        forget = forget.select(np.flatnonzero(np.isin(labels, classes)))
    problem = UnlearningProblem(MODEL.apply, variables, forget, None, K, classes)
    given = pseudo_labels(problem)
    logits = MODEL.apply(variables, forget.inputs)
    own = [[int(y)] for y in forget.labels]
    slow = [
        slow_pseudo_label(x, np.isin(range(K), classes or y))
        for x, y in zip(np.asarray(logits), own, strict=True)
    ]
    np.testing.assert_array_equal(given, slow)
    assert not np.isin(given, classes).any()
    assert (given != forget.labels).all()
