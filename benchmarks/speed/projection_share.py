"""The projection's share of an UNSC step on ResNet-20: at most 5 %, a step 20 times its cost.

Batch 256, every kernel projected, every projector of rank d / 2: the most that ``truncate`` leaves.
The projection alone is timed, jitted by itself. Agreement: projected updates lie in the null space.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import Way, compare, main
from jaxunlearn.capture import describe_layers
from jaxunlearn.convolution import fast_convolutions
from jaxunlearn.layers import kernel_as_matrix, leaves_by_path
from jaxunlearn.models import build
from jaxunlearn.projectors import SpectralProjector
from jaxunlearn.steps import TrainState, train_step
from jaxunlearn.transforms import project_updates

BATCH = 256


def _half_space(key: jax.Array, d: int) -> SpectralProjector:
    basis, _ = jnp.linalg.qr(jax.random.normal(key, (d, d // 2)))
    return SpectralProjector(basis, jnp.ones(d // 2), jnp.zeros(()))


def measure() -> list[dict]:
    """One row: a whole step against its projection."""
    model = build("resnet20", num_classes=10)
    x = jax.random.normal(jax.random.key(0), (BATCH, 32, 32, 3))
    variables = dict(model.init(jax.random.key(1), x))
    specs = describe_layers(model.apply, variables, x[:1])
    keys = jax.random.split(jax.random.key(2), len(specs))
    projectors = {
        path: _half_space(key, spec.d_in)
        for key, (path, spec) in zip(keys, specs.items(), strict=True)
    }
    link = project_updates(projectors, specs, complement=True)
    optimizer = optax.chain(optax.sgd(0.1), link)
    step = jax.jit(train_step(fast_convolutions(model.apply), optimizer, train=False))
    consts = {"inputs": x, "labels": jnp.arange(BATCH) % 10, "key": jax.random.key(3)}
    batch = {"indices": jnp.arange(BATCH), "mask": jnp.ones(BATCH, bool), "step": jnp.int32(0)}
    state = TrainState(variables, optimizer.init(variables["params"]))

    project = jax.jit(link.update)
    updates, links = variables["params"], link.init(variables["params"])
    projected = leaves_by_path(project(updates, links)[0])
    for path, spec in specs.items():
        K = kernel_as_matrix(spec, projected[spec.kernel_path])
        assert float(jnp.linalg.norm(projectors[path](K)) / jnp.linalg.norm(K)) < 1e-5
    ways = {
        "projection": Way(partial(project, updates, links), 9),
        "step": Way(partial(step, consts, state, batch), 5),
    }
    return [
        compare("step / projection", ways, fast="projection", naive="step", bar=20, batch=BATCH)
    ]


if __name__ == "__main__":
    main("projection_share", __doc__, measure)
