"""Weights from elsewhere: the networks of others give their own logits in ours."""

import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxunlearn.models import (
    ALLCNN,
    MLP,
    MLP_TOY,
    RESNET_CIFAR,
    VGG,
    AllCNN,
    build,
    from_torch,
    read_arrays,
)
from jaxunlearn.models.blocks import conv
from jaxunlearn.models.resnet import BasicBlock

CIFAR_MEAN = np.array([[[[0.485, 0.456, 0.406]]]], np.float32)
CIFAR_STD = np.array([[[[0.229, 0.224, 0.225]]]], np.float32)

VGG_RULES = (
    *(
        (rf"features\.{place + part}", f"{block}/{layer}")
        for place, block in zip(
            (0, 4, 7, 11),
            ("stage1_block0", "stage2_block0", "stage2_block1", "stage3_block0"),
            strict=True,
        )
        for part, layer in enumerate(("conv", "norm"))
    ),
    (r"classifier\.0", "dense1"),
    (r"classifier\.3", "dense2"),
    (r"classifier\.6", "head"),
)


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
def cifar10_test(shared_data):
    """Test images as stored, not decoded, and labels, by the number in the original file."""
    source = tfds.data_source(
        "cifar10",
        split="test",
        data_dir=shared_data / "tfds",
        download=False,
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    return {int(row["id"].split(b"_")[1]): row for row in source.__getitems__(range(len(source)))}


def normalised(rows):
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]))) for row in rows])
    return jnp.asarray((pixels.astype(np.float32) / 255 - CIFAR_MEAN) / CIFAR_STD)


def cifar_resnet(folder, name):
    model = build(name.split("_")[1].split("-")[0], num_classes=10)
    template = shapes(model, jnp.zeros((1, 32, 32, 3)))
    return model, from_torch(
        read_arrays(folder / "weights" / f"{name}.npz"), template, RESNET_CIFAR
    )


@pytest.mark.parametrize("name", ["cifar10_resnet20-12fca82f", "cifar10_resnet32-d509ac18"])
def test_networks_trained_by_others_give_their_logits(name, shared_data, cifar10_test):
    model, variables = cifar_resnet(shared_data, name)
    logits = jax.jit(model.apply)(variables, normalised([cifar10_test[i] for i in range(256)]))
    expected = read_arrays(shared_data / "weights" / "expected_logits_first256_test.npz")[name]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.slow
def test_resnet20_trained_by_others_gets_9173_of_10000_right(shared_data, cifar10_test):
    model, variables = cifar_resnet(shared_data, "cifar10_resnet20-12fca82f")
    apply = jax.jit(model.apply)
    right = 0
    for start in range(0, 10_000, 500):
        rows = [cifar10_test[i] for i in range(start, start + 500)]
        predicted = np.asarray(apply(variables, normalised(rows))).argmax(-1)
        right += np.sum(predicted == [row["label"] for row in rows])
    assert right == 9173


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
    model = VGG(stages=((6,), (8, 10), (12,)), hidden=(14, 9), num_classes=4)
    images = nhwc(arrays["x_retain"])
    variables = from_torch(params, shapes(model, images), VGG_RULES)
    log_probs = nn.log_softmax(jax.jit(model.apply)(variables, images))
    np.testing.assert_allclose(log_probs, arrays["out_retain_before"], atol=1e-5)


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
        "  fc9.weight (2, 2): no rule fits this name",
        "  scale (1,): no rule fits this name",
        "  params/head/bias (3,): no array",
    ]


def test_two_arrays_for_one_leaf_are_refused():
    template = {"params": {"head": {"bias": jnp.zeros(2)}}}
    arrays = {"fc1.bias": np.zeros(2), "fc2.bias": np.zeros(2)}
    with pytest.raises(ValueError, match=r"fc2.bias \(2,\): .* and so does another array"):
        from_torch(arrays, template, ((r"fc\d", "head"),))


def test_arrays_come_back_as_stored(tmp_path):
    np.savez(tmp_path / "net.npz", weight=np.arange(6).reshape(2, 3))
    arrays = read_arrays(tmp_path / "net.npz")
    np.testing.assert_array_equal(arrays["weight"], [[0, 1, 2], [3, 4, 5]])


def test_other_formats_are_refused_with_the_known_one(tmp_path):
    with pytest.raises(ValueError, match=r"ends in '.pth'; weights are read from .npz"):
        read_arrays(tmp_path / "net.pth")


def test_torn_files_and_python_objects_are_refused(tmp_path):
    path = tmp_path / "net.npz"
    np.savez(path, weight=np.arange(1000))
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[:1000], whole[:500] + b"?" + whole[501:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"net.npz is torn or is no .npz of plain numbers"):
            read_arrays(path)
    np.savez(path, weight=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"plain numbers.*allow_pickle"):
        read_arrays(path)
