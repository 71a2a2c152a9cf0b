"""The guard: what is added in front of a model, and how it is taken away, folded and stored."""

import sys
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from jaxunlearn.activations import with_features
from jaxunlearn.capture import capture_inputs, capture_outputs, describe_layers
from jaxunlearn.exported import export_function, load_function
from jaxunlearn.guard import attach, delta_of, detach, fold_guard, guard
from jaxunlearn.guard_files import (
    export_guard,
    load_guard,
    read_arrays,
    read_guard,
    weights_sha256,
    write_arrays,
)
from jaxunlearn.layers import LayerSpec
from jaxunlearn.network import with_preprocessing
from jaxunlearn.preprocessing import normalizer

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
SHAPE = (4, 4, 3)


class Net(nn.Module):
    """A convolution, a norm with batch statistics, dropout and a head."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.relu(x).mean(axis=(1, 2))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3, name="head")(x)

    def halves(self, x, factor):
        return x * factor


class Flat(nn.Module):
    """Dense layers on flattened images."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.relu(
            nn.Dense(8, name="first", bias_init=nn.initializers.normal())(x.reshape(-1, 48))
        )
        return nn.Dense(3, name="head")(x)


def unchanged(variables, x, **kwargs):
    """A model that shows what it is given."""
    return x


@pytest.fixture(scope="module")
def case():
    """Model, its variables, images in [0, 1] and two deltas."""
    x = jax.random.uniform(jax.random.key(0), (6, *SHAPE))
    deltas = 0.3 * jax.random.normal(jax.random.key(1), (2, *SHAPE))
    return Net(), Net().init(jax.random.key(2), x), x, deltas


@pytest.fixture(scope="module")
def dense():
    return Flat().init(jax.random.key(3), jnp.zeros((1, *SHAPE)))


# --- calling -------------------------------------------------------------------------------------


def test_the_guard_is_adding_delta_by_hand_bit_for_bit(case):
    model, variables, x, (delta, _) = case
    guarded, held = guard(model.apply), attach(variables, delta)

    def by_hand(v, x):
        return model.apply(detach(v), x + v["guard"]["delta"][None])

    wanted = by_hand(held, x)
    np.testing.assert_array_equal(guarded(held, x), wanted)
    np.testing.assert_array_equal(jax.jit(guarded)(held, x), jax.jit(by_hand)(held, x))
    batches = x.reshape(2, 3, *SHAPE)
    mapped = [jax.vmap(f, in_axes=(None, 0))(held, batches) for f in (guarded, by_hand)]
    np.testing.assert_array_equal(*mapped)
    assert np.abs(wanted - model.apply(variables, x)).max() > 1e-3


def test_a_bank_of_deltas_is_mapped_with_shared_weights(case):
    model, variables, x, deltas = case
    axes = dict.fromkeys(variables) | {"guard": 0}
    held = {**variables, "guard": {"delta": deltas}}
    together = jax.vmap(guard(model.apply), in_axes=(axes, None))(held, x)
    for logits, delta in zip(together, deltas, strict=True):
        np.testing.assert_allclose(logits, model.apply(variables, x + delta[None]), atol=1e-5)


def test_without_the_guard_the_model_is_the_original_bit_for_bit(case):
    model, variables, x, (delta, _) = case
    before, held = dict(variables), attach(variables, delta)
    assert list(variables) == list(before)  # attach made a new dict
    np.testing.assert_array_equal(model.apply(held, x), model.apply(variables, x))
    free = detach(held)
    chex.assert_trees_all_equal_structs(free, variables)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (free, variables)), strict=True))


def test_deltas_are_switched_by_data_without_a_new_trace(case):
    model, variables, x, deltas = case
    counted = chex.assert_max_traces(lambda v, x: model.apply(v, x), n=1)
    guarded = jax.jit(guard(counted))
    first, second = (guarded(attach(variables, delta), x) for delta in deltas)
    third = guarded(attach(variables, deltas, [0.5, -2.0]), x)
    assert np.abs(first - second).max() > 1e-3 < np.abs(second - third).max()


def test_equal_guards_are_compiled_once(case):
    model, variables, x, (delta, _) = case
    traces = []

    def counted(variables, x):
        traces.append(1)
        return x

    run = jax.jit(lambda f, v, x: f(v, x), static_argnums=0)
    for scale in (16, 16.0):
        run(guard(counted, scale=scale), attach(variables, delta), x)
    run(guard(counted, input_std=list(STD)), attach(variables, delta), x)
    run(guard(counted, input_std=tuple(STD)), attach(variables, delta), x)
    assert len(traces) == 2
    assert guard(model.apply) == guard(model.apply) != guard(model.apply, clip=True)


def test_in_training_statistics_move_and_keywords_pass_through(case):
    model, variables, x, (delta, _) = case
    mode = {"train": True, "rngs": {"dropout": jax.random.key(4)}}
    out, updated = guard(model.apply)(
        attach(variables, delta), x, **mode, mutable=["batch_stats", "guard"]
    )
    wanted, state = model.apply(variables, x + delta[None], **mode, mutable=["batch_stats"])
    np.testing.assert_array_equal(out, wanted)
    assert list(updated) == ["batch_stats"]
    chex.assert_trees_all_equal(updated["batch_stats"], state["batch_stats"])
    before, after = (v["batch_stats"]["norm"]["mean"] for v in (variables, updated))
    assert np.abs(before - after).max() > 1e-3


def test_further_arguments_and_the_method_pass_through(case):
    model, variables, x, (delta, _) = case
    halved = guard(model.apply)(attach(variables, delta), x, 0.5, method="halves")
    np.testing.assert_array_equal(halved, (x + delta[None]) * 0.5)


def test_what_reads_models_reads_guarded_ones(case):
    model, variables, x, (delta, _) = case
    guarded, held = guard(model.apply), attach(variables, delta)
    shifted = x + delta[None]
    specs = describe_layers(guarded, held, x)
    assert specs == describe_layers(model.apply, variables, x)
    chex.assert_trees_all_equal(
        capture_inputs(guarded, specs)(held, x),
        capture_inputs(model.apply, specs)(variables, shifted),
    )
    assert (capture_inputs(guarded, specs)(held, x)["stem"][0] == shifted).all()
    chex.assert_trees_all_equal(
        with_features(guarded, specs)(held, x),
        with_features(model.apply, specs)(variables, shifted),
    )
    chex.assert_trees_all_equal(
        capture_outputs(guarded, "norm")(held, x),
        capture_outputs(model.apply, "norm")(variables, shifted),
    )


# --- units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "dtype"), [(255, np.uint8), (16, np.int32), (255, np.float32)])
def test_stored_pixels_get_delta_in_their_own_unit(case, dense, scale, dtype):
    _, _, x, (delta, _) = case
    stored = np.asarray(np.round(x * scale), dtype)
    apply_fn = with_preprocessing(Flat(), normalizer(MEAN, STD, float(scale)))
    logits = guard(apply_fn, scale=scale)(attach(dense, delta), stored)
    pixels = jnp.asarray(stored, jnp.float32) / scale + delta[None]
    wanted = Flat().apply(dense, normalizer(MEAN, STD, 1.0)(pixels))
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    given = guard(unchanged, scale=scale)(attach({}, delta), stored)
    np.testing.assert_array_equal(given, stored.astype(np.float32) + (scale * delta)[None])


@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), ((0.4,), (0.25,))])
def test_raw_and_normalised_inputs_give_the_same_guarded_logits(case, dense, mean, std):
    _, _, x, (delta, _) = case
    normalize, held = normalizer(mean, std, 1.0), attach(dense, delta)
    raw = guard(with_preprocessing(Flat(), normalize))(held, x)
    given = std[0] if len(std) == 1 else std
    np.testing.assert_allclose(
        guard(Flat().apply, input_std=given)(held, normalize(x)), raw, atol=1e-5
    )
    forgot = guard(Flat().apply)(held, normalize(x))
    assert np.abs(forgot - raw).max() > 1e-2


def test_clipping_brings_pixels_back_into_their_range(case):
    _, _, x, (delta, _) = case
    held = attach({}, 3 * delta)
    pixels = guard(unchanged, clip=True)(held, x)
    np.testing.assert_array_equal(pixels, jnp.clip(x + 3 * delta[None], 0, 1))
    assert pixels.min() == 0.0
    assert pixels.max() == 1.0
    stored = np.asarray(np.round(255 * x), np.uint8)
    clipped = guard(unchanged, clip=True, scale=255)(held, stored)
    np.testing.assert_allclose(
        clipped / 255, jnp.clip(stored / 255 + 3 * delta[None], 0, 1), atol=1e-6
    )
    assert guard(unchanged)(held, x).max() > 1.0


@pytest.mark.parametrize(("inputs", "kept"), [("bfloat16", "bfloat16"), ("float32", "bfloat16")])
def test_sums_are_in_float32_whatever_comes(case, inputs, kept):
    _, _, x, (delta, _) = case
    x, delta = x.astype(inputs), delta.astype(kept)
    out = guard(unchanged, scale=255)(attach({}, delta), x)
    assert out.dtype == jnp.float32
    wanted = x.astype(jnp.float32) + 255 * delta.astype(jnp.float32)[None]
    np.testing.assert_array_equal(out, wanted)


def test_double_precision_stays(case, x64):
    x, delta = np.full((1, 2), 0.1), np.full(2, 1e-12)
    np.testing.assert_array_equal(guard(unchanged)(attach({}, delta), x), x + delta)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"input_std": STD, "clip": True},
            r"normalised inputs have no scale and cannot be clipped",
        ),
        (
            {"input_std": 0.5, "scale": 255},
            r"scale = 255 came with input_std = 0.5.*leave these out",
        ),
        ({"scale": 0}, r"scale is 0; wanted a number above 0, 255 for uint8"),
        ({"input_std": (0.5, 0.0)}, r"std is \(0.5, 0.0\); wanted numbers above 0"),
        ({"input_std": ()}, r"std is \(\); wanted numbers above 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        guard(unchanged, **options)


X = jnp.zeros((2, *SHAPE))


@pytest.mark.parametrize(
    ("options", "variables", "x", "said"),
    [
        ({}, {"params": {}}, X, r"came as \['params'\]; wanted a collection 'guard'.*attach\("),
        ({}, {"guard": {}}, X, r"came as \['guard'\]; wanted .* that holds 'delta'"),
        ({}, 3.0, X, "the variables came as float; wanted a collection"),
        ({}, {"guard": {"delta": np.ones(SHAPE, int)}}, X, r"came as int\d+ \[4, 4, 3\].*/ 255"),
        ({}, attach({}, np.ones((4, 4, 1))), X, r"\[4, 4, 1\] for inputs \[2, 4, 4, 3\]; wanted"),
        ({}, attach({}, np.ones((2, *SHAPE))), X, r"attach\(variables, bank, weights\) for a bank"),
        ({}, attach({}, np.ones(SHAPE)), X[0], r"write x\[None\] for a single input"),
        ({}, attach({}, np.ones(SHAPE)), X.astype(jnp.uint8), r"uint8 \[2, 4, 4, 3\].*scale=255"),
        ({"input_std": (1.0, 2.0)}, attach({}, np.ones(SHAPE)), X, r"2 std .* \[4, 4, 3\]; wanted"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_call_that_cannot_be_guarded_is_refused(options, variables, x, said):
    with pytest.raises(ValueError, match=said):
        guard(unchanged, **options)(variables, x)


# --- attaching -----------------------------------------------------------------------------------


def test_a_bank_is_composed_by_its_weights(case):
    _, variables, _, deltas = case
    composed = delta_of(attach(variables, deltas, jnp.array([0.5, -2.0])))
    np.testing.assert_allclose(composed, 0.5 * deltas[0] - 2 * deltas[1], atol=1e-6)
    for j, unit in enumerate(np.eye(2)):
        np.testing.assert_array_equal(delta_of(attach(variables, deltas, unit)), deltas[j])
    replaced = attach(attach(variables, deltas[0]), deltas[1])
    np.testing.assert_array_equal(delta_of(replaced), deltas[1])


@pytest.mark.parametrize(
    ("deltas", "weights", "said"),
    [
        (np.ones(SHAPE, np.uint8), None, r"delta came as uint8 \[4, 4, 3\]; wanted floating-point"),
        (
            np.ones((2, 5)),
            [1.0],
            r"weights \[1\] came for deltas \[2, 5\]; wanted one for each row",
        ),
        (
            np.ones((2, 5)),
            np.float32(1.0)[None, None],
            r"weights \[1, 1\] .* leave the weights out",
        ),
    ],
)
def test_deltas_and_weights_that_do_not_fit_are_refused(deltas, weights, said):
    with pytest.raises(ValueError, match=said):
        attach({}, deltas, weights)


# --- folding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), ((0.4,), (0.25,))])
def test_in_front_of_a_dense_layer_the_guard_is_a_bias(case, dense, mean, std):
    _, _, x, (delta, _) = case
    stored = np.asarray(np.round(255 * x), np.uint8)
    apply_fn = with_preprocessing(Flat(), normalizer(mean, std, 255.0))
    spec, held = describe_layers(apply_fn, dense, stored)["first"], attach(dense, delta)
    folded = fold_guard(held, spec, std=std)
    np.testing.assert_allclose(
        apply_fn(folded, stored), guard(apply_fn, scale=255)(held, stored), atol=1e-5
    )
    assert np.abs(apply_fn(folded, stored) - apply_fn(dense, stored)).max() > 1e-2
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), folded, dense)
    assert changed["params"] == {
        "first": {"kernel": False, "bias": True},
        "head": {"kernel": False, "bias": False},
    }


def test_a_layer_that_reads_stored_pixels_is_folded_with_one_over_their_scale(case, dense):
    _, _, x, (delta, _) = case
    held, spec = attach(dense, delta), LayerSpec("first", (48, 8))
    wanted = guard(Flat().apply, scale=16)(held, 16 * x)
    np.testing.assert_allclose(
        Flat().apply(fold_guard(held, spec, std=1 / 16), 16 * x), wanted, rtol=1e-5, atol=1e-5
    )


def test_a_layer_that_contracts_the_axes_of_an_image_is_folded(case):
    _, _, x, (delta, _) = case
    layer = nn.DenseGeneral((2, 5), axis=(-3, -2, -1))
    variables = layer.init(jax.random.key(5), x)
    held = attach(variables, delta)
    folded = fold_guard(held, describe_layers(layer.apply, variables, x)[""])
    np.testing.assert_allclose(
        layer.apply(folded, x), guard(layer.apply)(held, x), rtol=1e-5, atol=1e-5
    )


LAYER = {"kernel": jnp.ones((48, 2)), "bias": jnp.zeros(2)}


@pytest.mark.parametrize(
    ("layer", "shape", "options", "said"),
    [
        (LAYER, (48, 2), {"clip": True}, "a guard that clips is not linear.*keep the wrapper"),
        ({"kernel": LAYER["kernel"]}, (48, 2), {}, "no bias: the parameters have no 'first/bias'"),
        ({"bias": LAYER["bias"]}, (48, 2), {}, "the parameters have no 'first/kernel'"),
        (LAYER, (3, 2), {}, r"'first' reads an input of shape \(1, 48\)"),
        (LAYER, (48, 2), {"std": -1.0}, r"std is -1.0; wanted numbers above 0"),
        (LAYER, (48, 2), {"std": (1.0, 1.0)}, r"2 std came for a delta \[4, 4, 3\]"),
    ],
)
def test_what_is_no_bias_is_not_folded(layer, shape, options, said):
    held = attach({"params": {"first": layer}}, jnp.ones(SHAPE))
    with pytest.raises(ValueError, match=said):
        fold_guard(held, LayerSpec("first", shape), **options)


def test_a_convolution_and_a_stacked_layer_are_not_folded(case):
    model, variables, x, (delta, _) = case
    held = attach(variables, delta)
    stem = describe_layers(model.apply, variables, x)["stem"]
    with pytest.raises(
        ValueError, match=r"'stem': it is a convolution.*map of biases.*keep the wrapper"
    ):
        fold_guard(held, stem)
    with pytest.raises(ValueError, match=r"a layer of nn.scan or nn.vmap"):
        fold_guard(held, LayerSpec("first", (2, 48, 3), stack=(2,)))
    with pytest.raises(ValueError, match="wanted a collection 'guard'"):
        fold_guard(variables, stem)


# --- files ---------------------------------------------------------------------------------------


def test_an_exported_guard_comes_back_equal(case, tmp_path):
    model, variables, x, deltas = case
    held = attach(variables, deltas, [1.0, 0.5])
    path = tmp_path / "guard.npz"
    export_guard(
        path,
        held,
        bank=deltas,
        weights=[1.0, 0.5],
        scale=255,
        clip=True,
        normalization={"mean": MEAN, "std": np.array(STD)},
        forget="class 3",
        metrics={"UA": np.float32(99.5), "RA": jnp.float32(98.0)},
    )
    loaded, file = load_guard(path, variables), read_guard(path)
    chex.assert_trees_all_equal(loaded, held)
    stored = np.asarray(np.round(255 * x), np.uint8)
    original, restored = (
        guard(model.apply, scale=255, clip=True),
        guard(model.apply, **file.options),
    )
    assert original == restored
    np.testing.assert_array_equal(original(held, stored), restored(loaded, stored))
    np.testing.assert_array_equal(file.bank, deltas)
    np.testing.assert_array_equal(file.weights, [1.0, 0.5])
    versions = file.header.pop("versions")
    assert versions["jaxunlearn"]
    assert file.header == {
        "format": "jaxunlearn guard 1",
        "shape": [4, 4, 3],
        "pixel_range": [0.0, 1.0],
        "clip": True,
        "scale": 255,
        "input_std": None,
        "normalization": {"mean": list(MEAN), "std": list(STD)},
        "forget": "class 3",
        "metrics": {"UA": 99.5, "RA": 98.0},
        "weights_sha256": weights_sha256(variables),
    }
    with np.load(path, allow_pickle=False) as plain:  # without this library
        np.testing.assert_array_equal(plain["delta"], delta_of(held))


def test_a_guard_for_normalised_inputs_and_one_in_bfloat16_come_back(case, tmp_path):
    _, variables, _, (delta, _) = case
    held = attach(variables, delta.astype(jnp.bfloat16))
    export_guard(tmp_path / "g.npz", held, input_std=STD)
    file = read_guard(tmp_path / "g.npz")
    assert guard(unchanged, **file.options) == guard(unchanged, input_std=STD)
    np.testing.assert_array_equal(file.delta, delta_of(held).astype(jnp.float32))
    assert file.bank is file.weights is None


def test_other_weights_are_refused_unless_forced(case, tmp_path):
    _, variables, _, (delta, _) = case
    path = tmp_path / "guard.npz"
    export_guard(path, attach(variables, delta))
    other = jax.tree.map(lambda leaf: leaf, variables)
    other["batch_stats"]["norm"]["mean"] += 1e-6
    theirs, ours = weights_sha256(other), weights_sha256(variables)
    with pytest.raises(ValueError, match=f"{ours}, but weights with sha256 {theirs}.*force=True"):
        load_guard(path, other)
    chex.assert_trees_all_equal(load_guard(path, other, force=True), attach(other, delta))


def test_the_hash_sees_every_bit_of_the_weights_and_not_the_guard():
    weights = {"params": {"a": np.zeros(2, np.float32), "b": jnp.ones(2, jnp.bfloat16)}}
    wanted = weights_sha256(weights)
    assert len(wanted) == 64
    assert weights_sha256(attach(weights, np.ones(2))) == weights_sha256(freeze(weights)) == wanted
    a, b = weights["params"].values()
    others = [
        {"a": -a, "b": b},  # a bit of sign
        {"a": a.astype(np.float16), "b": b},
        {"a": a[None], "b": b},
        {"b": b, "c": a},
        {"a": a},
    ]
    assert wanted not in {weights_sha256({"params": other}) for other in others}
    assert weights_sha256({"params": {"b": b, "a": a}}) == wanted


@pytest.fixture
def written(case, tmp_path):
    _, variables, _, (delta, _) = case
    path = tmp_path / "guard.npz"
    export_guard(path, attach(variables, delta))
    return path


@pytest.mark.parametrize("size", [0, 10, 400, -1])
def test_a_torn_guard_is_refused(written, size):
    content = written.read_bytes()
    written.write_bytes(content[:size])
    with pytest.raises(
        ValueError, match=r"guard.npz: a torn file, or one that export_guard did not"
    ):
        read_guard(written)


def test_a_flipped_bit_is_found(written, case):
    content, delta = bytearray(written.read_bytes()), np.asarray(case[3][0])
    content[content.index(delta.tobytes()) + 5] ^= 1
    written.write_bytes(content)
    with pytest.raises(ValueError, match=r"torn file.*CRC"):
        read_guard(written)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "foreign.npz"
    np.savez(path, delta=np.ones(3))
    with pytest.raises(ValueError, match=r"one that export_guard did not write.*KeyError"):
        read_guard(path)
    np.savez(path, header=np.array(["pickled", None], object))
    with pytest.raises(ValueError, match=r"did not write.*allow_pickle=False"):
        read_guard(path)
    np.save(tmp_path / "foreign.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"foreign.npy: a torn file, or one that"):
        read_guard(tmp_path / "foreign.npy")
    write_arrays(path, {"format": "jaxunlearn function 1"}, {})
    with pytest.raises(
        ValueError, match=r"holds 'jaxunlearn function 1'; wanted 'jaxunlearn guard 1'"
    ):
        read_guard(path)
    with pytest.raises(
        FileNotFoundError, match=r"none.npz: no such file; wanted one that export_guard"
    ):
        read_guard(tmp_path / "none.npz")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(written, case, monkeypatch):
    before = written.read_bytes()

    def fail(*_):
        raise OSError("disk gone")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk gone"):
            export_guard(written, attach(case[1], case[3][1]))
    assert written.read_bytes() == before
    assert [path.name for path in written.parent.iterdir()] == ["guard.npz"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1.0, 0.0]}, "one of bank and weights came; wanted both, or neither"),
        ({"bank": X}, "one of bank and weights came"),
        ({"bank": X, "weights": [1.0, 0.0]}, r"compose to another delta.*leave both out"),
        ({"bank": X[..., 0], "weights": [1.0, 0.0]}, r"compose to another delta"),
        ({"bank": X, "weights": [1.0]}, r"weights \[1\] came for deltas \[2, 4, 4, 3\]"),
        ({"clip": True, "input_std": STD}, r"normalised inputs have no scale"),
        ({"metrics": {"UA": float("nan")}}, r"more than JSON holds.*wanted finite numbers"),
        ({"metrics": {"UA": {1, 2}}}, r"more than JSON holds \(a set\)"),
    ],
)
def test_what_no_guard_file_holds_is_refused(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        export_guard(tmp_path / "g.npz", attach({}, jnp.ones(SHAPE)), **options)
    assert not list(tmp_path.iterdir())


def test_a_broken_guard_and_none_are_not_exported(tmp_path):
    with pytest.raises(ValueError, match="NaN or inf in delta; wanted finite numbers"):
        export_guard(tmp_path / "g.npz", attach({}, jnp.array([1.0, jnp.nan])))
    with pytest.raises(ValueError, match="wanted a collection 'guard'"):
        export_guard(tmp_path / "g.npz", {"params": {}})


# --- functions -----------------------------------------------------------------------------------


def test_an_exported_function_needs_no_model_and_takes_any_batch_and_delta(case, tmp_path):
    pytest.importorskip("flatbuffers")
    model, variables, x, deltas = case
    stored, path = np.asarray(np.round(255 * x), np.uint8), tmp_path / "f.npz"
    guarded = guard(with_preprocessing(model, normalizer(MEAN, STD, 255.0)), scale=255, clip=True)
    export_function(path, guarded, attach(variables, deltas[0]), stored[:1])
    loaded = load_function(path)
    for delta, n in zip(deltas, (6, 2), strict=True):
        held = attach(variables, delta)
        np.testing.assert_array_equal(loaded(held, stored[:n]), jax.jit(guarded)(held, stored[:n]))
    header, _ = read_arrays(path, "jaxunlearn function 1", by="export_function")
    assert header["inputs"] == ["b", "4", "4", "3"]
    assert header["platforms"] == [jax.default_backend()]
    with pytest.raises(ValueError, match="holds 'jaxunlearn function 1'; wanted 'jaxunlearn guard"):
        read_guard(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="a torn file, or one that export_function did not write"):
        load_function(path)


def test_a_model_that_needs_to_know_the_batch_size_is_not_exported(tmp_path):
    pytest.importorskip("flatbuffers")

    def counts(variables, x):
        return x.reshape(len(x), -1)

    with pytest.raises(ValueError, match=r"\[b, 4, 4, 3\].*write x.shape\[0\] for len\(x\)"):
        export_function(tmp_path / "f.npz", counts, {}, X)


def test_without_flatbuffers_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    said = r"pip install 'jaxunlearn\[export\]'"
    with pytest.raises(ImportError, match=said):
        export_function(tmp_path / "f.npz", unchanged, {}, X)
    with pytest.raises(ImportError, match=said):
        load_function(tmp_path / "f.npz")
