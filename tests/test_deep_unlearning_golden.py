"""Deep Unlearning of whole networks: Grams, projections, weights and outputs of the reference code.

The networks are plain linen modules, known to the library by nothing but their forward pass. Their
modules have the names that the stored arrays give to layers, where flax allows it.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.edits import suppress_subspace
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.methods import DeepUnlearningConfig, UnlearningProblem, deep_unlearning
from jaxunlearn.models import Rule, from_torch
from jaxunlearn.soft_projectors import importance_solve
from jaxunlearn.training import accuracy

# Absolute, for projections, weights and outputs; Grams relative to their largest entry.
TOLERANCE = {"float32": 1e-5, "float64": 1e-6}
GRAM_TOLERANCE = 1e-6


def conv3x3(channels, stride=1, *, use_bias, name):
    return nn.Conv(channels, (3, 3), stride, padding=1, use_bias=use_bias, name=name)


def batch_norm(name):
    return nn.BatchNorm(use_running_average=True, name=name)  # eps 1e-5, as torch


class VGG(nn.Module):
    """Four convolutions, maps pooled after the first, third and fourth; three dense layers."""

    @nn.compact
    def __call__(self, x):
        for i, (channels, pool) in enumerate([(6, True), (8, False), (10, True), (12, True)]):
            x = conv3x3(channels, use_bias=True, name=f"conv{i}")(x)
            x = nn.relu(batch_norm(f"norm{i}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2)) if pool else x
        x = x.reshape(x.shape[0], -1)  # one pixel: torch's order and ours are the same
        x = nn.relu(nn.Dense(14, name="fc4")(x))
        x = nn.relu(nn.Dense(9, name="fc5")(x))
        return nn.log_softmax(nn.Dense(4, name="fc6")(x))


class ResidualBlock(nn.Module):
    """Two convolutions, the first with stride 2, and a 1 x 1 convolution as shortcut."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(batch_norm("bn1")(conv3x3(9, 2, use_bias=False, name="conv1")(x)))
        y = batch_norm("bn2")(conv3x3(9, use_bias=False, name="conv2")(y))
        shortcut = nn.Conv(9, (1, 1), 2, use_bias=False, name="downsample")(x)
        return nn.relu(y + batch_norm("downsample_norm")(shortcut))


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(1e-6, name="ln_1")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(y)
        y = nn.LayerNorm(1e-6, name="ln_2")(x)
        y = nn.gelu(nn.Dense(24, name="mlp0")(y), approximate=False)
        return x + nn.Dense(16, name="mlp3")(y)


class Transformer(nn.Module):
    """Patches of 4 x 4 pixels, a class token, two blocks, a head on the class token."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (4, 4), 4, padding="VALID", name="conv_proj")(x)
        x = x.reshape(x.shape[0], -1, 16)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, 16))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("pos_embedding", nn.initializers.zeros, (1, *x.shape[1:]))
        for i in range(2):
            x = EncoderBlock(name=f"block{i}")(x)
        x = nn.LayerNorm(1e-6, name="ln")(x)
        return nn.log_softmax(nn.Dense(5, name="head")(x[:, 0]))


class Demo(nn.Module):
    """Five dense layers, the last one without norm."""

    @nn.compact
    def __call__(self, x):
        for i in range(1, 5):
            x = nn.relu(batch_norm(f"bn{i}")(nn.Dense(5, name=f"fc{i}")(x)))
        return nn.log_softmax(nn.Dense(4, name="fc5")(x))


class Case(NamedTuple):
    """A network; where torch's arrays go; by stored layer the flax paths that read its input."""

    model: nn.Module
    rules: list
    layers: dict[str, tuple[str, ...]]


def _encoder_layers(i, stored):
    return {
        f"{stored}self_attn.qkv": tuple(
            f"block{i}/attention/{part}" for part in ("query", "key", "value")
        ),
        f"{stored}self_attn.out_proj": (f"block{i}/attention/out",),
        f"{stored}mlp.linear0": (f"block{i}/mlp0",),
        f"{stored}mlp.linear1": (f"block{i}/mlp3",),
    }


ENCODER = r"encoder\.layers\.encoder_layer_(\d)\."
CASES = {
    "vgg": Case(
        VGG(),
        [
            *((rf"features\.{place}", f"conv{i}") for i, place in enumerate((0, 4, 7, 11))),
            *((rf"features\.{place}", f"norm{i}") for i, place in enumerate((1, 5, 8, 12))),
            *((rf"classifier\.{place}", f"fc{i}") for i, place in enumerate((0, 3, 6), start=4)),
        ],
        {name: (name,) for name in ("conv0", "conv1", "conv2", "conv3", "fc4", "fc5", "fc6")},
    ),
    "resblock": Case(
        ResidualBlock(),
        [
            (r"(conv|bn)(\d)", r"\1\2"),
            (r"downsample\.0", "downsample"),
            (r"downsample\.1", "downsample_norm"),
        ],
        {name: (name,) for name in ("conv1", "conv2", "downsample")},
    ),
    "vit": Case(
        Transformer(),
        [
            ("conv_proj|class_token", r"\g<0>"),
            (r"(encoder|heads)\.(pos_embedding|ln|head)", r"\2"),
            (rf"{ENCODER}(ln_\d)", r"block\1/\2"),
            (rf"{ENCODER}mlp\.(\d)", r"block\1/mlp\2"),
            (rf"{ENCODER}self_attention\.out_proj", r"block\1/attention/out"),
            Rule(
                rf"{ENCODER}self_attention\.in_proj",
                r"block\1/attention",
                split=("query", "key", "value"),
            ),
        ],
        {"conv_proj.conv0": ("conv_proj",), "heads.linear0": ("head",)}
        | _encoder_layers(0, "encoder")
        | _encoder_layers(1, "encoderblock1."),
    ),
}


# --- from torch's layouts to flax's --------------------------------------------------------------


def in_flax_order(matrix, spec):
    """Rows and columns from torch's patch order (c, kh, kw) to ours, (kh, kw, c)."""
    if spec.conv is None:
        return matrix
    kh, kw, c, _ = spec.kernel_shape
    order = np.arange(spec.d_in).reshape(c, kh, kw).transpose(1, 2, 0).ravel()
    return matrix[np.ix_(order, order)]


def selected(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def nhwc(maps):
    return maps.transpose(0, 2, 3, 1) if maps.ndim == 4 else maps


# --- one run of the library for each network and dtype -------------------------------------------


class Run(NamedTuple):
    """What the library gives, as NumPy arrays, beside what is stored."""

    stored: dict
    case: Case
    specs: dict
    leaves: dict  # before the edit, by path
    grams: dict  # {"r" or "f": {layer: G}}
    spaces: dict  # {("r" or "f", alpha): {layer: P}}
    edited: dict  # {"ar.__af.": leaves by path}
    outputs: dict  # {"before" or "after__ar.__af.": of the retained, then the forgotten examples}
    atol: float  # of projections, weights and outputs


@pytest.fixture(
    scope="module",
    params=[(name, dtype) for name in CASES for dtype in TOLERANCE],
    ids=lambda param: "-".join(param),
)
def run(request, golden):
    name, dtype = request.param
    with np.load(golden / f"deep_unlearning_{name}.npz") as file:
        stored = dict(file)
    with jax.enable_x64(dtype == "float64"):
        specs, results = edit_step_by_step(CASES[name], stored, dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {np.dtype(dtype)}
    return Run(stored, CASES[name], specs, *results, TOLERANCE[dtype])


def edit_step_by_step(case, stored, dtype):
    images = {side: nhwc(stored[f"x_{side}"]).astype(dtype) for side in ("retain", "forget")}
    both = np.concatenate(list(images.values()))
    variables = variables_of(case, selected(stored, "param__"), both)
    specs = describe_layers(case.model.apply, variables, both)
    grams = grams_of_sides(case, specs, variables, images)

    @jax.jit
    def edit(params, grams, alphas):
        spaces, params = suppressed(params, specs, grams, alphas)
        return {
            side: {path: P.dense() for path, P in spaces[side].items()} for side in "rf"
        }, params

    forward = jax.jit(case.model.apply)
    spaces, edited, outputs = {}, {}, {"before": forward(variables, both)}
    for pair in pairs_of(stored):
        alphas = dict(zip("rf", pair.removeprefix("ar").split("__af"), strict=True))
        values = {side: float(alpha) for side, alpha in alphas.items()}
        projections, params = edit(variables["params"], grams, values)
        spaces |= {(side, alphas[side]): layers for side, layers in projections.items()}
        edited[pair] = flatten_dict({"params": params})
        outputs[f"after__{pair}"] = forward(variables | {"params": params}, both)
    results = (flatten_dict(variables), grams, spaces, edited, outputs)
    return specs, jax.device_get(results)


def variables_of(case, arrays, inputs):
    """Torch's arrays as variables of the dtype of the inputs."""
    shapes = jax.eval_shape(case.model.init, jax.random.key(0), inputs)
    template = jax.tree.map(lambda leaf: leaf.update(dtype=inputs.dtype), shapes)
    return from_torch(arrays, template, case.rules)


def edited_leaves(case, stored, pair, leaves):
    """All leaves after the edit of a pair of alphas."""
    arrays = selected(stored, "param__") | selected(stored, f"new__{pair}__")
    return flatten_dict(from_torch(arrays, unflatten_dict(leaves), case.rules))


def pairs_of(stored):
    """``ar{alpha_r}__af{alpha_f}`` of all pairs whose weights are stored."""
    return sorted({"__".join(key.split("__")[1:3]) for key in selected(stored, "new")})


def suppressed(params, specs, grams, alphas):
    """Spaces of both sides, and the parameters without what only the forget side reads."""
    spaces = {
        side: {path: importance_solve(G, alpha=alphas[side]) for path, G in layers.items()}
        for side, layers in grams.items()
    }
    return spaces, suppress_subspace(params, specs, forget=spaces["f"], retain=spaces["r"])


def grams_of_sides(case, specs, variables, images):
    """Batches of one size for both sides, so that the last retain batch has masked rows."""
    inputs_fn = layer_inputs(case.model.apply, specs)
    grams = {}
    for side, x in images.items():
        batches = Batches(x, np.zeros(len(x), np.int32), batch_size=len(images["forget"]))
        states = accumulate_gram(inputs_fn, variables, batches)
        assert {int(state.count) for state in states.values()} == {len(x)}
        grams[side[0]] = {path: state.gram for path, state in states.items()}
    return grams


# --- what the reference code gives ---------------------------------------------------------------


def test_the_layers_are_those_that_the_reference_code_edits(run):
    paths = [path for readers in run.case.layers.values() for path in readers]
    assert sorted(run.specs) == sorted(paths)
    assert run.case.layers.keys() == selected(run.stored, "gram_r__").keys()


def test_layers_get_the_grams_of_the_reference_code(run):
    for side, layer, path in layers_of(run):
        expected = in_flax_order(run.stored[f"gram_{side}__{layer}"], run.specs[path])
        atol = GRAM_TOLERANCE * np.abs(expected).max()
        np.testing.assert_allclose(run.grams[side][path], expected, atol=atol, err_msg=path)


def test_layers_get_the_projections_of_the_reference_code(run):
    for side, layer, path in layers_of(run):
        projections = selected(run.stored, f"P_{side}__{layer}__a")
        assert projections.keys() == {alpha for s, alpha in run.spaces if s == side}
        for alpha, P in projections.items():
            space, expected = run.spaces[side, alpha][path], in_flax_order(P, run.specs[path])
            np.testing.assert_allclose(space, expected, atol=run.atol, err_msg=path)


def test_kernels_get_the_weights_of_the_reference_code_and_nothing_else_changes(run):
    assert len(run.edited) == 3
    kept = {path: leaf for path, leaf in run.leaves.items() if path[0] == "params"}
    kernels = {("params", *path.split("/"), "kernel") for path in run.specs}
    for pair, edited in run.edited.items():
        new = edited_leaves(run.case, run.stored, pair, run.leaves)
        assert edited.keys() == kept.keys() > kernels
        for path, leaf in edited.items():
            if path in kernels:
                np.testing.assert_allclose(leaf, new[path], atol=run.atol, err_msg="/".join(path))
            else:
                np.testing.assert_array_equal(leaf, kept[path], err_msg="/".join(path))


def test_the_edited_network_gives_the_outputs_of_the_reference_code(run):
    for state, out in run.outputs.items():
        sides = [nhwc(run.stored[f"out_{side}_{state}"]) for side in ("retain", "forget")]
        np.testing.assert_allclose(out, np.concatenate(sides), atol=run.atol, err_msg=state)


def layers_of(run):
    return [
        (side, layer, path)
        for side in "rf"
        for layer, readers in run.case.layers.items()
        for path in readers
    ]


# --- the demo: all pairs of a grid of alphas -----------------------------------------------------


@pytest.fixture(scope="module")
def demo(golden):
    """The demo's data and model as a problem; class 0 is forgotten."""
    with np.load(golden / "deep_unlearning_toy.npz") as file:
        stored = dict(file)
    case = Case(Demo(), [(r"\w+", r"\g<0>")], {})
    x, y = stored["x_train"], stored["y_train"]
    forget, retain = (Batches(x[rows], y[rows], 300) for rows in (y == 0, y != 0))
    variables = variables_of(case, selected(stored, "param__"), x)
    problem = UnlearningProblem(case.model.apply, variables, forget, retain, 4, (0,))
    return stored, case, problem


def by_method(problem, alpha_retain, alpha_forget):
    """All images, read and scored."""
    config = DeepUnlearningConfig(
        alpha_retain=alpha_retain, alpha_forget=alpha_forget, samples=None, select_images=10**6
    )
    return deep_unlearning(jax.random.key(0), problem, config)


def test_the_grid_of_the_demo_has_the_accuracies_and_choice_of_the_reference_code(demo):
    """A point on a boundary may fall on either side."""
    stored, _, problem = demo
    axes = (tuple(float(a) for a in stored[f"alpha_{side}"]) for side in "rf")
    result = by_method(problem, *axes)
    rows = result.info["grid"]
    assert len(rows) == 70
    for side, batches in (("retain", problem.retain), ("forget", problem.forget)):
        accuracies = [100 * row[f"{side}_accuracy"] for row in rows]
        one_point = 101 / batches.num_examples
        expected = stored[f"train_acc_{side}"].ravel()
        np.testing.assert_allclose(accuracies, expected, atol=one_point)
    chosen = [result.info["alpha_retain"], result.info["alpha_forget"]]
    np.testing.assert_allclose(chosen, stored["best_alphas"])
    best = max(rows, key=lambda row: row["score"])
    assert best["forget_accuracy"] == 0
    assert best["score"] == pytest.approx(float(stored["best_score"]), abs=1e-6)
    assert best["score"] >= 0.97
    x, y = stored["x_test"], stored["y_test"]
    sides = [
        100 * accuracy(problem.apply_fn, result.variables, Batches(x[rows], y[rows], 300))
        for rows in (y != 0, y == 0)
    ]
    np.testing.assert_allclose(sides, stored["test_acc_unlearned"], atol=101 / 300)
    assert sides[1] == 0


def test_edits_of_the_demo_have_the_weights_of_the_reference_code(demo):
    stored, case, problem = demo
    assert len(pairs_of(stored)) == 5
    for pair in pairs_of(stored):
        alphas = (float(alpha) for alpha in pair.removeprefix("ar").split("__af"))
        edited = flatten_dict(by_method(problem, *alphas).variables)
        for path, new in edited_leaves(case, stored, pair, flatten_dict(problem.variables)).items():
            name = "/".join((pair, *path))
            np.testing.assert_allclose(edited[path], new, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", ["vgg", pytest.param("vit", marks=pytest.mark.slow)])
def test_the_method_gives_whole_networks_the_weights_of_the_reference_code(name, golden):
    """Relative to a kernel's largest entry: 1e-5."""
    with np.load(golden / f"deep_unlearning_{name}.npz") as file:
        stored = dict(file)
    case = CASES[name]
    forget, retain = (
        Batches(nhwc(stored[f"x_{side}"]), stored[f"y_{side}"], 20) for side in ("forget", "retain")
    )
    variables = variables_of(case, selected(stored, "param__"), np.asarray(forget.inputs))
    k = stored["out_forget_before"].shape[1]
    problem = UnlearningProblem(case.model.apply, variables, forget, retain, k)
    for pair in pairs_of(stored):
        alphas = (float(alpha) for alpha in pair.removeprefix("ar").split("__af"))
        edited = flatten_dict(by_method(problem, *alphas).variables)
        for path, new in edited_leaves(case, stored, pair, flatten_dict(variables)).items():
            atol = 1e-5 * max(1, np.abs(new).max())
            np.testing.assert_allclose(edited[path], new, atol=atol, err_msg="/".join(path))
