"""Any linen module becomes one call on stored inputs; whatever does not fit is refused at once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.checkpoint import save_variables
from jaxunlearn.config import (
    DataConfig,
    ModelConfig,
    RetrainConfig,
    TrainConfig,
    config_from_mapping,
)
from jaxunlearn.models import MLP, Rule
from jaxunlearn.network import build_network, given_variables, with_preprocessing
from jaxunlearn.sources import from_arrays

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 2)).astype(np.uint8)
SOURCE = from_arrays(IMAGES, np.arange(6) % 3, IMAGES, np.arange(6) % 3, name="toy")
DATA = DataConfig(forget=0)
SMALL = ModelConfig("mlp", options={"features": [5]})


class Train(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1)))


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        return Train(name="inner")(x, training)


class IsTraining(nn.Module):
    @nn.compact
    def __call__(self, x, *, is_training):
        return Train(name="inner")(x, is_training)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return Train(name="inner")(x, not deterministic)


class NoMode(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.reshape(len(x), -1))


def the_module(module=NoMode, **options):
    """What the configs of these tests name as their factory."""
    return module(**options)


def one_convolution():
    return nn.Sequential([nn.Conv(2, (3, 3)), NoMode()])


def two_outputs():
    return nn.Sequential([NoMode(), lambda x: (x, x)])


def no_module():
    return 3


def broken():
    raise KeyError("depth")


def filled(network, seed=0):
    """Variables for a network; no compilation, unlike those of its own initialisation."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), network.template
    )


@pytest.mark.parametrize("module", [Train, Training, IsTraining, Deterministic])
def test_a_module_is_told_that_it_trains_in_its_own_words(module):
    apply_fn = with_preprocessing(module())
    x, key = jnp.ones((2, 7)), jax.random.key(0)
    variables = {"params": {"Dense_0": {"kernel": jnp.ones((7, 3)), "bias": jnp.zeros(3)}}}
    if module is not Train:
        variables = {"params": {"inner": variables["params"]}}
    still = [apply_fn(variables, x), apply_fn(variables, x, train=False)]
    np.testing.assert_array_equal(*still)
    dropped = apply_fn(variables, x, train=True, rngs={"dropout": key})
    assert np.abs(dropped - still[0]).max() > 1e-3


def test_a_module_without_modes_hears_nothing_of_them():
    x = jnp.ones((2, 7))
    variables = NoMode().init(jax.random.key(0), x)
    apply_fn = with_preprocessing(NoMode(), lambda x: x / 2)
    for train in (False, True):
        np.testing.assert_array_equal(
            apply_fn(variables, x, train=train), NoMode().apply(variables, x / 2)
        )


def test_flax_arguments_reach_the_module():
    apply_fn = with_preprocessing(NoMode())
    variables = NoMode().init(jax.random.key(0), jnp.ones((2, 7)))
    _, state = apply_fn(
        variables, jnp.ones((2, 7)), capture_intermediates=True, mutable=["intermediates"]
    )
    assert "Dense_0" in state["intermediates"]


def test_a_network_by_name_reads_images_as_they_are_stored():
    network = build_network(SMALL, DATA, SOURCE)
    variables = filled(network)
    x = (IMAGES / 255 - np.array(SOURCE.mean)) / np.array(SOURCE.std)
    wanted = MLP(features=(5,), num_classes=3).apply(variables, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(network.apply_fn(variables, IMAGES), wanted, rtol=1e-4, atol=1e-4)


def test_constants_of_the_config_go_before_those_of_the_source():
    data = DataConfig(forget=0, mean=(0.5,), std=(2.0,), scale=10.0)
    network = build_network(SMALL, data, SOURCE)
    variables = filled(network)
    wanted = MLP(features=(5,), num_classes=3).apply(variables, (IMAGES / 10 - 0.5) / 2.0)
    np.testing.assert_allclose(network.apply_fn(variables, IMAGES), wanted, rtol=1e-4, atol=1e-4)


def test_initialisation_follows_the_key_and_is_compiled_once():
    network = build_network(SMALL, DATA, SOURCE)
    trees = [network.init(jax.random.key(seed)) for seed in (0, 0, 1)]
    a, b, c = (tree["params"]["head"]["kernel"] for tree in trees)
    assert (a == b).all()
    assert (a != c).any()
    assert network.init._cache_size() == 1
    assert jax.eval_shape(lambda: trees[0]) == network.template


@pytest.mark.parametrize("module", [Train, IsTraining, NoMode])
def test_a_factory_gives_a_network_of_the_users_own(module, monkeypatch):
    monkeypatch.setitem(globals(), "made", lambda: module())
    network = build_network(ModelConfig(None, f"{__name__}:made"), DATA, SOURCE)
    assert network.apply_fn(filled(network), IMAGES).shape == (6, 3)


def test_a_factory_is_found_in_the_working_directory_and_gets_its_options(tmp_path, monkeypatch):
    (tmp_path / "nets_here.py").write_text(
        "import flax.linen as nn\n"
        "def net(width):\n"
        "    flat = lambda x: x.reshape(len(x), -1)\n"
        "    return nn.Sequential([flat, nn.Dense(width), nn.Dense(3)])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # restores sys.path afterwards
    model = ModelConfig(None, "nets_here:net", {"width": 7})
    assert build_network(model, DATA, SOURCE).template["params"]["layers_1"]["bias"].shape == (7,)


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("no_such_package.nets:net", {}, "No module named 'no_such_package'; install the package"),
        (f"{__name__}:the_modul", {}, "has no function 'the_modul'; did you mean 'the_module'"),
        (f"{__name__}:SOURCE", {}, "SOURCE' is a Source; wanted a function"),
        (f"{__name__}:broken", {}, r"with the options \{\}: KeyError: 'depth'"),
        (f"{__name__}:the_module", {"width": 3}, "TypeError: .*unexpected keyword .*'width'"),
        (f"{__name__}:no_module", {}, "returned 3; wanted a linen module"),
        (f"{__name__}:two_outputs", {}, r"returns \(\(1, 3\), \(1, 3\)\) for one example; wanted"),
    ],
)
def test_a_factory_that_does_not_work_is_refused(factory, options, message):
    with pytest.raises(ValueError, match=message):
        build_network(ModelConfig(None, factory, options), DATA, SOURCE)


def test_a_module_that_cannot_be_imported_is_refused(tmp_path, monkeypatch):
    (tmp_path / "torn_nets.py").write_text("def net(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="'torn_nets:net': SyntaxError"):
        build_network(ModelConfig(None, "torn_nets:net"), DATA, SOURCE)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (ModelConfig("mlpp"), DATA, "model 'mlpp' is unknown: did you mean 'mlp'"),
        (ModelConfig("mlp", options={"widths": [3]}), DATA, "has no option widths: .* features"),
        (SMALL, DataConfig(forget=0, mean=(0.5,) * 3, std=(1.0,) * 3), "3 means for inputs"),
        (SMALL, DataConfig(forget=0, std=(1.0,) * 3), "wanted as many std as means"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(model, data, message):
    with pytest.raises(ValueError, match=message):
        build_network(model, data, SOURCE)


def test_inputs_that_a_model_does_not_take_are_named_with_their_source():
    rows = from_arrays(np.ones((3, 5)), np.arange(3), np.ones((3, 5)), np.arange(3), name="rows")
    message = r"model allcnn does not accept inputs of shape \(5,\) from rows: "
    with pytest.raises(ValueError, match=message):
        build_network(ModelConfig("allcnn", options={"channels": [2] * 8}), DATA, rows)


def test_a_model_of_another_number_of_classes_is_refused(monkeypatch):
    monkeypatch.setitem(globals(), "four", lambda: nn.Sequential([NoMode(), nn.Dense(4)]))
    message = r"four returns \(1, 4\) for one example; wanted \(1, 3\), .* 3 classes of toy"
    with pytest.raises(ValueError, match=message):
        build_network(ModelConfig(None, f"{__name__}:four"), DATA, SOURCE)


ALLCNN = ModelConfig("allcnn", options={"channels": [2] * 8})
LARGE = from_arrays(
    np.ones((3, 32, 32, 3), np.uint8), np.arange(3), np.ones((3, 32, 32, 3), np.uint8), np.arange(3)
)


@pytest.fixture(scope="module")
def allcnn():
    return build_network(ALLCNN, DATA, LARGE)


def torch_arrays(network):
    """The network's weights as PyTorch would store them, named as the AllCNN of the UNSC code."""
    rng = np.random.default_rng(0)
    arrays = {}
    for number, place in enumerate((0, 1, 2, 4, 5, 6, 8, 9), start=1):
        block = network.template["params"][f"block{number}"]
        h, w, c_in, c_out = block["conv"]["kernel"].shape
        name = f"features.{place}"
        arrays[f"{name}.0.weight"] = rng.normal(size=(c_out, c_in, h, w))
        if "bias" in block["conv"]:
            arrays[f"{name}.0.bias"] = rng.normal(size=c_out)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            arrays[f"{name}.1.{leaf}"] = rng.uniform(1, 2, size=c_out)
    arrays["fc.0.weight"] = rng.normal(
        size=network.template["params"]["head"]["kernel"].shape[::-1]
    )
    arrays["fc.0.bias"] = rng.normal(size=3)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def given(network, model=ALLCNN, section="train", **named):
    config = {"train": TrainConfig, "retrain": RetrainConfig}[section](**named)
    return given_variables(network, model, config, section=section)


@pytest.mark.parametrize("fast", [True, False])
def test_a_network_takes_the_fast_convolutions_unless_told_otherwise(fast, monkeypatch):
    taken = []

    def convolve(geometry, x, k):
        taken.append(k.shape)
        return jnp.zeros((*x.shape[:-1], k.shape[-1]))

    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr("jaxunlearn.convolution.convolve", convolve)
    model = {"factory": f"{__name__}:one_convolution", "fast_convolutions": fast}
    config = config_from_mapping({"data": {"forget": 0}, "model": model})
    build_network(config.model, DATA, SOURCE)
    assert bool(taken) is fast


def test_nothing_named_is_nothing_given(allcnn):
    assert given(allcnn) is None
    assert given(allcnn, section="retrain") is None


def test_third_party_weights_are_read_into_the_model(allcnn, tmp_path):
    arrays = torch_arrays(allcnn)
    np.savez(tmp_path / "net.npz", **arrays)
    variables = given(allcnn, weights=str(tmp_path / "net.npz"))
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"], arrays["fc.0.weight"].T)
    shapes = jax.tree.map(jnp.shape, variables)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, allcnn.template)


@pytest.mark.parametrize("section", ["train", "retrain"])
def test_a_checkpoint_is_read_into_the_model(section, tmp_path):
    network = build_network(SMALL, DATA, SOURCE)
    variables = filled(network)
    save_variables(tmp_path / "net", variables)
    read = given(network, SMALL, section, checkpoint=str(tmp_path / "net"))
    jax.tree.map(np.testing.assert_array_equal, read, variables)


@pytest.mark.parametrize("section", ["train", "retrain"])
def test_a_checkpoint_of_another_model_is_refused_under_its_key(section, tmp_path):
    network = build_network(SMALL, DATA, SOURCE)
    save_variables(tmp_path / "net", filled(build_network(ModelConfig(), DATA, SOURCE)))
    with pytest.raises(ValueError, match=rf"^{section}\.checkpoint: .*net: checkpoint of another"):
        given(network, SMALL, section, checkpoint=str(tmp_path / "net"))


def test_files_that_are_not_there_are_named_under_their_key(allcnn):
    for section, named in (
        ("train", {"weights": "no.npz"}),
        ("train", {"checkpoint": "no"}),
        ("retrain", {"checkpoint": "no"}),
    ):
        with pytest.raises(
            FileNotFoundError, match=rf"^{section}.{next(iter(named))}: no.*: not f"
        ):
            given(allcnn, section=section, **named)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.0.bias": np.full(3, np.nan)}, r"net.npz: .*\n.*fc.0.bias \(3,\): holds NaN or inf"),
        ({"fc.0.bias": np.ones(4)}, r"net.npz: .*\n.*fc.0.bias \(4,\): becomes params/head/bias"),
        ({"fc.1.bias": np.ones(3)}, r"net.npz: .*\n.*fc.1.bias \(3,\): no rule fits this name"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_file_and_array(allcnn, tmp_path, change, message):
    np.savez(tmp_path / "net.npz", **torch_arrays(allcnn) | change)
    with pytest.raises(ValueError, match=rf"^train\.weights: .*{message}"):
        given(allcnn, weights=str(tmp_path / "net.npz"))


# What the configs of these tests name as their rules.
OWN_RULES = [("hidden", "dense1"), Rule("out", "head")]
NO_RULES = ["hidden", "out"]


def test_rules_of_the_users_own_say_where_arrays_go(tmp_path):
    network = build_network(SMALL, DATA, SOURCE)
    rng = np.random.default_rng(0)
    arrays = {"hidden.weight": (5, 32), "hidden.bias": (5,), "out.weight": (3, 5), "out.bias": (3,)}
    arrays = {name: rng.normal(size=shape) for name, shape in arrays.items()}
    np.savez(tmp_path / "torch.npz", **arrays)
    keras = {"hidden/kernel": arrays["hidden.weight"].T, "hidden/bias": arrays["hidden.bias"]}
    keras |= {"out/kernel": arrays["out.weight"].T, "out/bias": arrays["out.bias"]}
    np.savez(tmp_path / "keras.npz", **keras)
    named = {"rules": f"{__name__}:OWN_RULES"}
    a, b = (
        given(network, SMALL, weights=str(tmp_path / name), **named)
        for name in ("torch.npz", "keras.npz")
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)
    np.testing.assert_allclose(a["params"]["head"]["kernel"], arrays["out.weight"].T, rtol=1e-6)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (f"{__name__}:OWN_RULE", "has no list 'OWN_RULE'; did you mean 'OWN_RULES'"),
        (f"{__name__}:NO_RULES", "NO_RULES' is a list; wanted a list of jaxunlearn.models.Rule"),
        (f"{__name__}:SMALL", "SMALL' is a ModelConfig; wanted a list of"),
        ("no_such_package:RULES", "install the package"),
    ],
)
def test_rules_that_are_none_are_refused(rules, message):
    with pytest.raises(ValueError, match=rf"^train\.weights: rules = .*{message}"):
        given(build_network(SMALL, DATA, SOURCE), SMALL, weights="any.npz", rules=rules)


def test_weights_for_a_model_without_rules_are_refused_with_the_way_round(tmp_path):
    network = build_network(SMALL, DATA, SOURCE)
    message = "no rules .* into model mlp, only into allcnn, .* name it: train.rules ="
    with pytest.raises(ValueError, match=message):
        given(network, SMALL, weights=str(tmp_path / "net.npz"))
