"""Architectures: the parameter counts of the sources, PyTorch's conventions, reachable features."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.models import MLP, MODELS, AllCNN, ViT, build
from jaxunlearn.models.blocks import ConvBlock, batch_norm
from jaxunlearn.models.resnet import BasicBlock

VIT_B16 = {"patch": 16, "dim": 768, "heads": 12, "mlp_dim": 3072}

COUNTS = [
    ("mlp", 10, {}, (64,), 33_738),
    ("allcnn", 10, {"width": 0.5}, (32, 32, 3), 406_810),
    ("alexnet_small", 10, {}, (32, 32, 1), 6_526_848),
    ("alexnet_small", 10, {}, (28, 28, 1), 6_526_848),
    ("vgg11", 10, {}, (32, 32, 3), 28_149_514),
    ("vgg16", 10, {}, (32, 32, 3), 33_646_666),
    ("resnet20", 10, {}, (32, 32, 3), 269_722),
    ("resnet32", 10, {}, (32, 32, 3), 464_154),
    ("resnet44", 10, {}, (32, 32, 3), 658_586),
    ("resnet56", 10, {}, (32, 32, 3), 853_018),
    ("resnet18", 100, {}, (32, 32, 3), 11_220_132),
    ("vit", 10, {}, (32, 32, 3), 5_362_762),
    ("vit", 1000, VIT_B16, (224, 224, 3), 86_567_656),
    ("resnet8", 10, {}, (32, 32, 3), 78_186),
    ("tinyvgg", 10, {}, (28, 28, 1), 7_740),
    ("cnn39k", 10, {}, (28, 28, 1), 39_410),
]

IMAGES = (2, 32, 32, 1)
NARROW = {"channels": (2, 2, 4)}
VGG_NARROW = {"stages": ((2,), (2, 2), (2,), (2,), (2,)), "hidden": (5, 4)}
TINY = {
    "mlp": {"features": (5, 4)},
    "allcnn": {"channels": (2, 2, 3, 3, 3, 3, 3, 3)},
    "alexnet_small": {"channels": (2, 2, 3), "hidden": (5, 4)},
    "vgg11": VGG_NARROW,
    "vgg16": VGG_NARROW,
    "resnet20": NARROW,
    "resnet32": NARROW,
    "resnet44": NARROW,
    "resnet56": NARROW,
    "resnet18": {"channels": (2, 2, 4, 4)},
    "vit": {"patch": 16, "dim": 4, "depth": 2, "heads": 2, "mlp_dim": 6},
    "resnet8": NARROW,
    "tinyvgg": {"channels": 2},
    "cnn39k": {"channels": 2},
}


def shapes(model, input_shape):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(input_shape))


def filled(template, seed=0):
    """Variables without the cost of compiling ``init``; positive, so that variances are valid."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.1, 0.5, leaf.shape), leaf.dtype), template
    )


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), IMAGES)


def tiny(name):
    model = build(name, num_classes=3, **TINY[name])
    return model, filled(shapes(model, IMAGES))


@pytest.mark.parametrize(("name", "num_classes", "options", "image", "count"), COUNTS)
def test_parameter_counts_are_those_of_the_sources(name, num_classes, options, image, count):
    params = shapes(build(name, num_classes=num_classes, **options), (1, *image))["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize("name", MODELS)
def test_captured_penultimate_output_is_what_the_head_consumes(name, images):
    model, variables = tiny(name)

    @jax.jit
    def run(variables, images):
        consumed = []

        def record(call, args, kwargs, context):
            if context.module.name == "head":
                consumed.append(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(record):
            logits, state = model.apply(variables, images, capture_intermediates=True)
        return logits, state["intermediates"]["penultimate"]["__call__"], tuple(consumed)

    logits, (features,), (consumed,) = jax.device_get(run(variables, images))
    head = jax.device_get(variables["params"]["head"])
    np.testing.assert_array_equal(features, consumed)
    expected = features @ head["kernel"] + head.get("bias", 0)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["alexnet_small", "vgg11"])
def test_dropout_acts_in_training_only(name, images):
    model, variables = tiny(name)

    @jax.jit
    def training_logits(key):
        return model.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )[0]

    assert jax.eval_shape(model.apply, variables, images).shape == (2, 3)  # needs no rng
    one, same, other = (training_logits(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_running_statistics_keep_nine_tenths_and_change_in_training_only(images):
    block = ConvBlock(3)
    variables = filled(shapes(block, IMAGES))
    train, state = block.apply(
        variables, images, train=True, mutable=["batch_stats"], capture_intermediates=True
    )
    maps = state["intermediates"]["conv"]["__call__"][0]
    old, new = variables["batch_stats"]["norm"], state["batch_stats"]["norm"]
    axes = (0, 1, 2)
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * maps.mean(axes), rtol=1e-4)
    np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * maps.var(axes), rtol=1e-4)
    inference, state = block.apply(variables, images, mutable=["batch_stats"])
    np.testing.assert_array_equal(state["batch_stats"]["norm"]["mean"], old["mean"])
    assert not np.allclose(train, inference)


def test_batch_norm_divides_by_the_root_of_variance_plus_1e_minus_5():
    norm = batch_norm(False, name="norm")
    variables = {"params": {"scale": jnp.ones(1), "bias": jnp.zeros(1)}}
    variables["batch_stats"] = {"mean": jnp.zeros(1), "var": jnp.zeros(1)}
    np.testing.assert_allclose(norm.apply(variables, jnp.ones((1, 1))), 1e5**0.5, rtol=1e-5)


def test_strided_convolution_takes_every_second_position_as_pytorch_does(images):
    variables = filled(shapes(ConvBlock(3), IMAGES))
    dense = ConvBlock(3).apply(variables, images)
    strided = ConvBlock(3, stride=2).apply(variables, images)
    np.testing.assert_allclose(strided, dense[:, ::2, ::2], rtol=1e-5, atol=1e-6)


def test_shortcut_a_takes_every_second_pixel_between_zero_channels():
    block = BasicBlock(channels=5, stride=2, shortcut="A")
    maps = jax.random.uniform(jax.random.key(0), (2, 7, 7, 2))
    silent = jax.tree.map(jnp.zeros_like, filled(shapes(block, maps.shape)))
    out = jax.jit(block.apply)(silent, maps)
    np.testing.assert_array_equal(out[..., 1:3], maps[:, ::2, ::2])
    np.testing.assert_array_equal(out[..., [0, 3, 4]], jnp.zeros((2, 4, 4, 3)))


def test_mlp_starts_normal_with_two_over_fan_in_and_the_head_with_one():
    rows = jnp.zeros((1, 300))
    params = MLP(features=(400,), num_classes=300).init(jax.random.key(0), rows)["params"]
    hidden, head = params["dense1"]["kernel"], params["head"]["kernel"]
    np.testing.assert_allclose(np.var(hidden), 2 / 300, rtol=0.03)
    np.testing.assert_allclose(np.var(head), 1 / 400, rtol=0.03)
    # Four deviations: flax's he_normal is cut at about 2.3.
    assert np.abs(hidden).max() > 4 * math.sqrt(2 / 300)
    assert not params["dense1"]["bias"].any()
    assert not params["head"]["bias"].any()


def test_mlp_reads_images_as_rows():
    model = MLP(features=(5,), num_classes=3)
    images = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    variables = filled(shapes(model, images.shape))
    np.testing.assert_array_equal(
        model.apply(variables, images), model.apply(variables, images.reshape(2, 16))
    )


def test_host_arrays_are_inputs_too(images):
    model, variables = tiny("allcnn")
    np.testing.assert_array_equal(
        model.apply(variables, np.asarray(images)), model.apply(variables, images)
    )


def test_lists_of_configuration_files_become_tuples():
    model = build("vgg11", num_classes=3, stages=[[2], [3, 4]], hidden=[])
    assert (model.stages, model.hidden) == (((2,), (3, 4)), ())
    assert hash(model) is not None


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'resnet_20' is unknown: did you mean 'resnet20'.*vit"):
        build("resnet_20", num_classes=10)
    with pytest.raises(ValueError, match=r"'transformer' is unknown: choose one of mlp, allcnn"):
        build("transformer", num_classes=10)


def test_unknown_options_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no option depth: its options are width, channels$"):
        build("allcnn", num_classes=10, depth=3)
    with pytest.raises(ValueError, match="num_classes=1: a classifier has at least 2"):
        build("mlp", num_classes=1)


@pytest.mark.parametrize(
    ("model", "input_shape", "dtype", "message"),
    [
        (MLP(), (64,), "float32", r"float32 \[64\], wanted floating-point rows"),
        (MLP(), (2, 64), "uint8", r"uint8 \[2, 64\].*normalise"),
        (AllCNN(), (32, 32, 3), "float32", r"float32 \[32, 32, 3\], wanted .*x\[None\]"),
        (AllCNN(), (1, 32, 32, 3), "uint8", r"uint8 \[1, 32, 32, 3\].*normalise"),
        (AllCNN(channels=(2, 2)), (1, 8, 8, 3), "float32", "wanted eight positive numbers"),
        (AllCNN(width=0.001), (1, 8, 8, 3), "float32", "larger width"),
        (build("vgg11", num_classes=2), (1, 28, 28, 1), "float32", "a map of 1 x 1 is left"),
        (build("alexnet_small", num_classes=2), (1, 8, 8, 1), "float32", "give larger images"),
        (build("resnet20", num_classes=2, shortcut="C"), (1, 8, 8, 3), "float32", "'C' is unknown"),
        (build("resnet20", num_classes=2, channels=(4,)), (1, 8, 8, 3), "float32", "in length"),
        (ViT(patch=5), (1, 32, 32, 3), "float32", "32 x 32 do not divide"),
        (ViT(heads=5), (1, 32, 32, 3), "float32", "dim=192 does not divide among heads=5"),
    ],
)
def test_unusable_inputs_and_options_are_refused(model, input_shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(input_shape, dtype))
