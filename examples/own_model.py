"""Your own model, your own arrays: unlearn one class through the Python API.

The network below is defined and trained here, with plain flax and optax; jaxunlearn sees it only as
``apply_fn(variables, inputs)``. Run it from anywhere; it takes some seconds on a CPU:

    python examples/own_model.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from jaxunlearn import Batches, UnlearningProblem, UNSCConfig, unsc

NUM_CLASSES, FORGET = 10, 3


class Classifier(nn.Module):
    """A small convolutional network; nothing in it knows of unlearning."""

    @nn.compact
    def __call__(self, x):
        """Logits ``[b, 10]`` of images ``[b, 8, 8, 1]``."""
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(NUM_CLASSES)(x)


def train(model, inputs, labels, *, steps=300, batch_size=128):
    """Any training will do; this one is Adam on random batches."""
    variables = jax.jit(model.init)(jax.random.key(0), inputs[:1])
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(variables, opt_state, x, y):
        def loss(variables):
            logits = model.apply(variables, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(variables), opt_state)
        return optax.apply_updates(variables, updates), opt_state

    opt_state, rng = optimizer.init(variables), np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.choice(len(inputs), batch_size, replace=False)
        variables, opt_state = step(variables, opt_state, inputs[rows], labels[rows])
    return variables


def forget_class(model, variables, inputs, labels):
    """The unlearning itself: a problem, a method, its settings."""
    forget, retain = labels == FORGET, labels != FORGET
    problem = UnlearningProblem(
        apply_fn=model.apply,
        variables=variables,
        forget=Batches(inputs[forget], labels[forget], batch_size=64),
        retain=Batches(inputs[retain], labels[retain], batch_size=128),
        num_classes=NUM_CLASSES,
        forget_classes=(FORGET,),
    )
    config = UNSCConfig(learning_rate=0.2, epochs=20, batch_size=64)
    return unsc(jax.random.key(1), problem, config)


def accuracies(model, variables, inputs, labels):
    """Accuracy on the images of the forgotten class and on all others."""
    right = np.asarray(model.apply(variables, inputs).argmax(-1)) == labels
    return {
        "forget": float(right[labels == FORGET].mean()),
        "retain": float(right[labels != FORGET].mean()),
    }


def main():
    """Train, unlearn, print; returns the printed accuracies on test images."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    x, x_test, y, y_test = train_test_split(images, labels, stratify=labels, random_state=0)

    model = Classifier()
    variables = train(model, jnp.asarray(x), jnp.asarray(y))
    unlearned = forget_class(model, variables, x, y)
    table = {
        "before": accuracies(model, variables, x_test, y_test),
        "after": accuracies(model, unlearned.variables, x_test, y_test),
    }
    print(f"test accuracy      class {FORGET}   all others")
    for when, rates in table.items():
        print(f"{when:6} unlearning  {rates['forget']:7.1%}   {rates['retain']:10.1%}")
    return table


if __name__ == "__main__":
    main()
