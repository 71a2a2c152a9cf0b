"""Your own optimiser chain: AdamW steps that the retained data do not feel.

Here is a method of your own, "train the forgotten class towards the uniform prediction", with its
own loss, loop and optimiser. One more link at the end of the optax chain takes from every update of
a kernel what the retained data's layer inputs would feel. Run it from anywhere:

    python examples/own_optimizer.py

It can work because the forgotten class reads input directions that the others do not use. Where
forget and retain data share all their directions, the projection leaves nothing to learn in: lower
``energy`` gives room, at the price of larger changes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import (
    Batches,
    accumulate_gram,
    describe_layers,
    eigenbasis,
    layer_inputs,
    project_updates,
    top_eigenspace,
)

NUM_CLASSES, FORGET = 4, 3


class Classifier(nn.Module):
    """Two dense layers; nothing in it knows of projections."""

    @nn.compact
    def __call__(self, x):
        """Logits ``[b, 4]`` of rows ``[b, 64]``."""
        return nn.Dense(NUM_CLASSES, name="head")(nn.relu(nn.Dense(128, name="hidden")(x)))


def clusters(per_class=100, *, seed=0):
    """Four clusters in 64 dimensions that spread in the same six directions."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(NUM_CLASSES), per_class)
    means, directions = rng.normal(size=(NUM_CLASSES, 64)), rng.normal(size=(6, 64))
    spread = 0.5 * rng.normal(size=(len(labels), 6)) @ directions
    noise = 0.01 * rng.normal(size=(len(labels), 64))
    return ((means[labels] + spread + noise) / 4).astype(np.float32), labels


def minimise(loss, params, optimizer, *, steps):
    """A training loop as anybody writes it."""

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    return params


def retained_space(model, params, retain, *, energy):
    """Layers -> their inputs -> Grams -> eigenspaces: what the retained data read, by layer."""
    variables = {"params": params}
    specs = describe_layers(model.apply, variables, retain.inputs)
    grams = accumulate_gram(layer_inputs(model.apply, specs), variables, retain)
    projectors = {
        path: top_eigenspace(eigenbasis(state.gram), energy=energy) for path, state in grams.items()
    }
    return projectors, specs


def main():
    """Forget with three optimisers; returns for each what it forgot and what it disturbed."""
    inputs, labels = clusters()
    model = Classifier()
    params = jax.jit(model.init)(jax.random.key(0), inputs[:1])["params"]
    forget, others = inputs[labels == FORGET], labels != FORGET
    retain = Batches(inputs[others], labels[others], batch_size=100)

    def classify(params):
        logits = model.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def be_uniform(params):
        return -jax.nn.log_softmax(model.apply({"params": params}, forget)).mean()

    params = minimise(classify, params, optax.adam(1e-2), steps=60)

    projectors, specs = retained_space(model, params, retain, energy=0.9999)
    adamw = optax.adamw(1e-2, weight_decay=0.1)
    projection = project_updates(projectors, specs, complement=True)
    optimizers = {
        "adamw": adamw,
        "projection first": optax.chain(projection, adamw),  # wrong: AdamW leaves the subspace
        "projection last": optax.chain(adamw, projection),
    }

    def measures(after):
        probabilities = jax.nn.softmax(model.apply({"params": after}, forget))
        change = model.apply({"params": after}, retain.inputs) - before
        return float(probabilities[:, FORGET].mean()), float(jnp.abs(change).max())

    before = model.apply({"params": params}, retain.inputs)
    table = {"before": measures(params)}
    for name, optimizer in optimizers.items():
        table[name] = measures(minimise(be_uniform, params, optimizer, steps=100))
    print(f"{'':18}confidence in class {FORGET}   largest change of a retained logit")
    for name, (confidence, change) in table.items():
        print(f"{name:18}{confidence:21.1%}{change:38.3f}")
    return table


if __name__ == "__main__":
    main()
