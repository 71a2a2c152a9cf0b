"""The distillation loss against NumPy and the reference code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxunlearn.batches import Batches
from jaxunlearn.methods.distillation import answers, distillation, held_to_answers
from jaxunlearn.models import read_arrays


@pytest.mark.parametrize("T", [1, 2, 4])
def test_loss_and_gradient_are_those_of_the_reference_code(golden, x64, T):
    stored = read_arrays(golden / "scrub_neggrad.npz")
    student, teacher = (jnp.asarray(stored[f"{who}_logits"]) for who in ("student", "teacher"))
    student = student.astype(jnp.float64)
    loss, grad = jax.value_and_grad(lambda s: distillation(s, teacher, float(T)).mean())(student)
    assert loss == pytest.approx(stored[f"kd__T{T}"], abs=2e-7)
    np.testing.assert_allclose(grad, stored[f"kd_grad__T{T}"], atol=2e-7)


def test_it_is_the_divergence_of_each_example_and_never_negative():
    student, teacher = np.random.default_rng(0).normal(size=(2, 20, 5)).astype(np.float32)
    p, q = (np.float64(log_softmax(z / 3, axis=1)) for z in (teacher, student))
    expected = 9 * (np.exp(p) * (p - q)).sum(1)
    found = distillation(jnp.asarray(student), jnp.asarray(teacher), 3.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert (expected > 0).all()


def test_where_both_agree_the_loss_is_zero_and_so_is_its_gradient_up_to_rounding():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
    loss, grad = jax.value_and_grad(lambda z: distillation(z, logits, 4.0).sum())(logits)
    assert loss == 0
    np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_the_teacher_is_a_constant():
    a, b = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    np.testing.assert_array_equal(jax.grad(lambda t: distillation(a, t).sum())(b), 0)


def test_stored_answers_are_those_of_each_example_in_whatever_order():
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    data = Batches(inputs, jnp.zeros(5, int), 2)
    stored = answers(lambda v, x: x * v["scale"], {"scale": 2.0}, data)
    np.testing.assert_array_equal(stored, 2 * inputs)
    batch = {"indices": jnp.array([4, 1, 1]), "mask": jnp.array([1, 1, 0])}
    loss, _ = held_to_answers({"answers": stored}, batch, inputs[:3])
    expected = distillation(inputs[:2], stored[jnp.array([4, 1])]).sum()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
