"""Bad teacher: whose answers are learnt on which data.

On one-hot inputs each row of the kernel is an example's own, so after one step it shows which
teacher it was held to.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from jaxunlearn.batches import Batches
from jaxunlearn.methods import BadTeacherConfig, UnlearningProblem, bad_teacher
from jaxunlearn.methods.bad_teacher import check_bad_teacher

K, N_F, N_R = 4, 6, 20
N = N_F + N_R
KEY = jax.random.key(0)
PLAIN = BadTeacherConfig(
    optimizer="sgd", learning_rate=1.0, momentum=0.0, batch_norm="eval", batch_size=N
)


def linear(variables, inputs):
    return inputs @ variables["params"]["kernel"]


def kernel(key):
    return {"params": {"kernel": 2 * jax.random.normal(key, (N, K))}}


@pytest.fixture(scope="module")
def problem():
    x, labels = np.eye(N, dtype=np.float32), np.where(np.arange(N) < N_F, 1, 2)
    forget, retain = Batches(x[:N_F], labels[:N_F], 4), Batches(x[N_F:], labels[N_F:], 4)
    original = kernel(jax.random.key(1))
    return UnlearningProblem(linear, original, forget, retain, K, (1,), init_fn=kernel)


def taught(problem, **settings):
    return bad_teacher(KEY, problem, dataclasses.replace(PLAIN, **settings))


def kernels(problem, after):
    return (np.asarray(v["params"]["kernel"]) for v in (problem.variables, after.variables))


def test_forget_data_are_held_to_the_untrained_network_and_retain_data_to_the_original(problem):
    after = taught(problem, retain_fraction=1.0)
    _, _, init_key = jax.random.split(KEY, 3)
    teacher = np.asarray(kernel(init_key)["params"]["kernel"])[:N_F]
    before, now = kernels(problem, after)
    step = (softmax(teacher, axis=1) - softmax(before[:N_F], axis=1)) / N
    np.testing.assert_allclose(now[:N_F], before[:N_F] + step, atol=1e-6)
    np.testing.assert_allclose(now[N_F:], before[N_F:], atol=1e-6)


def test_a_model_that_answers_as_its_teachers_stays_where_it_is(problem):
    """The original as the teacher on forget data too."""
    same = dataclasses.replace(problem, init_fn=lambda key: problem.variables)
    before, now = kernels(same, taught(same, epochs=3))
    np.testing.assert_allclose(now, before, atol=1e-6)


def test_the_answers_of_the_untrained_network_are_learnt(problem):
    after = taught(problem, epochs=200, learning_rate=20.0)
    _, _, init_key = jax.random.split(KEY, 3)
    teacher = softmax(np.asarray(kernel(init_key)["params"]["kernel"])[:N_F], axis=1)
    _, now = kernels(problem, after)
    np.testing.assert_allclose(softmax(now[:N_F], axis=1), teacher, atol=1e-2)
    losses = [row["loss_both"] for row in after.info["epochs"]]
    assert losses[-1] < 1e-3 < 0.1 < losses[0]


def test_the_loss_is_the_mean_divergence_over_examples_and_not_over_classes(problem):
    info = taught(problem, retain_fraction=0.5, learning_rate=0.0).info
    _, _, init_key = jax.random.split(KEY, 3)
    p = softmax(np.float64(kernel(init_key)["params"]["kernel"])[:N_F], axis=1)
    q = softmax(np.float64(problem.variables["params"]["kernel"])[:N_F], axis=1)
    expected = (p * np.log(p / q)).sum() / (N_F + N_R // 2)
    (row,) = info["epochs"]
    assert row == {"epoch": 1, "loss_both": pytest.approx(expected, rel=1e-4)}
    assert (info["steps"], info["forget_passes"], info["retain_passes"]) == (1, 1, 0.5)


def test_an_init_fn_of_another_model_is_refused(problem):
    other = dataclasses.replace(problem, init_fn=lambda key: {"params": {"W": jnp.ones((N, K))}})
    with pytest.raises(ValueError, match="does not accept the variables that init_fn makes"):
        check_bad_teacher(other, PLAIN)
