import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.families import fit_family, member, stacked, trains_together
from jaxunlearn.models import MLP
from jaxunlearn.sharding import data_mesh
from jaxunlearn.training import fit, sgd

KEYS = jax.random.split(jax.random.key(0), 3)
X = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
BATCHES = Batches(X, np.arange(10) % 3, 4)
MODEL = MLP(features=(5,), num_classes=3)
SETTINGS = {
    "optimizer": sgd(learning_rate=0.1, momentum=0.9, steps_per_epoch=3, epochs=2),
    "epochs": 2,
    "augment": lambda key, x: x + 0.1 * jax.random.normal(key, x.shape),
}


def init(key):
    return MODEL.init(key, X[:1])


@pytest.fixture(scope="module")
def family():
    return fit_family(KEYS, MODEL.apply, init, BATCHES, together=True, **SETTINGS)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), a, b)


def test_each_model_is_the_one_that_its_key_alone_gives(family):
    for number, key in enumerate(KEYS):
        init_key, fit_key = jax.random.split(key)
        own = fit(fit_key, MODEL.apply, init(init_key), BATCHES, **SETTINGS).variables
        assert_close(member(family, number), own)


def test_together_and_one_after_another_are_the_same(family):
    loop = fit_family(KEYS, MODEL.apply, init, BATCHES, together=False, **SETTINGS)
    assert_close(family, loop)


def test_devices_share_the_models_whose_number_they_need_not_divide(family):
    mesh = data_mesh()
    assert mesh.size > len(KEYS)
    spread = fit_family(KEYS, MODEL.apply, init, BATCHES, together=True, mesh=mesh, **SETTINGS)
    assert_close(family, spread)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(spread)} == {1}


def test_models_of_a_family_differ(family):
    kernels = np.asarray(family["params"]["head"]["kernel"])
    assert min(abs(kernels[i] - kernels[j]).max() for i in range(3) for j in range(i)) > 1e-2


def test_a_stack_is_taken_apart_into_its_members(family):
    again = stacked([member(family, number) for number in range(3)])
    jax.tree.map(np.testing.assert_array_equal, again, family)


def test_on_the_cpu_models_with_convolutions_go_one_after_another():
    conv = nn.Conv(2, (2, 2))
    images = Batches(np.zeros((2, 4, 4, 1), np.float32), np.array([0, 1]), 2)
    variables = jax.eval_shape(conv.init, KEYS[0], images.inputs)
    assert not trains_together(conv.apply, variables, images)
    assert trains_together(MODEL.apply, jax.eval_shape(init, KEYS[0]), BATCHES)
    # What cannot be read may be a convolution.
    assert not trains_together(lambda variables, x: jnp.asarray(x), {"params": {}}, BATCHES)


def test_a_diverging_family_is_an_error_that_counts_its_models():
    settings = SETTINGS | {"optimizer": optax.sgd(1e30)}
    with pytest.raises(FloatingPointError, match="loss of 3 of 3 models is not finite in epoch"):
        fit_family(KEYS, MODEL.apply, init, BATCHES, together=True, **settings)
