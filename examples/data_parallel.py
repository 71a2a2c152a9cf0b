"""Several devices: one unlearning loop under ``jax.pmap``, over a mesh, and on one device.

Each way does the same three things: Grams of the retained data, projectors from them, and projected
steps that teach the forget data another label. The numbers agree, because sums over rows are all
that the rows' devices have to exchange. Run it from anywhere:

    python examples/data_parallel.py

On a machine without accelerators it makes eight virtual devices of the CPU; with them, it takes
what there is. Use a mesh in new code; ``pmap`` is for programs that have one already.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import (
    Batches,
    TrainState,
    accumulate_gram,
    data_mesh,
    describe_layers,
    eigenbasis,
    epoch_inputs,
    layer_inputs,
    project_updates,
    run_epoch,
    top_eigenspace,
    train_step,
    unreplicate,
)

NUM_CLASSES, BATCH, EPOCHS = 4, 32, 5


class Classifier(nn.Module):
    """Two dense layers; nothing in it knows of devices."""

    @nn.compact
    def __call__(self, x):
        """Logits ``[b, 4]`` of rows ``[b, 64]``."""
        return nn.Dense(NUM_CLASSES, name="head")(nn.relu(nn.Dense(48, name="hidden")(x)))


MODEL = Classifier()


def problem(seed=0):
    """Variables, retained rows in few directions, and forget rows with the labels to be taught."""
    rng = np.random.default_rng(seed)
    retain = (rng.normal(size=(192, 6)) @ rng.normal(size=(6, 64)) / 4).astype(np.float32)
    forget = rng.normal(size=(80, 64)).astype(np.float32)
    variables = jax.jit(MODEL.init)(jax.random.key(seed), retain[:1])
    return variables, retain, Batches(forget, rng.integers(0, NUM_CLASSES, 80), BATCH)


def optimizer_from(grams, specs):
    """SGD whose updates of a kernel the retained data do not feel; the projection comes last."""
    projectors = {
        path: top_eigenspace(eigenbasis(state.gram), energy=0.99999)
        for path, state in grams.items()
    }
    return optax.chain(optax.sgd(0.5), project_updates(projectors, specs, complement=True))


def epochs(forget):
    """Indices ``[steps, b]``, masks and step numbers, the same for every way."""
    return [epoch_inputs(jax.random.key(1), forget.num_examples, BATCH, e) for e in range(EPOCHS)]


def with_mesh(mesh):
    """Our own driver: arrays of one device go in, a mesh says over what the rows are split."""
    variables, retain, forget = problem()
    specs = describe_layers(MODEL.apply, variables, retain[:1])
    batches = Batches(retain, np.zeros(len(retain), int), batch_size=64)
    grams = accumulate_gram(layer_inputs(MODEL.apply, specs), variables, batches, mesh=mesh)
    optimizer = optimizer_from(grams, specs)
    step = train_step(MODEL.apply, optimizer, train=False)
    consts = {"inputs": forget.inputs, "labels": forget.labels, "key": jax.random.key(2)}
    state = TrainState(variables, optimizer.init(variables["params"]))
    for xs in epochs(forget):
        state, figures = run_epoch(step, consts, state, xs, mesh=mesh)
    after = unreplicate(mesh, state.variables)
    return measures(grams, figures["loss"], variables, after, retain)


def with_pmap():
    """A program of your own: the same functions inside ``jax.pmap``, told the name of its axis."""
    variables, retain, forget = problem()
    devices = jax.local_device_count()
    specs = describe_layers(MODEL.apply, variables, retain[:1])
    inputs_fn = layer_inputs(MODEL.apply, specs)

    def share_grams(variables, batch):
        return accumulate_gram(inputs_fn, variables, [batch], axis_name="data")

    def split(x):  # [b, ...] -> [devices, b / devices, ...]
        return x.reshape(devices, -1, *x.shape[1:])

    batch = {"inputs": split(retain), "mask": split(np.ones(len(retain), bool))}
    # Summed over devices: every device has the whole Grams, and those of the first will do.
    grams = first(jax.pmap(share_grams, "data", in_axes=(None, 0))(variables, batch))

    optimizer = optimizer_from(grams, specs)
    step = train_step(MODEL.apply, optimizer, train=False, axis_name="data")
    split_axes = {"indices": 0, "mask": 0, "step": None}
    parallel_step = jax.pmap(step, "data", in_axes=(None, 0, split_axes))
    consts = {"inputs": forget.inputs, "labels": forget.labels, "key": jax.random.key(2)}
    state = TrainState(variables, optimizer.init(variables["params"]))
    # One copy of variables, optimiser state and projectors for each device.
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (devices, *jnp.shape(x))), state)
    for xs in epochs(forget):
        total = count = 0.0
        for indices, mask, number in zip(xs["indices"], xs["mask"], xs["step"], strict=True):
            x = {"indices": split(indices), "mask": split(mask), "step": number}
            state, sums = parallel_step(consts, state, x)
            total, count = total + float(sums["loss"][0]), count + float(sums["count"][0])
    return measures(grams, total / count, variables, first(state).variables, retain)


def first(tree):
    """What the first device holds, back on one device."""
    return jax.tree.map(lambda x: jnp.asarray(jax.device_get(x[0])), tree)


def measures(grams, loss, before, after, retain):
    """Trace of a Gram, loss of the last epoch, and how far a retained output has moved."""
    change = MODEL.apply(after, retain) - MODEL.apply(before, retain)
    trace = jnp.trace(grams["hidden"].gram)
    return float(trace), float(loss), float(jnp.abs(change).max())


def main():
    """The three ways; returns the measures of each."""
    table = {"one device": with_mesh(None), "mesh": with_mesh(data_mesh()), "pmap": with_pmap()}
    print(f"{jax.local_device_count()} devices of kind {jax.devices()[0].device_kind}")
    print(f"{'':12}trace of a Gram   loss of the forget data   largest change of a retained logit")
    for name, (trace, loss, change) in table.items():
        print(f"{name:12}{trace:15.3f}{loss:26.5f}{change:37.5f}")
    return table


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # before anything else of JAX
    main()
