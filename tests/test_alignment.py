"""Dimensional alignment: what it must not depend on, its extremes, and the slow obvious way."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import subspace_angles

from jaxunlearn.activations import FEATURES, FeatureInputs
from jaxunlearn.activations import features as penultimate
from jaxunlearn.alignment_profile import alignment_profile
from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers
from jaxunlearn.evaluation.alignment import (
    class_alignments,
    dimensional_alignment,
    feature_gram,
    retain_space,
)
from jaxunlearn.evaluation.alignment_options import AlignmentOptions, align
from jaxunlearn.evaluation.feature_spaces import alignment_by_rank, feature_spaces
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.models import build

D, N_F, N_R = 8, 20, 60
SPECTRUM = np.array([8.0, 5.0, 3.0, 1.0, 0.4, 0.2, 0.1, 0.05])  # gaps, so that no cut is a tie


@pytest.fixture(scope="module")
def features():
    """Retain features of a known spectrum, forget features in no particular place."""
    rng = np.random.default_rng(0)
    rows, _ = np.linalg.qr(rng.normal(size=(N_R, D)))
    axes, _ = np.linalg.qr(rng.normal(size=(D, D)))
    retain = rows * np.sqrt(N_R * SPECTRUM) @ axes.T
    return np.float32(rng.normal(size=(N_F, D)) + 1), np.float32(retain)


def by_loops(forget, retain, *, energy=0.95, rank=None, kind="ratio", center=False):
    """The definition, one eigenvector and one row at a time, in float64."""
    forget, retain = np.float64(forget), np.float64(retain)
    if center:
        forget, retain = forget - retain.mean(0), retain - retain.mean(0)

    def leading(Z):
        w, U = np.linalg.eigh(Z.T @ Z / len(Z))
        w, U = w[::-1], U[:, ::-1]
        r, total = 0, 0.0
        while rank is None and total < energy * w.sum():
            total += w[r]
            r += 1
        return U[:, : rank or r]

    U = leading(retain)
    if kind == "subspace":
        V = leading(forget)
        return (np.cos(subspace_angles(U, V)) ** 2).sum() / min(U.shape[1], V.shape[1])
    inside = [sum((u @ z) ** 2 for u in U.T) for z in forget]
    whole = [z @ z for z in forget]
    if kind == "energy":
        return sum(inside) / sum(whole)
    return np.mean([0 if w == 0 else np.sqrt(i / w) for i, w in zip(inside, whole, strict=True)])


@pytest.mark.parametrize("kind", ["ratio", "energy", "subspace"])
@pytest.mark.parametrize("cut", [{"energy": 0.9}, {"energy": 0.95}, {"rank": 2}])
@pytest.mark.parametrize("center", [False, True])
def test_every_kind_is_its_definition(features, kind, cut, center):
    found = align(*features, AlignmentOptions(kind=kind, center=center, **cut))
    wanted = by_loops(*features, kind=kind, center=center, **cut)
    assert float(found.value) == pytest.approx(wanted, abs=2e-5)


def test_scaling_rotation_and_order_change_nothing(features):
    forget, retain = features
    axes, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))
    order = np.random.default_rng(2).permutation(N_F)
    before = float(align(forget, retain).value)
    assert 0.2 < before < 0.99
    for scale in (1e-2, 1.0, 1e2):
        turned = (np.float32(scale * z @ axes) for z in (forget[order], retain))
        assert float(align(*turned).value) == pytest.approx(before, abs=1e-5)


def test_it_is_one_inside_the_kept_directions_and_at_full_rank_and_zero_when_orthogonal():
    retain = np.float32(np.random.default_rng(0).normal(size=(30, 3)) @ np.eye(3, D))
    inside, outside = np.float32(np.eye(3, D)), np.float32(np.eye(D)[3:])
    for kind in ("ratio", "energy", "subspace"):
        options = AlignmentOptions(kind=kind, rank=3)
        assert float(align(inside, retain, options).value) == pytest.approx(1, abs=1e-6)
        assert float(align(outside, retain, options).value) == pytest.approx(0, abs=1e-6)
    everywhere = np.float32(np.random.default_rng(1).normal(size=(30, D)))
    everything = align(outside, everywhere, AlignmentOptions(rank=D))
    assert float(everything.value) == pytest.approx(1, abs=1e-6)


def test_a_zero_row_counts_as_zero_and_is_reported_and_a_padded_row_is_not_there(features):
    forget, retain = features
    gram = feature_gram(jnp.asarray(retain))
    dead = np.concatenate([forget, np.zeros((N_F, D), np.float32)])
    alone = dimensional_alignment(jnp.asarray(forget), jnp.ones(N_F, bool), gram)
    half = dimensional_alignment(jnp.asarray(dead), jnp.ones(2 * N_F, bool), gram)
    padded = dimensional_alignment(jnp.asarray(dead), jnp.arange(2 * N_F) < N_F, gram)
    assert float(half.value) == pytest.approx(float(alone.value) / 2, rel=1e-6)
    assert int(half.zero_rows) == N_F
    assert float(padded.value) == pytest.approx(float(alone.value), rel=1e-6)
    assert int(padded.zero_rows) == int(alone.zero_rows) == 0


def test_features_that_are_all_dead_align_with_nothing_and_nothing_is_nan():
    dead = np.zeros((5, D), np.float32)
    for kind in ("ratio", "energy", "subspace"):
        for options in (AlignmentOptions(kind=kind), AlignmentOptions(kind=kind, rank=3)):
            for pair in ((dead, dead), (np.ones((5, D), np.float32), dead)):
                assert float(align(*pair, options).value) == 0


def test_directions_that_retain_features_do_not_use_are_never_kept():
    retain = np.float32(np.eye(2, D))
    forget = np.float32(np.eye(D)[[0, 5]])
    assert float(align(forget, retain, AlignmentOptions(rank=5)).value) == pytest.approx(0.5)
    assert int(align(forget, retain, AlignmentOptions(rank=5)).rank) == 2


def test_dead_rows_stay_dead_when_features_are_centred(features):
    forget, retain = features
    dead = np.concatenate([forget, np.zeros((N_F, D), np.float32)])
    alone, half = (align(z, retain, AlignmentOptions(center=True)) for z in (forget, dead))
    assert float(half.value) == pytest.approx(float(alone.value) / 2, rel=1e-6)
    assert int(half.zero_rows) == N_F


def test_unit_features_weigh_every_example_alike(features):
    forget, retain = features
    longer = retain * np.linspace(0.1, 10, N_R, dtype=np.float32)[:, None]
    options = AlignmentOptions(feature_norm="l2")
    assert float(align(forget, longer, options).value) == pytest.approx(
        float(align(forget, retain, options).value), abs=1e-6
    )
    assert float(align(forget, longer).value) != pytest.approx(
        float(align(forget, retain).value), abs=1e-3
    )


def test_all_ranks_at_once_are_each_rank_by_itself(features):
    forget, retain = features
    gram = feature_gram(jnp.asarray(retain))
    space, rows = retain_space(gram), (jnp.asarray(forget), jnp.ones(N_F, bool))
    curve = np.asarray(alignment_by_rank(space, *rows))
    single = [float(align(forget, retain, AlignmentOptions(rank=r)).value) for r in range(1, D + 1)]
    np.testing.assert_allclose(curve, single, atol=1e-6)
    assert (np.diff(curve) >= -1e-6).all()
    assert curve[-1] == pytest.approx(1, abs=1e-6)


def test_all_classes_from_one_pass_are_ten_direct_computations():
    rng = np.random.default_rng(3)
    labels = rng.permutation(np.repeat(np.arange(10), np.arange(11, 21)))
    Z = np.float32(3 * np.eye(10, 12)[labels] + rng.normal(size=(len(labels), 12)))
    together = class_alignments(Z, labels, 10)
    for c in range(10):
        direct = align(Z[labels == c], Z[labels != c])
        assert float(together.value[c]) == pytest.approx(float(direct.value), abs=1e-4)
        assert int(together.rank[c]) == int(direct.rank)


def test_spectra_are_shares_and_angles_those_between_the_leading_spaces(features):
    forget, retain = features
    space = retain_space(feature_gram(jnp.asarray(retain)))
    spaces = feature_spaces(space, jnp.asarray(forget), jnp.ones(N_F, bool), energy=0.9)
    np.testing.assert_allclose(spaces.retain_spectrum, SPECTRUM / SPECTRUM.sum(), atol=1e-5)
    assert spaces.forget_spectrum.sum() == pytest.approx(1, abs=1e-5)
    _, U = np.linalg.eigh(np.float64(forget.T @ forget))
    p = int((np.cumsum(spaces.forget_spectrum) < 0.9).sum()) + 1
    q = int((np.cumsum(SPECTRUM) < 0.9 * SPECTRUM.sum()).sum()) + 1
    _, V = np.linalg.eigh(np.float64(retain.T @ retain))
    wanted = np.degrees(subspace_angles(U[:, -p:], V[:, -q:]))[::-1]
    np.testing.assert_allclose(spaces.angles, wanted, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "both"}, "kind = 'both'"),
        ({"rank": 0}, "rank = 0: wanted at least 1"),
        ({"rank": D + 1}, f"rank = {D + 1}: wanted 1 to {D}"),
        ({"energy": 1.5}, r"energy = 1.5: wanted a share"),
        ({"feature_norm": "l1"}, "feature_norm = 'l1'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(features, change, said):
    make = inspect.unwrap(AlignmentOptions.__init__)

    def judge():
        options = object.__new__(AlignmentOptions)
        make(options, **change)
        return align(*features, options)

    with pytest.raises(ValueError, match=said):
        judge()


def test_a_gram_of_other_features_is_refused(features):
    unchecked = inspect.unwrap(dimensional_alignment)  # its own errors, not those of the types
    with pytest.raises(ValueError, match=r"retain Gram of shape \(3, 3\) for features \(20, 8\)"):
        unchecked(jnp.asarray(features[0]), jnp.ones(N_F, bool), jnp.eye(3))


@pytest.fixture(scope="module")
def conv_model():
    model = build("tinyvgg", channels=4, num_classes=3)
    x = np.random.default_rng(0).normal(size=(40, 8, 8, 1)).astype(np.float32)
    variables = model.init(jax.random.key(0), x)
    calls = []

    def apply_fn(variables, inputs, **kwargs):
        calls.append(inputs.shape)
        return model.apply(variables, inputs, **kwargs)

    return apply_fn, variables, x, calls


def test_the_last_row_of_the_profile_is_the_models_alignment_and_costs_no_pass_more(conv_model):
    apply_fn, variables, x, calls = conv_model
    specs = describe_layers(apply_fn, variables, x[:1])
    labels = np.zeros(len(x), np.int32)
    forget, retain = (Batches(x[rows], labels[rows], 16) for rows in (slice(8), slice(8, None)))
    del calls[:]
    profile = alignment_profile(apply_fn, specs, variables, forget, retain)
    assert len(calls) == 2  # one program for the Grams, one for the forget data
    assert list(profile) == ["conv1", "conv2", "conv3", "conv4", "head"]
    reader = FeatureInputs(penultimate(apply_fn, specs), specs["head"].d_in)
    gram = accumulate_gram(reader, variables, retain)[FEATURES].gram
    Z_f = reader.features_fn(variables, forget.inputs)
    wanted = dimensional_alignment(Z_f, jnp.ones(8, bool), gram)
    assert profile["head"] == pytest.approx(float(wanted.value), abs=1e-5)
    images = (np.asarray(b.inputs).mean((1, 2)) for b in (forget, retain))
    assert profile["conv1"] == pytest.approx(by_loops(*images), abs=1e-5)
