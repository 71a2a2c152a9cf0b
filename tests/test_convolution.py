"""Convolutions that are fast on CPUs equal XLA's both ways, and step aside everywhere else."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import convolution
from jaxunlearn.capture import capture_inputs, describe_layers
from jaxunlearn.convolution import (
    conv_general_dilated,
    convolve,
    fast_convolutions,
    winograd,
    winograd_kernel_gradient,
)

IMAGES, C_IN, C_OUT = 6, 3, 4
PADS = {
    "SAME": ((1, 1), (1, 1)),
    "VALID": ((0, 0), (0, 0)),
    "uneven": ((0, 2), (2, 1)),
}
SIZES = [(8, 4), (7, 9), (3, 5)]  # whole tiles, cut tiles, less than a tile
LAST = ("NHWC", "HWIO", "NHWC")


def _geometry(*, strides=(1, 1), pads=PADS["SAME"], dilation=(1, 1)):
    return convolution._Geometry(strides, pads, dilation)


def _slow(geometry, x, k):
    return jax.lax.conv_general_dilated(
        x,
        k,
        geometry.strides,
        geometry.pads,
        rhs_dilation=geometry.dilation,
        dimension_numbers=LAST,
    )


def _draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _assert_close(got, expected, share=1e-5):
    """To a share of the largest entry, leaf by leaf."""

    def check(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=share * float(jnp.abs(b).max()))

    jax.tree.map(check, got, expected)


@partial(jax.jit, static_argnums=(0, 1))
def _with_gradients(convolution_of, geometry, x, k, weight):
    """Output and gradients for a gradient ``weight`` of the output, cut to the output's shape."""
    y, pull = jax.vjp(partial(convolution_of, geometry), x, k)
    return y, *pull(weight[:, : y.shape[1], : y.shape[2]])


@pytest.fixture
def calls(monkeypatch):
    """Names of the parts of the module that ran, in their order."""
    names = []

    def counted(name, part):
        return lambda *args, **kwargs: names.append(name) or part(*args, **kwargs)

    for name in ("convolve", "winograd", "winograd_kernel_gradient"):
        monkeypatch.setattr(convolution, name, counted(name, getattr(convolution, name)))
    return names


@pytest.fixture
def narrow(monkeypatch):
    """Winograd pays for any number of channels, so that shapes may be small."""
    monkeypatch.setattr(convolution, "_WINOGRAD_CHANNELS", 1)
    jax.clear_caches()  # what was traced with another limit


@pytest.fixture
def one_device(monkeypatch):
    """The suite has eight devices, on which this module stays out of the way."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pads", PADS.values(), ids=PADS)
def test_winograd_gives_the_convolution_and_the_kernels_gradient(pads, size):
    x, k, weight = _draw(IMAGES, *size, C_IN), _draw(3, 3, C_IN, C_OUT), _draw(6, 12, 12, C_OUT)
    y, _, dk = _with_gradients(_slow, _geometry(pads=pads), x, k, weight)
    g = weight[:, : y.shape[1], : y.shape[2]]
    got = jax.jit(lambda x, k, g: (winograd(x, k, pads), winograd_kernel_gradient(x, g, pads)))
    _assert_close(got(x, k, g), (y, dk))


@pytest.mark.parametrize("pads", PADS.values(), ids=PADS)
def test_winograd_convolutions_have_both_gradients(narrow, calls, pads):
    x, k, weight = _draw(IMAGES, 7, 9, C_IN), _draw(3, 3, C_IN, C_OUT), _draw(6, 12, 12, C_OUT)
    got = _with_gradients(convolve, _geometry(pads=pads), x, k, weight)
    assert (calls.count("winograd"), calls.count("winograd_kernel_gradient")) == (2, 1)
    _assert_close(got, _with_gradients(_slow, _geometry(pads=pads), x, k, weight))


@pytest.mark.parametrize(("images", "limit", "at_once"), [(6, 4, 3), (5, 3, 1), (6, 6, 6)])
def test_the_pieces_that_a_batch_is_cut_into_do_not_show(monkeypatch, images, limit, at_once):
    tiles = 2 * 3
    monkeypatch.setattr(convolution, "_TILE_BYTES", limit * 4 * 36 * tiles * C_OUT)
    assert convolution._images_at_once(images, tiles * C_OUT) == at_once
    pads = PADS["SAME"]
    x, k, g = _draw(images, 7, 9, C_IN), _draw(3, 3, C_IN, C_OUT), _draw(images, 7, 9, C_OUT)
    y, _, dk = _with_gradients(_slow, _geometry(), x, k, g)
    got = jax.jit(lambda x, k, g: (winograd(x, k, pads), winograd_kernel_gradient(x, g, pads)))
    _assert_close(got(x, k, g), (y, dk))


@pytest.mark.parametrize(
    "geometry",
    [
        _geometry(strides=(2, 2), pads=((0, 1), (0, 1))),
        _geometry(dilation=(2, 1), pads=((2, 2), (1, 1))),
        _geometry(strides=(1, 2), pads=((-1, 3), (0, 0))),
    ],
    ids=["stride 2", "dilated", "negative padding"],
)
@pytest.mark.parametrize("images", [3, 70])
def test_a_kernel_gradient_summed_over_images_is_that_of_the_batch(calls, geometry, images):
    x, k, weight = _draw(images, 6, 6, 2), _draw(3, 3, 2, 3), _draw(images, 12, 12, 3)
    got = _with_gradients(convolve, geometry, x, k, weight)
    assert {*calls} <= {"convolve"}  # not Winograd's
    _assert_close(got, _with_gradients(_slow, geometry, x, k, weight), share=1e-6)


def test_no_images_have_a_gradient_of_zero():
    x, k = jnp.zeros((0, 6, 6, 2)), _draw(3, 3, 2, 3)
    y, dx, dk = _with_gradients(convolve, _geometry(), x, k, jnp.zeros((0, 6, 6, 3)))
    assert (y.shape, dx.shape) == ((0, 6, 6, 3), x.shape)
    np.testing.assert_array_equal(dk, jnp.zeros_like(k))


def _loss(convolution_of, geometry, k, x):
    return jnp.sum(jnp.tanh(convolution_of(geometry, x, k)))


# the narrow one takes Winograd's way for the kernels of 3 x 3 with stride 1
BOTH_WAYS = pytest.mark.parametrize(
    "geometry",
    [_geometry(), _geometry(strides=(2, 2), pads=((0, 1), (0, 1)))],
    ids=["winograd", "sums"],
)


@BOTH_WAYS
def test_gradients_of_each_example_and_each_kernel_can_be_mapped(narrow, geometry):
    x, k = _draw(3, 1, 8, 8, C_IN), _draw(2, 3, 3, C_IN, C_OUT)

    @partial(jax.jit, static_argnums=0)
    def gradients(convolution_of, k, x):
        gradient = jax.grad(partial(_loss, convolution_of, geometry))
        return jax.vmap(jax.vmap(gradient, (None, 0)), (0, None))(k, x)

    got = gradients(convolve, k, x)
    assert got.shape == (2, 3, 3, 3, C_IN, C_OUT)
    _assert_close(got, gradients(_slow, k, x))


@BOTH_WAYS
def test_reverse_derivatives_of_second_order_are_those_of_xla(narrow, geometry):
    x, k = _draw(2, 8, 8, C_IN), 0.3 * _draw(3, 3, C_IN, C_OUT)

    @partial(jax.jit, static_argnums=0)
    def second(convolution_of, k, x):
        def steepness(k, x):
            dk, dx = jax.grad(partial(_loss, convolution_of, geometry), (0, 1))(k, x)
            return jnp.sum(dk**2) + jnp.sum(dx**2)

        return jax.grad(steepness, (0, 1))(k, x)

    _assert_close(second(convolve, k, x), second(_slow, k, x), share=3e-5)


def test_forward_derivatives_are_refused_by_name():
    x, k = _draw(1, 4, 4, 1), _draw(3, 3, 1, 1)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(partial(convolve, _geometry()), (x, k), (x, k))


@pytest.mark.parametrize(
    ("x", "k", "geometry", "pays"),
    [
        ((16, 8, 8, 64), (3, 3, 64, 64), _geometry(), True),
        ((16, 8, 8, 64), (3, 3, 64, 128), _geometry(), False),  # 64 tiles, a kernel for 128
        ((15, 8, 8, 64), (3, 3, 64, 64), _geometry(), False),
        ((32, 5, 8, 64), (3, 3, 64, 128), _geometry(), True),  # cut tiles count too
        ((16, 8, 8, 32), (3, 3, 32, 64), _geometry(), False),
        ((16, 8, 8, 64), (3, 3, 64, 32), _geometry(), False),
        ((16, 8, 8, 64), (5, 5, 64, 64), _geometry(pads=((2, 2), (2, 2))), False),
        ((16, 8, 8, 64), (3, 3, 64, 64), _geometry(pads=((2, 2), (0, 2))), True),
        ((16, 8, 8, 64), (3, 3, 64, 64), _geometry(pads=((3, 1), (1, 1))), False),
        ((16, 8, 8, 64), (3, 3, 64, 64), _geometry(pads=((-1, 2), (1, 1))), False),
        ((64, 8, 8, 64), (3, 3, 64, 64), _geometry(strides=(2, 2)), False),
        ((64, 8, 8, 64), (3, 3, 64, 64), _geometry(dilation=(2, 2)), False),
        ((64, 2, 2, 64), (3, 3, 64, 64), _geometry(pads=PADS["VALID"]), False),  # no output
    ],
)
def test_winograd_is_taken_where_it_is_exact_and_pays(calls, x, k, geometry, pays):
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x, k))
    y = jax.eval_shape(lambda x, k: convolve(geometry, x, k), *shapes)
    assert y.shape == jax.eval_shape(partial(_slow, geometry), *_shapes(x, k)).shape
    assert calls == ["winograd"] * pays


def _shapes(*shapes, dtype=jnp.float32):
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


def _numbers(x, k):
    """Dimension numbers as flax's layers pass them."""
    n = len(x) - 2
    last = ("N" + "HWD"[:n] + "C", "HWD"[:n] + "IO", "N" + "HWD"[:n] + "C")
    return jax.lax.conv_dimension_numbers(x, k, last)


IMAGE, KERNEL = (2, 6, 6, 4), (3, 3, 4, 4)
OTHERS = {
    "groups": (IMAGE, (3, 3, 2, 4), {"feature_group_count": 2}),
    "1-d": ((2, 6, 4), (3, 4, 4), {}),
    "3-d": ((2, 6, 6, 6, 4), (3, 3, 3, 4, 4), {}),
    "input dilation": (IMAGE, KERNEL, {"lhs_dilation": (2, 1)}),
    "groups of the batch": (IMAGE, KERNEL, {"batch_group_count": 2}),
    "a precision": (IMAGE, KERNEL, {"precision": jax.lax.Precision.HIGHEST}),
    "a type of the output": (IMAGE, KERNEL, {"preferred_element_type": jnp.float32}),
    "channels first": ((2, 4, 6, 6), (4, 4, 3, 3), {"dimension_numbers": None}),
    "numbers by letters": (IMAGE, KERNEL, {"dimension_numbers": LAST}),
}


@pytest.fixture
def passed(monkeypatch):
    """Arguments of every call of XLA's convolution."""
    seen, real = [], jax.lax.conv_general_dilated

    def spy(*args, **kwargs):
        seen.append((args, kwargs))
        return real(*args, **kwargs)

    monkeypatch.setattr(jax.lax, "conv_general_dilated", spy)
    return seen


def _check_passed(calls, passed, shapes, **options):
    padding = "SAME" if len(shapes[0].shape) % 2 else [(1, 1)] * (len(shapes[0].shape) - 2)
    strides = (1,) * (len(shapes[0].shape) - 2)
    jax.eval_shape(lambda x, k: conv_general_dilated(x, k, strides, padding, **options), *shapes)
    assert not calls
    [((_, _, *given), kwargs)] = passed
    assert given == [strides, padding]
    absent = {"lhs_dilation": None, "rhs_dilation": None, "feature_group_count": 1}
    assert kwargs == absent | options


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_go_to_xla_as_they_came(one_device, calls, passed, name):
    x, k, options = OTHERS[name]
    _check_passed(calls, passed, _shapes(x, k), **{"dimension_numbers": _numbers(x, k)} | options)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_other_types_go_to_xla(x64, one_device, calls, passed, dtype):
    shapes = _shapes(IMAGE, KERNEL, dtype=dtype)
    _check_passed(calls, passed, shapes, dimension_numbers=_numbers(IMAGE, KERNEL))


def test_several_devices_go_to_xla(calls, passed):
    assert jax.device_count() > 1
    numbers = _numbers(IMAGE, KERNEL)
    _check_passed(calls, passed, _shapes(IMAGE, KERNEL), dimension_numbers=numbers)


def test_other_backends_go_to_xla(one_device, monkeypatch, calls, passed):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    numbers = _numbers(IMAGE, KERNEL)
    _check_passed(calls, passed, _shapes(IMAGE, KERNEL), dimension_numbers=numbers)


@pytest.mark.parametrize(
    ("strides", "padding", "dilation"),
    [
        ((1, 1), "SAME", None),
        ((2, 2), "SAME", (1, 1)),
        ((1, 2), "VALID", (1, 1)),
        ((1, 1), "SAME", (2, 1)),
        ((2, 1), [(0, 2), (2, 1)], (1, 2)),
    ],
)
def test_two_dimensional_maps_come_here_whatever_their_geometry(
    one_device, calls, strides, padding, dilation
):
    x, k, numbers = _draw(*IMAGE), _draw(*KERNEL), _numbers(IMAGE, KERNEL)

    def both(x, k):
        options = {"rhs_dilation": dilation, "dimension_numbers": numbers}
        ours = conv_general_dilated(x, k, strides, padding, **options)
        return ours, jax.lax.conv_general_dilated(x, k, strides, padding, **options)

    ours, expected = jax.jit(both)(x, k)
    assert calls == ["convolve"]
    _assert_close(ours, expected, share=1e-6)


class Net(nn.Module):
    """Convolutions of every way: few channels, Winograd, stride, circular, shared."""

    def setup(self):
        self.stem = nn.Conv(64, (3, 3))
        self.wide = nn.Conv(64, (3, 3), use_bias=False)
        self.down = nn.Conv(64, (3, 3), strides=2)
        self.around = nn.Conv(8, (3, 3), padding="CIRCULAR")
        self.grouped = nn.Conv(4, (3, 3), feature_group_count=2)

    def __call__(self, x):
        x = jnp.tanh(self.wide(jnp.tanh(self.wide(jnp.tanh(self.stem(x))))))
        return self.grouped(jnp.tanh(self.around(jnp.tanh(self.down(x)))))


@pytest.fixture(scope="module")
def model():
    x = _draw(16, 8, 8, 3)
    shapes = jax.eval_shape(Net().init, jax.random.key(0), x)
    scaled = jax.tree.map(lambda leaf: _draw(*leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5, shapes)
    return Net(), scaled, x


def test_a_model_with_fast_convolutions_is_the_same_function(one_device, calls, model):
    net, variables, x = model

    @partial(jax.jit, static_argnums=0)
    def run(apply_fn, variables, x):
        def loss(variables, x):
            y = apply_fn(variables, x)
            return jnp.sum(y**2), y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, x)

    got = run(fast_convolutions(net.apply), variables, x)
    assert calls.count("winograd_kernel_gradient") == 2  # of both calls of the shared layer
    calls.clear()
    _assert_close(got, run(net.apply, variables, x), share=3e-5)
    assert not calls  # the model itself was not changed


def test_layers_are_captured_through_fast_convolutions(one_device, calls, model):
    net, variables, x = model
    fast = fast_convolutions(net.apply)
    specs = describe_layers(net.apply, variables, x)
    assert describe_layers(fast, variables, x) == specs
    calls.clear()
    got = jax.jit(capture_inputs(fast, specs))(variables, x)
    assert calls.count("convolve") == 5  # all but the grouped one
    expected = jax.jit(capture_inputs(net.apply, specs))(variables, x)
    assert len(got["wide"]) == 2
    _assert_close(got, expected, share=3e-5)


class OwnConv(nn.Conv):
    """May do anything."""


def _own(*args, **kwargs):
    return jax.lax.conv_general_dilated(*args, **kwargs)


@pytest.mark.parametrize(
    ("layer", "ours"),
    [
        (nn.Conv(4, (3, 3)), 1),
        (OwnConv(4, (3, 3)), 0),
        (nn.Conv(4, (3, 3), conv_general_dilated=_own), 0),
        (nn.Conv(4, (3, 3), conv_general_dilated_cls=lambda: _own), 0),
        (nn.ConvTranspose(4, (3, 3)), 0),
        (nn.ConvLocal(4, (3, 3)), 0),
        (nn.Sequential([nn.Conv(4, (3, 3)), OwnConv(4, (3, 3))]), 1),
        (nn.Conv(4, (3, 3), dtype=jnp.bfloat16), 0),
        (nn.Conv(4, (3, 3), mask=jnp.ones(KERNEL)), 1),
        (nn.remat(nn.Conv)(4, (3, 3)), 1),
        (nn.jit(nn.Conv)(4, (3, 3)), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_plain_convolution_layers_are_made_fast(one_device, calls, layer, ours):
    [x] = _shapes(IMAGE)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    jax.eval_shape(lambda v, x: fast_convolutions(layer.apply)(v, x), variables, x)
    assert calls == ["convolve"] * ours


def test_layers_under_nn_vmap_are_made_fast(one_device, calls):
    stacked = nn.vmap(nn.Conv, variable_axes={"params": 0}, split_rngs={"params": True})
    model, x, k = stacked(4, (3, 3), use_bias=False), _draw(2, *IMAGE), _draw(2, *KERNEL)
    y = fast_convolutions(model.apply)({"params": {"kernel": k}}, x)
    assert calls == ["convolve"]
    _assert_close(y, jax.vmap(partial(_slow, _geometry()))(x, k), share=1e-6)
