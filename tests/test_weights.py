"""Weights from elsewhere: the networks of others give their own logits in ours."""

import io
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from jaxunlearn.models import (
    ALLCNN,
    MLP,
    MLP_TOY,
    RESNET_CIFAR,
    VGG,
    VIT,
    WEIGHT_RULES,
    AllCNN,
    Rule,
    ViT,
    build,
    check_logits,
    from_keras,
    from_torch,
    load_weights,
    read_arrays,
    vgg_rules,
)
from jaxunlearn.models.blocks import conv
from jaxunlearn.models.resnet import BasicBlock

# Network of each file, and the constants of its inputs: (x / scale - mean) / std.
CIFAR = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 255)
FILES = {
    "cifar10_resnet20-12fca82f.th": ("resnet20", CIFAR),
    "cifar10_resnet32-d509ac18.npz": ("resnet32", CIFAR),
    "cifar10_resnet8_mlperf_tiny.h5": ("resnet8", (0, 1, 1)),
    "fmnist_tinyvgg_elifebres.pth": ("tinyvgg", (0.5, 0.5, 255)),
    "fmnist_cnn39k_stanweer.npz": ("cnn39k", (0, 1, 255)),
}


def shapes(model, inputs):
    return jax.eval_shape(model.init, jax.random.key(0), inputs)


def stored(path):
    """A reference file: the torch parameters, and the rest."""
    arrays = read_arrays(path)
    params = {k.removeprefix("param__"): v for k, v in arrays.items() if k.startswith("param__")}
    return params, arrays


def nhwc(images):
    return jnp.asarray(images.transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def images(shared_data):
    """The first 256 test images as uint8, by the first word of the files' names."""
    source = tfds.data_source(
        "cifar10",
        split="test",
        data_dir=shared_data / "tfds",
        download=False,
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    rows = {int(row["id"].split(b"_")[1]): row for row in source.__getitems__(range(len(source)))}
    cifar = [np.asarray(Image.open(io.BytesIO(rows[i]["image"]))) for i in range(256)]
    fmnist = np.load(shared_data / "weights" / "fmnist_first256_test.npz")["images"]
    return {"cifar10": np.stack(cifar), "fmnist": fmnist[..., None]}


@pytest.mark.parametrize("name", FILES)
def test_networks_trained_by_others_give_their_logits(name, shared_data, images):
    network, (mean, std, scale) = FILES[name]
    pixels = images[name.split("_")[0]].astype(np.float32)
    inputs = jnp.asarray(((pixels / scale - np.float32(mean)) / np.float32(std)), jnp.float32)
    model, folder = build(network, num_classes=10), shared_data / "weights"
    template = shapes(model, inputs[:1])
    variables = load_weights(folder / name, template, WEIGHT_RULES[network])
    expected = np.load(folder / "expected_logits_first256_test.npz")[name.rpartition(".")[0]]
    assert check_logits(model.apply, variables, inputs, expected) <= 1e-4


def test_allcnn_agrees_with_the_reference_network(golden):
    params, arrays = stored(golden / "unsc_allcnn.npz")
    model = AllCNN(channels=(4, 4, 8, 8, 8, 8, 8, 8), num_classes=4)
    images = nhwc(arrays["x_unlearn"])
    variables = from_torch(params, shapes(model, images), ALLCNN)
    logits = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(logits, arrays["logits_unlearn_original"], atol=1e-4)


def test_mlp_agrees_with_the_reference_network(golden):
    params, arrays = stored(golden / "unsc_mlp.npz")
    model = MLP(features=(12,), num_classes=4)
    rows = jnp.asarray(arrays["x__c1"])
    variables = from_torch(params, shapes(model, rows), MLP_TOY)
    log_probs = np.asarray(nn.log_softmax(model.apply(variables, rows)))
    labels = np.delete(log_probs, 1, axis=-1).argmax(-1)
    labels += labels >= 1  # class 1 is the forgotten one
    np.testing.assert_array_equal(labels, arrays["pseudo_labels"])
    loss = -log_probs[np.arange(len(labels)), labels].mean()
    np.testing.assert_allclose(loss, arrays["losses"][0], rtol=1e-6)


def test_vgg_agrees_with_the_reference_network(golden):
    params, arrays = stored(golden / "deep_unlearning_vgg.npz")
    stages = ((6,), (8, 10), (12,))
    model = VGG(stages=stages, hidden=(14, 9), num_classes=4)
    images = nhwc(arrays["x_retain"])
    variables = from_torch(params, shapes(model, images), vgg_rules(stages))
    log_probs = nn.log_softmax(jax.jit(model.apply)(variables, images))
    np.testing.assert_allclose(log_probs, arrays["out_retain_before"], atol=1e-5)


def test_vit_agrees_with_the_reference_transformer(golden):
    params, arrays = stored(golden / "deep_unlearning_vit.npz")
    model = ViT(patch=4, dim=16, depth=2, heads=2, mlp_dim=24, num_classes=5)
    images = nhwc(arrays["x_retain"])
    variables = from_torch(params, shapes(model, images), VIT)
    log_probs = nn.log_softmax(jax.jit(model.apply)(variables, images))
    np.testing.assert_allclose(log_probs, arrays["out_retain_before"], atol=1e-5)


def test_older_names_of_the_transformer_are_known_too(golden):
    params, arrays = stored(golden / "deep_unlearning_vit.npz")
    model = ViT(patch=4, dim=16, depth=2, heads=2, mlp_dim=24, num_classes=5)
    template = shapes(model, nhwc(arrays["x_retain"]))
    old = {"mlp.0": "mlp.linear_1", "mlp.3": "mlp.linear_2"}
    renamed = {re.sub(r"mlp\.\d", lambda m: old[m[0]], k): v for k, v in params.items()}
    assert renamed.keys() != params.keys()
    a, b = (from_torch(named, template, VIT) for named in (params, renamed))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_shortcut_b_agrees_with_the_reference_block(golden):
    params, arrays = stored(golden / "deep_unlearning_resblock.npz")
    block = BasicBlock(channels=9, stride=2, shortcut="B")
    maps = nhwc(arrays["x_retain"])
    template = {k: {"stage2_block0": v} for k, v in shapes(block, maps).items()}
    nested = from_torch({f"layer2.0.{k}": v for k, v in params.items()}, template, RESNET_CIFAR)
    out = jax.jit(block.apply)({k: v["stage2_block0"] for k, v in nested.items()}, maps)
    np.testing.assert_allclose(out, nhwc(arrays["out_retain_before"]), atol=1e-5)


def test_a_torch_kernel_computes_the_convolution_of_the_loop():
    rng = np.random.default_rng(0)
    kernel, image = rng.normal(size=(2, 3, 3, 3)), rng.normal(size=(3, 5, 4))
    module = conv(2, 3, padding=1, name="net")
    inputs = jnp.asarray(image.transpose(1, 2, 0)[None], jnp.float32)
    nested = from_torch(
        {"net.weight": kernel},
        {"params": {"net": shapes(module, inputs)["params"]}},
        ((r"net", "net"),),
    )
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    expected = [
        [np.einsum("oihw,ihw->o", kernel, padded[:, i : i + 3, j : j + 3]) for j in range(4)]
        for i in range(5)
    ]
    out = module.apply({"params": nested["params"]["net"]}, inputs)
    np.testing.assert_allclose(out[0], expected, atol=1e-5)


def test_rows_behind_a_flattened_map_are_put_into_flax_order():
    rng = np.random.default_rng(0)
    weight, maps = rng.normal(size=(5, 24)), rng.normal(size=(7, 2, 3, 4))  # [n, h, w, c]
    template = {"params": {"head": {"kernel": jnp.zeros((24, 5))}}}
    rules = [Rule("fc", "head", flattened=(4, 2, 3))]
    kernel = from_torch({"fc.weight": weight}, template, rules)["params"]["head"]["kernel"]
    expected = maps.transpose(0, 3, 1, 2).reshape(7, 24) @ weight.T
    np.testing.assert_allclose(maps.reshape(7, 24) @ np.asarray(kernel), expected, atol=1e-5)


def test_a_map_of_another_size_than_the_rule_says_is_refused():
    template = {"params": {"head": {"kernel": jnp.zeros((24, 5))}}}
    message = r"has 24 inputs, but its rule says .* map of 4 x 7 x 7: give .* \(c, h, w\)"
    rules = [Rule("fc", "head", flattened=(4, 7, 7))]
    with pytest.raises(ValueError, match=message):
        from_torch({"fc.weight": np.ones((5, 24))}, template, rules)


def test_a_packed_matrix_is_divided_in_the_order_of_its_rule():
    # As timm names it; heads of two for one part, none for the other.
    packed = np.arange(24.0).reshape(8, 3)
    kernels = {"query": {"kernel": jnp.zeros((3, 2, 2))}, "key": {"kernel": jnp.zeros((3, 4))}}
    template = {"params": {"attn": kernels}}
    rules = [Rule(r"attn\.qkv", "attn", split=("key", "query"))]
    attention = from_torch({"attn.qkv.weight": packed}, template, rules)["params"]["attn"]
    np.testing.assert_array_equal(attention["key"]["kernel"], packed[:4].T)
    np.testing.assert_array_equal(attention["query"]["kernel"][:, 1, 0], packed[6])


def test_keras_arrays_keep_their_layout_and_change_their_names():
    rng = np.random.default_rng(0)
    names = {
        "conv2d/kernel": ("params", "conv", "kernel"),
        "conv2d/bias": ("params", "conv", "bias"),
        "norm/gamma": ("params", "norm", "scale"),
        "norm/beta": ("params", "norm", "bias"),
        "norm/moving_mean": ("batch_stats", "norm", "mean"),
        "norm/moving_variance": ("batch_stats", "norm", "var"),
        "att/query/kernel": ("params", "att", "query", "kernel"),
        "token": ("params", "token"),
    }
    arrays = {
        name: rng.normal(size=(3, 3, 2, 4) if "kernel" in name else 4).astype(np.float32)
        for name in names
    }
    template = unflatten_dict({path: jnp.zeros(arrays[n].shape) for n, path in names.items()})
    rules = [("conv2d", "conv"), ("norm", "norm"), (r"att/(\w+)", r"att/\1"), ("token", "token")]
    leaves = flatten_dict(from_keras(arrays, template, rules))
    assert leaves.keys() == set(names.values())
    for name, path in names.items():
        np.testing.assert_array_equal(leaves[path], arrays[name], err_msg=name)


def test_a_depthwise_kernel_of_keras_computes_the_convolution_of_the_loop():
    rng = np.random.default_rng(0)
    kernel, image = rng.normal(size=(2, 2, 3, 2)), rng.normal(size=(2, 2, 3))
    module = nn.Conv(6, (2, 2), feature_group_count=3, use_bias=False, padding="VALID", name="net")
    inputs = jnp.asarray(image[None], jnp.float32)
    template = {"params": {"net": shapes(module, inputs)["params"]}}
    nested = from_keras({"net/depthwise_kernel": kernel}, template, [("net", "net")])
    out = module.apply({"params": nested["params"]["net"]}, inputs)
    expected = [(image[:, :, c] * kernel[:, :, c, m]).sum() for c in range(3) for m in range(2)]
    np.testing.assert_allclose(out.ravel(), expected, atol=1e-5)


def test_template_decides_the_types_and_batch_counters_are_ignored():
    template = {"params": {"head": {"bias": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}}}
    arrays = {"fc.bias": np.ones(2), "bn.num_batches_tracked": np.array(7)}
    (leaf,) = jax.tree.leaves(from_torch(arrays, template, ((r"fc", "head"),)))
    assert leaf.dtype == jnp.bfloat16


def test_every_disagreement_is_listed_in_one_error():
    template = shapes(MLP(features=(5,), num_classes=3), jnp.zeros((1, 4)))
    arrays = {
        "fc1.weight": np.ones((5, 7)),
        "fc1.bias": np.full(5, np.nan),
        "fc2.weight": np.ones((3, 5)),
        "fc2.running_mean": np.ones(3),
        "fc9.weight": np.ones((2, 2)),
        "scale": np.ones(1),
    }
    with pytest.raises(ValueError, match="do not match") as refusal:
        from_torch(arrays, template, MLP_TOY)
    assert str(refusal.value).splitlines()[1:] == [
        "  fc1.weight (5, 7): becomes params/dense1/kernel (7, 5), the template has (4, 5)",
        "  fc1.bias (5,): holds NaN or inf",
        "  fc2.running_mean (3,): becomes batch_stats/head/mean, which the template lacks",
        "  fc9.weight (2, 2): no rule fits this name, nearest 'fc2'",
        "  scale (1,): no rule fits this name",
        "  params/head/bias (3,): no array; of this size: fc2.running_mean",
    ]


def test_two_arrays_for_one_leaf_are_refused():
    template = {"params": {"head": {"bias": jnp.zeros(2)}}}
    arrays = {"fc1.bias": np.zeros(2), "fc2.bias": np.zeros(2)}
    with pytest.raises(ValueError, match=r"fc2.bias \(2,\): becomes .*, as does fc1.bias"):
        from_torch(arrays, template, ((r"fc\d", "head"),))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(2, np.int8), "holds int8; scale quantised weights back"),
        (np.full(2, 1e300), "holds NaN or inf"),  # as float32
        (np.ones((2, 1)), "becomes params/head/kernel, which the template lacks"),
    ],
)
def test_arrays_that_no_leaf_can_hold_are_refused(array, message):
    template = {"params": {"head": {"bias": jnp.zeros(2)}}}
    name = "fc.weight" if array.ndim > 1 else "fc.bias"
    with pytest.raises(ValueError, match=message):
        from_torch({name: array}, template, [("fc", "head")])


@pytest.mark.parametrize("rule", [("fc(", "head"), ("fc", r"head\1")])
def test_a_rule_that_is_no_regular_expression_is_refused(rule):
    with pytest.raises(ValueError, match=r"fc.bias \(2,\): rule 'fc.* to 'head"):
        from_torch({"fc.bias": np.ones(2)}, {"params": {"head": jnp.zeros(2)}}, [rule])


def test_a_path_that_the_template_lacks_is_given_with_the_nearest():
    template = {"params": {"dense1": {"bias": jnp.zeros(2)}}}
    with pytest.raises(ValueError, match="lacks; nearest: params/dense1/bias"):
        from_torch({"fc.bias": np.ones(2)}, template, [("fc", "dense_1")])


def test_a_file_that_does_not_fit_is_named(tmp_path):
    np.savez(tmp_path / "net.npz", **{"fc/kernel": np.ones((3, 2))})
    with pytest.raises(ValueError, match=r"net.npz: arrays and template .*\n  fc/kernel"):
        load_weights(tmp_path / "net.npz", {"params": {"head": jnp.zeros(2)}}, [("dense", "head")])


# --- whether it computes the same ----------------------------------------------------------------


def scaled(variables, x):
    return x * variables


def test_the_largest_difference_of_logits_is_given():
    x = np.eye(3, dtype=np.float32)
    assert check_logits(scaled, 2.0, x, 2 * x) == 0
    np.testing.assert_allclose(check_logits(scaled, 2.0, x, 2 * x + 5e-5), 5e-5, rtol=0.01)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (3 * np.eye(3), r"differ by up to 1, wanted at most 0.0001 .* agree in 3 of 3 .*padding"),
        (2 * np.eye(3)[::-1], r"up to 2, .* \(logits reach 2\); .* classes agree in 1 of 3"),
        (np.full((3, 3), np.nan), "differ by up to nan"),
        (np.ones((3, 4)), r"gives logits \[3, 3\], expected are \[3, 4\]"),
    ],
)
def test_logits_that_differ_are_refused_with_the_usual_reasons(expected, message):
    with pytest.raises(ValueError, match=message):
        check_logits(scaled, 2.0, np.eye(3, dtype=np.float32), expected)
