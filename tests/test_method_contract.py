"""What every method promises, whatever it does: one contract, held to each row of METHODS.

The methods of the papers that are judged by their equations have tests of the same kind in files of
their own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.gram import GramState
from jaxunlearn.methods import METHODS, UnlearningProblem
from jaxunlearn.methods.base import Recipe
from jaxunlearn.models import MLP
from jaxunlearn.sharding import data_mesh

N, K, D = 24, 4, 6
KEY = jax.random.key(0)
SLOW = pytest.mark.slow
ELSEWHERE = {"unsc", "deep_unlearning", "forget_vectors"}  # these have tests of their own


class Convolution(nn.Module):
    """A network with kernels that have spatial axes."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Conv(5, (2, 2), name="conv")(x.reshape(-1, 3, 2, 1)))
        return nn.Dense(K, name="head")(x.mean((1, 2)))


MODELS = {"dense": MLP(features=(5,), num_classes=K), "convolution": Convolution()}


class Case(NamedTuple):
    """How a method is put to the test.

    ``rows`` sets the rows per batch of forget and retain data; ``zero`` are settings under which
    nothing may change (None: there are none); ``traces`` counts uses of the model in a first run.
    """

    rows: Callable[[int, int], dict[str, Any]]
    traces: int
    short: dict[str, Any] = {"epochs": 2, "learning_rate": 0.05, "weight_decay": 0.01}  # noqa: RUF012
    longer: dict[str, Any] = {"epochs": 4}  # noqa: RUF012
    zero: dict[str, Any] | None = {"learning_rate": 0.0, "weight_decay": 0.0}  # noqa: RUF012
    diverging: dict[str, Any] | None = {"learning_rate": 1e30}  # noqa: RUF012
    random: bool = True  # whether another key gives another result
    padded: bool = True  # whether rows of batches do not count
    changes: bool = True  # whether the result is another model than the original
    retraced: int = 2  # checks in a second, longer run
    mesh: bool = False  # whether it is also run on eight devices
    model: str = "dense"


CASES = {
    "dampening": Case(
        # The check, squares of examples, and the accuracy.
        lambda f, r: {"batch_size": r},
        traces=3,
        short={"importance": "per_sample", "alpha": 1.5, "dampening": 0.5},
        longer={"alpha": 1.2},
        zero={"dampening": 1e30},
        diverging=None,
        random=False,
        mesh=True,
    ),
    "dimensional_alignment": Case(
        # Two checks and the steps; also the layers, their check, the Gram, the accuracy.
        lambda f, r: {"forget_batch_size": f, "batch_size": r},
        traces=8,
        retraced=4,
        mesh=True,
    ),
    "fisher_noise": Case(
        # The check, the layers, squares of examples, and the accuracy.
        lambda f, r: {"batch_size": r},
        traces=4,
        short={"alpha": 1e-4},
        longer={"alpha": 1e-3},
        zero={"alpha": 0.0, "redraw_head": False},
        diverging=None,
        retraced=3,
    ),
    "finetune": Case(lambda f, r: {"batch_size": r}, traces=3, mesh=True),
    "gradient_ascent": Case(
        lambda f, r: {"forget_batch_size": f},
        traces=2,
        short={"epochs": 2, "learning_rate": 0.05, "stop_at_chance": False},
        longer={"epochs": 4, "stop_at_chance": True, "clip": 0.5},
        zero={"learning_rate": 0.0},
        diverging=None,
        random=True,
        mesh=True,
    ),
    "head_edit": Case(
        lambda f, r: {},
        traces=2,  # two checks
        short={},
        longer={},
        zero=None,
        diverging=None,
        random=False,
    ),
    "identity": Case(
        lambda f, r: {},
        traces=1,  # a check
        short={},
        longer={},
        zero={},
        diverging=None,
        random=False,
        changes=False,
    ),
    "influence": Case(
        # The check, sums, single gradients, and the accuracy.
        lambda f, r: {"batch_size": r},
        traces=4,
        short={"alpha": 0.1, "damping": 0.1, "samples": 100},
        longer={"alpha": 0.05},
        zero={"alpha": 0.0},
        diverging=None,
        random=False,
        mesh=True,
    ),
    "negative_gradient_plus": Case(
        lambda f, r: {"forget_batch_size": f, "batch_size": r},
        traces=3,
        longer={"epochs": 4, "alpha": 0.5},
        mesh=True,
    ),
    "kernel_transpose": Case(
        # Two checks, the layers, and the steps.
        lambda f, r: {"batch_size": r},
        traces=4,
        zero=None,
        retraced=3,
        mesh=True,
        model="convolution",
    ),
    "masked_small_gradients": Case(
        # Two checks, the layers, sums of gradients of two sizes of batches, and the steps.
        lambda f, r: {"batch_size": r},
        traces=5,
        zero={"learning_rate": 0.0, "share": 0.0},
        retraced=3,
        mesh=True,
        model="convolution",
    ),
    "random_labels": Case(
        lambda f, r: {"forget_batch_size": f, "batch_size": r, "redraw": "once"},
        traces=4,
        mesh=True,
    ),
    "retrain": Case(
        lambda f, r: {},
        traces=3,
        short={},
        longer={},
        zero=None,
        diverging=None,
        padded=False,
        mesh=True,
    ),
    "scrub": Case(
        # One check, whether train mode differs, the steps, and the original in each.
        lambda f, r: {"forget_batch_size": f, "batch_size": r},
        traces=8,
        mesh=True,
    ),
    "saliency": Case(
        # Two checks, the steps, and the gradient of the mask.
        lambda f, r: {"forget_batch_size": f, "batch_size": r, "redraw": "once"},
        traces=5,
        mesh=True,
    ),
    "boundary_shrink": Case(
        # Two checks, the attack, the labels, the step.
        lambda f, r: {"forget_batch_size": f, "clip": False, "force": True},
        traces=5,
        mesh=True,
    ),
    "boundary_expanding": Case(
        # Two checks, the layers, the check of its logits, the step.
        lambda f, r: {"forget_batch_size": f},
        traces=5,
        retraced=3,
        mesh=True,
    ),
    "bad_teacher": Case(
        # Two checks, that of what init_fn makes, answers of forget and of retain data, the step.
        lambda f, r: {"batch_size": r},
        traces=5,
        retraced=3,
    ),
    "unsir": Case(
        # Three checks, the noise, the steps of two phases, and the accuracy. Two rows are noise.
        lambda f, r: {"batch_size": r + 2},
        traces=7,
        short={"noise_images": 2, "noise_steps": 3, "copies": 1},
        longer={"impair_epochs": 2, "repair_learning_rate": 0.1},
        zero={"impair_learning_rate": 0.0, "repair_learning_rate": 0.0},
        diverging={"impair_learning_rate": 1e30},
        retraced=3,
    ),
    "scar": Case(
        # Two checks, the layers, features of retain and of forget data, answers, two in the step.
        lambda f, r: {"forget_batch_size": f, "batch_size": r},
        traces=7,
        mesh=True,
    ),
}


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# The others on the same loops are slow tests.
MESH = [
    n if n in ("dimensional_alignment", "finetune", "dampening") else pytest.param(n, marks=SLOW)
    for n in CASES
    if CASES[n].mesh
]
PADDED = [
    n if n in ("finetune", "scrub", "influence", "dampening") else pytest.param(n, marks=SLOW)
    for n in CASES
    if CASES[n].padded
]


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(N, D)), jnp.float32), np.arange(N) % K


@pytest.fixture(scope="module")
def originals(data):
    return {m: jax.jit(net.init)(jax.random.key(1), data[0]) for m, net in MODELS.items()}


@pytest.fixture(scope="module", params=CASES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def request_of(name, data, originals):
    """Problems of the model that a method is tried on: a class, or samples, six examples each."""
    x, labels = data
    network, variables = MODELS[CASES[name].model], originals[CASES[name].model]

    def make(classes=(1,), **fields):
        gone = np.isin(labels, classes) if classes else np.arange(N) < N // K
        forget, retain = (Batches(x[part], labels[part], 4) for part in (gone, ~gone))
        given = {
            "init_fn": lambda key: network.init(key, x[:1]),
            "recipe": Recipe(lambda steps: optax.sgd(0.05, momentum=0.9), 2, 4),
            "held_out_forget": Batches(x[:6], labels[:6], 4),
            "surrogate": Batches(x[6:12], labels[6:12], 4),
        }
        problem = UnlearningProblem(network.apply, variables, forget, retain, K, classes)
        return dataclasses.replace(problem, **given | fields)

    return make


def run(name, problem, *, key=KEY, rows=(4, 4), **settings):
    method, case = METHODS[name], CASES[name]
    config = method.config(**(case.short | case.rows(*rows) | settings))
    return method.run(key, problem, config)


@pytest.fixture(scope="module")
def problem(request_of):
    return request_of()


@pytest.fixture(scope="module")
def result(name, problem):
    """A run, that of other settings, and the number of traces of the model in each."""
    traced = []

    def counted(variables, inputs, **kwargs):
        traced.append(inputs.shape)
        return problem.apply_fn(variables, inputs, **kwargs)

    request = dataclasses.replace(problem, apply_fn=counted)
    unlearned = run(name, request)
    first = len(traced)
    again = run(name, request, **CASES[name].longer)
    return unlearned, again, first, len(traced) - first


def test_every_method_is_held_to_the_contract():
    assert CASES.keys() | ELSEWHERE == METHODS.keys()


def test_a_key_sets_every_bit(name, problem, result):
    unlearned = result[0]
    assert_same(run(name, problem).variables, unlearned.variables)
    if CASES[name].random:
        other = run(name, problem, key=jax.random.key(1))
        assert differ(other.variables, unlearned.variables)


def differ(a, b):
    return any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_the_model_keeps_its_form_and_the_inputs_their_values(name, data, problem, result):
    x, labels = data
    before, after = problem.variables, result[0].variables
    assert jax.tree.structure(before) == jax.tree.structure(after)
    form = lambda leaf: (leaf.shape, leaf.dtype)  # noqa: E731
    assert jax.tree.map(form, before) == jax.tree.map(form, after)
    for leaf in jax.tree.leaves(after):
        assert np.isfinite(leaf).all()
    assert_same(before, jax.jit(MODELS[CASES[name].model].init)(jax.random.key(1), x))
    np.testing.assert_array_equal(problem.retain.inputs, x[labels != 1])


def test_the_model_is_traced_once_for_each_use_whatever_the_settings(name, result):
    _, _, first, second = result
    assert first == CASES[name].traces
    assert second <= CASES[name].retraced


@pytest.mark.parametrize("name", PADDED, scope="module")
def test_rows_that_fill_up_a_batch_count_nothing(name, problem):
    exact, padded = (run(name, problem, rows=rows) for rows in ((6, 18), (8, 24)))
    assert_close(padded.variables, exact.variables, atol=1e-6)
    for a, b in zip(padded.info.get("epochs", []), exact.info.get("epochs", []), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_classes_and_samples_change_the_model_and_other_scopes_are_refused(name, request_of):
    for scope, classes in (("class", (3,)), ("classes", (2, 0)), ("samples", ())):
        request = request_of(classes)
        if scope not in METHODS[name].scopes:
            with pytest.raises(ValueError, match=f"{name} does not support scope '{scope}'"):
                run(name, request)
        elif scope != "classes":  # whose data are of another shape
            after = run(name, request).variables
            assert differ(after, request.variables) == CASES[name].changes


def test_data_that_a_method_does_not_need_are_never_read(name, problem, result):
    noise = {"forget": problem.forget, "retain": problem.retain}
    for side in {"forget", "retain"} - METHODS[name].needs:
        batches = noise[side]
        other = Batches(-batches.inputs, batches.labels, batches.batch_size)
        after = run(name, dataclasses.replace(problem, **{side: other}))
        assert_same(after.variables, result[0].variables)


def test_at_strength_zero_the_original_is_returned_to_the_bit(name, problem):
    if CASES[name].zero is None:
        pytest.skip("it has no strength")
    assert_same(run(name, problem, **CASES[name].zero).variables, problem.variables)


def test_a_diverging_run_is_an_error(name, problem):
    if CASES[name].diverging is None:
        pytest.skip("its tests have what it does instead")
    with pytest.raises(FloatingPointError, match=rf"{name}: losses .* lower learning_rate"):
        run(name, problem, **CASES[name].diverging)


def test_what_a_method_needs_and_the_problem_lacks_is_named(name, problem):
    needs = METHODS[name].needs
    for field in needs - {"forget"}:
        with pytest.raises(ValueError, match=rf"{name} needs {field.replace('_', '.')}"):
            run(name, dataclasses.replace(problem, **{field: None}))
    if "retain" in needs:
        grams = {k: {"head": GramState(jnp.eye(5), jnp.int32(6))} for k in (0, 2, 3)}
        stored = dataclasses.replace(problem, retain=None, grams=grams)
        with pytest.raises(ValueError, match=r"trains on retain data: pass retain=Batches\(...\)"):
            run(name, stored)


@pytest.mark.parametrize("name", MESH, scope="module")
def test_on_eight_devices_the_result_is_that_of_one(name, problem, result):
    split = run(name, dataclasses.replace(problem, mesh=data_mesh(8)))
    assert_close(split.variables, result[0].variables, atol=1e-5)
    for leaf in jax.tree.leaves(split.variables):
        assert leaf.devices() == {jax.devices()[0]}
