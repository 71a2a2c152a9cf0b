"""What a method refuses, before any work: every message says what came and what was wanted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.gram import GramState
from jaxunlearn.methods import UnlearningProblem
from jaxunlearn.methods.base import check_problem
from jaxunlearn.models import MLP

MODEL = MLP(features=(3,), num_classes=3)
EVERY_SCOPE = frozenset({"class", "classes", "samples"})
RETAIN = frozenset({"forget", "retain"})


def examples(labels, inputs=None):
    rows = np.ones((len(labels), 5), np.float32) if inputs is None else inputs
    return Batches(rows, np.array(labels), batch_size=2)


@pytest.fixture(scope="module")
def problem():
    """Class 1 of three is to be forgotten."""
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.ones((1, 5)))
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
    return UnlearningProblem(
        MODEL.apply,
        variables,
        forget=examples([1, 1, 1]),
        retain=examples([0, 2, 2]),
        num_classes=3,
        forget_classes=(1,),
    )


def check(problem, needs=RETAIN, scopes=EVERY_SCOPE, **changes):
    check_problem(
        dataclasses.replace(problem, **changes), method="method", needs=needs, scopes=scopes
    )


def test_scope_follows_from_the_number_of_forgotten_classes(problem):
    scopes = [
        dataclasses.replace(problem, forget_classes=classes).scope for classes in ((), (1,), (0, 1))
    ]
    assert scopes == ["samples", "class", "classes"]


def test_sound_problems_of_every_scope_pass(problem):
    check(problem)
    check(problem, forget=examples([0, 1]), forget_classes=(1, 0), retain=examples([2]))
    check(problem, forget_classes=(), retain=examples([0, 1, 2]))


def test_the_check_calls_the_model_on_shapes_only(problem):
    def traced_only(variables, inputs):
        assert isinstance(inputs, jax.core.Tracer)
        return MODEL.apply(variables, inputs)

    check(problem, apply_fn=traced_only)


def test_an_unsupported_scope_is_refused(problem):
    message = r"method does not support scope 'class', only \['classes', 'samples'\]"
    with pytest.raises(ValueError, match=message):
        check(problem, scopes=frozenset({"samples", "classes"}))


def test_absent_retain_data_are_refused_where_needed(problem):
    message = r"method needs retain data: pass retain=Batches\(...\), or grams={...}"
    with pytest.raises(ValueError, match=message):
        check(problem, retain=None)
    check(problem, retain=None, needs=frozenset({"forget"}))
    gram = GramState(jnp.eye(5), jnp.int32(1))
    check(problem, retain=None, grams={0: {"dense1": gram}, 2: {"dense1": gram}})


def test_classes_that_do_not_exist_are_refused(problem):
    message = r"forget_classes \[-1, 3\] are not among the classes 0 to 2"
    with pytest.raises(ValueError, match=message):
        check(problem, forget_classes=(1, 3, -1))


def test_forgetting_every_class_is_refused(problem):
    message = r"all 3 classes would be forgotten; leave at least one to retain"
    with pytest.raises(ValueError, match=message):
        check(problem, forget_classes=(0, 1, 2), forget=examples([0, 1, 2]))


def test_labels_outside_the_classes_are_refused(problem):
    message = r"labels \[3, 7\] of the forget data are not among the 3 classes"
    with pytest.raises(ValueError, match=message):
        check(problem, forget_classes=(), forget=examples([1, 7, 3]))


@pytest.mark.parametrize(("labels", "held"), [([0, 1], r"\[0, 1\]"), ([0, 0], r"\[0\]")])
def test_forget_data_of_other_classes_than_named_are_refused(problem, labels, held):
    message = rf"the forget data hold classes {held}, forget_classes says \[1\]"
    with pytest.raises(ValueError, match=message):
        check(problem, forget=examples(labels), retain=examples([2]))


def test_retain_data_of_a_forgotten_class_are_refused(problem):
    message = r"the retain data still hold the forgotten classes \[1\]; take them out"
    with pytest.raises(ValueError, match=message):
        check(problem, retain=examples([0, 1, 2]))


@pytest.mark.parametrize("where", ["forget", "retain"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_inputs_that_are_not_finite_are_refused(problem, where, bad):
    batches = getattr(problem, where)
    rows = np.array(batches.inputs)
    rows[2, 4] = bad
    message = f"NaN or inf in the {where} inputs; remove or repair these examples"
    with pytest.raises(ValueError, match=message):
        check(problem, **{where: examples(batches.labels.tolist(), rows)})


def test_weights_that_are_not_finite_are_refused_with_their_path(problem):
    kernel = problem.variables["params"]["head"]["kernel"].at[0, 0].set(jnp.nan)
    params = {**problem.variables["params"], "head": {"kernel": kernel, "bias": jnp.zeros(3)}}
    message = r"NaN or inf in variables\['params'\]\['head'\]\['kernel'\]; .* did not diverge"
    with pytest.raises(ValueError, match=message):
        check(problem, variables={"params": params})


def test_inputs_that_the_model_cannot_read_are_refused(problem):
    message = r"the model does not accept forget inputs of shape \(2, 4\) and dtype float32: .*"
    with pytest.raises(ValueError, match=message):
        check(problem, forget=examples([1, 1], np.ones((2, 4), np.float32)))
    message = r"the model does not accept forget inputs of shape \(2, 5\) and dtype uint8: .*"
    with pytest.raises(ValueError, match=message):
        check(problem, forget=examples([1, 1], np.ones((2, 5), np.uint8)))


def test_another_number_of_logits_is_refused(problem):
    message = r"the model returns \(2, 3\) for a batch; wanted logits \(2, 4\)"
    with pytest.raises(ValueError, match=message):
        check(problem, num_classes=4)
