import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import describe_layers, fast_convolutions
from jaxunlearn.evaluation.saliency import grad_cam, last_convolution, perturbed

IMAGES = np.random.default_rng(0).normal(size=(4, 6, 5, 2)).astype(np.float32)
CLASSES = np.array([0, 2, 1, 2])


class Small(nn.Module):
    """Two convolutions, the second called twice."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Conv(4, (3, 3), name="shared")
        y = nn.relu(nn.Conv(4, (3, 3), strides=2, name="first")(x))
        y = nn.relu(shared(nn.relu(shared(y))))
        return nn.Dense(3, name="head")(jnp.square(y).mean((1, 2)))


@pytest.fixture(scope="module")
def small():
    model = Small()
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    return model, variables, describe_layers(model.apply, variables, IMAGES)


@pytest.fixture(scope="module")
def cam_fn(small):
    model, _, specs = small
    return jax.jit(lambda variables: grad_cam(model.apply, specs, variables, IMAGES, CLASSES))


def explicit(model, variables):
    """The formula written out for ``Small``, the slope of the squared mean by hand."""
    params = variables["params"]

    def conv(name, y, stride=1):
        y = jax.lax.conv_general_dilated(
            y,
            params[name]["kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + params[name]["bias"][None, None, None, :]

    y = nn.relu(conv("first", IMAGES, 2))
    A = np.asarray(conv("shared", nn.relu(conv("shared", y))))
    positions = A.shape[1] * A.shape[2]
    head = np.asarray(params["head"]["kernel"])
    cams = []
    for image, c in zip(A, CLASSES, strict=True):
        slope = 2 * np.maximum(image, 0) * head[:, c][None, None, :] / positions
        cam = np.maximum((image * slope.mean((0, 1))[None, None, :]).sum(-1), 0)
        cams.append(cam / cam.max() if cam.max() > 0 else cam)
    return np.stack(cams)


def test_maps_are_those_of_the_formula_at_the_last_call_of_the_last_convolution(small, cam_fn):
    model, variables, _ = small
    cam = np.asarray(cam_fn(variables))
    np.testing.assert_allclose(cam, explicit(model, variables), rtol=1e-4, atol=1e-5)
    assert cam.shape == (4, 3, 3)
    assert cam.max() == 1


def test_the_slope_is_the_finite_difference_of_the_logit(small):
    model, variables, _ = small
    forward = perturbed(model.apply, "first")
    _, (maps,) = forward(variables, IMAGES[:1], {})
    logit = jax.jit(lambda change: forward(variables, IMAGES[:1], {0: change})[0][0, 1])
    slope = jax.grad(logit)(0 * maps)
    at = (0, 1, 2, int(np.abs(slope[0, 1, 2]).argmax()))
    step = 1e-2 * jnp.zeros_like(maps).at[at].set(1)
    assert abs(slope[at]) > 1e-4
    np.testing.assert_allclose((logit(step) - logit(-step)) / 2e-2, slope[at], rtol=2e-2)


def test_fast_convolutions_give_the_same_maps(small, monkeypatch):
    model, variables, specs = small
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # with several they stay out of the way
    fast, plain = (
        jax.jit(lambda v, f=f: grad_cam(f, specs, v, IMAGES, CLASSES, "first"))(variables)
        for f in (fast_convolutions(model.apply), model.apply)
    )
    np.testing.assert_allclose(fast, plain, rtol=1e-4, atol=1e-5)


def test_a_map_without_evidence_is_zero_and_not_nan(small, cam_fn):
    _, variables, _ = small
    silent = jax.tree.map(jnp.zeros_like, variables["params"]["head"])
    cam = cam_fn({"params": variables["params"] | {"head": silent}})
    assert not np.asarray(cam).any()


def test_models_without_two_dimensional_convolutions_are_refused():
    model = nn.Sequential([nn.Conv(3, (2,)), lambda y: y.mean(1), nn.Dense(2)])
    x = jnp.ones((2, 5, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    specs = describe_layers(model.apply, variables, x)
    assert last_convolution(specs) is None
    with pytest.raises(ValueError, match=r"none of the layers \['layers_0', 'layers_2'\] is a two"):
        grad_cam(model.apply, specs, variables, x, np.array([0, 1]))


@pytest.mark.parametrize(
    ("layer", "message"),
    [("head", r"'head' returns an array of shape \(4, 3\)"), ("tail", "no linen module .* 'tail'")],
)
def test_layers_that_are_no_convolution_are_refused(small, layer, message):
    model, variables, specs = small
    with pytest.raises(ValueError, match=message):
        grad_cam(model.apply, specs, variables, IMAGES, CLASSES, layer)


def test_layers_inside_a_scan_are_refused():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, y, _):
            return nn.relu(nn.Conv(2, (3, 3), name="conv")(y)), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "intermediates": 0}
            steps = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=2)
            y, _ = steps(name="steps")(x, None)
            return nn.Dense(3)(y.mean((1, 2)))

    model = Scanned()
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    specs = describe_layers(model.apply, variables, IMAGES)
    assert last_convolution(specs) == "steps/conv"
    with pytest.raises(ValueError, match=r"'steps/conv' runs inside nn\.scan"):
        grad_cam(model.apply, specs, variables, IMAGES, CLASSES)
