"""Gradient step of a conv net on the CPU backend, our convolutions against XLA's: 1.5 times.

ResNet-20, and AllCNN at width 1 and at 1/2, in inference mode (as UNSC steps), cross-entropy, at
batches of 256 (the UNSC configs') and 64. Agreement: no gradient is further from XLA's, relative to
its norm, than three times what inputs changed by 1e-5 make of XLA's (ReLUs near 0 switch).
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import Way, compare, main
from jaxunlearn.convolution import fast_convolutions
from jaxunlearn.models import build

NETS = {
    "ResNet-20": ("resnet20", {}),
    "AllCNN": ("allcnn", {}),
    "AllCNN / 2": ("allcnn", {"width": 0.5}),
}
BATCHES = (256, 64)


def measure() -> list[dict]:
    """One row per net and batch size."""
    return [_row(net, batch) for net in NETS for batch in BATCHES]


def _row(net: str, batch: int) -> dict:
    name, options = NETS[net]
    model = build(name, num_classes=10, **options)
    x = jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    labels = jnp.arange(batch) % 10
    variables = model.init(jax.random.key(1), x)

    def gradient(apply_fn, variables, x):
        def loss(params):
            logits = apply_fn({**variables, "params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)(variables["params"])

    steps = {
        "ours": jax.jit(partial(gradient, fast_convolutions(model.apply))),
        "xla": jax.jit(partial(gradient, model.apply)),
    }
    xla = steps["xla"](variables, x)
    noise = 1 + 1e-5 * jax.random.normal(jax.random.key(2), x.shape)
    error = _distance(steps["ours"](variables, x), xla)
    sensitivity = _distance(steps["xla"](variables, x * noise), xla)
    assert error < 3 * sensitivity, (error, sensitivity)
    return compare(
        f"{net}, batch {batch}",
        {way: Way(partial(step, variables, x), 3) for way, step in steps.items()},
        fast="ours",
        naive="xla",
        bar=1.5,
        relative_error=error,
        error_of_inputs_changed_by_1e_5=sensitivity,
    )


def _distance(a, b) -> float:
    """Largest relative distance of two gradients' leaves."""
    off = jax.tree.map(lambda a, b: jnp.linalg.norm(a - b) / jnp.linalg.norm(b), a, b)
    return float(max(jax.tree.leaves(off)))


if __name__ == "__main__":
    main("conv_gradient", __doc__, measure)
