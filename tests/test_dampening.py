"""Dampening: the published numbers, the bound on alpha, and what is left as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.methods import DampeningConfig, UnlearningProblem, dampening
from jaxunlearn.methods.dampening import _dampen
from jaxunlearn.methods.per_example import ExampleLoss, label_loss, mean_magnitude
from jaxunlearn.models import read_arrays

KEY = jax.random.key(0)
N, K = 12, 3


def linear(variables, inputs):
    return inputs @ variables["params"]["kernel"]


def problem_of(kernel, forget, retain, size=4):
    return UnlearningProblem(
        linear, {"params": {"kernel": kernel}}, Batches(*forget, size), Batches(*retain, size), K
    )


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(N, 5)).astype(np.float32), np.arange(N) % K
    kernel = jnp.asarray(rng.normal(size=(5, K)), jnp.float32)
    return problem_of(kernel, (x[:4], labels[:4]), (x[4:], labels[4:]))


def dampened(problem, **settings):
    found = dampening(KEY, problem, DampeningConfig(**({"batch_size": 4} | settings)))
    return np.asarray(found.variables["params"]["kernel"]), found.info


EXACT = {"importance": "per_sample", "alpha": 1.0}


# --- the published code ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(golden):
    return read_arrays(golden / "ssd.npz")


def of_torch(stored, prefix):
    """Two dense layers, as a tree of kernels ``[in, out]`` and biases."""
    tree = {}
    for layer in ("fc1", "fc2"):
        kernel, bias = (stored[f"{prefix}{layer}.{part}"] for part in ("weight", "bias"))
        tree[layer] = {"kernel": jnp.asarray(kernel.T), "bias": jnp.asarray(bias)}
    return tree


def network(variables, inputs):
    p = variables["params"]
    hidden = jnp.tanh(inputs @ p["fc1"]["kernel"] + p["fc1"]["bias"][None])
    return hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"][None]


def published(stored):
    """Its data: seven batches to retain, the last of two rows, and three to forget."""

    def batches(which):
        parts = [[stored[f"{name}__b{i}"] for i in which] for name in "xy"]
        return Batches(*map(np.concatenate, parts), 8)

    forget = stored["forget_batches"].tolist()
    retain = [i for i in range(10) if i not in forget]
    variables = {"params": of_torch(stored, "param__")}
    return UnlearningProblem(network, variables, batches(forget), batches(retain), 4)


def assert_trees(found, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def test_importances_are_those_of_the_published_code(stored):
    problem = published(stored)
    loss = ExampleLoss(network, label_loss)
    found = mean_magnitude(loss, problem.variables, problem.forget, per_sample=False)
    assert_trees(found, of_torch(stored, "importance__forget__"), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("alpha", "strength"), [("1", "1"), ("1.5", "1"), ("2", "0.3")])
def test_weights_are_those_of_the_published_code(stored, alpha, strength):
    config = DampeningConfig(
        alpha=float(alpha), dampening=float(strength), batch_size=8, order="stored"
    )
    found = dampening(KEY, published(stored), config)
    assert_trees(
        found.variables["params"], of_torch(stored, f"new__a{alpha}__l{strength}__"), atol=1e-6
    )
    share = {"1": 0.62, "1.5": 0.40, "2": 0.23}[alpha]
    assert found.info["selected_share"] == pytest.approx(share, abs=0.01)


def test_given_importances_dampen_as_in_the_published_code(stored):
    trees = (of_torch(stored, f"{name}__") for name in ("param", "given_forget", "given_full"))
    assert_trees(_dampen(*trees, 1.0, 1.0)[0], of_torch(stored, "given_new__"), atol=1e-6)


# --- properties -----------------------------------------------------------------------------------


def test_a_hand_example():
    """One weight per input: input 0 is of the forget data alone, 1 of both, 2 of others alone."""
    x, zeros = np.eye(3, dtype=np.float32), np.array([0, 0])
    kernel = jnp.asarray(np.tile([[2.0, 0, 0]], (3, 1)), jnp.float32)
    problem = problem_of(kernel, (x[[0, 1]], zeros), (x[[1, 2]], zeros))
    found, info = dampened(problem, importance="per_sample", alpha=1.5, dampening=0.8)
    # Of four examples two are to be forgotten: I_D / I_f is 1/2 for input 0 and 1 for input 1.
    np.testing.assert_allclose(found[:, 0], [0.8 * 0.5 * 2, 2, 2], rtol=1e-6)
    assert info["selected_share"] == pytest.approx(1 / 3)
    assert (info["steps"], info["forget_passes"], info["retain_passes"]) == (0, 1, 1)


@pytest.mark.parametrize("importance", ["batch", "per_sample"])
@pytest.mark.parametrize("label_free", [False, True])
def test_no_weight_grows_or_changes_its_sign(problem, importance, label_free):
    kernel = np.asarray(problem.variables["params"]["kernel"])
    settings = {"importance": importance, "label_free": label_free, "alpha": 0.9}
    found, info = dampened(problem, **settings)
    assert 0 < info["selected_share"] < 1
    assert (np.sign(found) == np.sign(kernel)).all()
    assert (np.abs(found) <= np.abs(kernel)).all()
    changed = found != kernel
    assert 0 < changed.mean() <= info["selected_share"]
    np.testing.assert_array_equal(dampened(problem, **settings, dampening=1e9)[0], kernel)


def test_forget_data_that_are_like_all_data_select_nothing_and_a_note_says_so(problem):
    same = dataclasses.replace(problem, retain=problem.forget)
    found, info = dampened(same, **EXACT | {"alpha": 1.01})
    np.testing.assert_array_equal(found, problem.variables["params"]["kernel"])
    assert info["selected_share"] == 0
    assert info["notes"] == ["alpha = 1.01 selects no weight: the model is unchanged."]


def test_label_free_importance_reads_no_label(problem):
    wrong = Batches(problem.forget.inputs, (problem.forget.labels + 1) % K, 4)
    other = dataclasses.replace(problem, forget=wrong)
    free = EXACT | {"label_free": True}
    np.testing.assert_array_equal(dampened(other, **free)[0], dampened(problem, **free)[0])
    assert (dampened(other, **EXACT)[0] != dampened(problem, **EXACT)[0]).any()


def test_label_free_importance_is_the_mean_size_of_the_gradient_of_the_squared_logits(problem):
    x, W = np.asarray(problem.forget.inputs), np.asarray(problem.variables["params"]["kernel"])
    both = np.concatenate([x, problem.retain.inputs])
    of_forget, of_all = (np.abs(2 * z[:, :, None] * (z @ W)[:, None]).mean(0) for z in (x, both))
    expected = np.where(of_forget > of_all, of_all / of_forget, 1) * W
    np.testing.assert_allclose(dampened(problem, **EXACT, label_free=True)[0], expected, rtol=1e-5)


def test_the_order_of_mixed_batches_is_the_keys(problem):
    config = DampeningConfig(alpha=1.0, batch_size=4)
    runs = [dampening(jax.random.key(seed), problem, config) for seed in (0, 0, 1)]
    a, b, c = (run.variables["params"]["kernel"] for run in runs)
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert (runs[0].info["forget_passes"], runs[0].info["retain_passes"]) == (2, 1)


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"importance": "per_sample"}, {"order": "stored"}])
def test_an_alpha_that_can_select_nothing_is_refused(problem, settings):
    with pytest.raises(ValueError, match=r"alpha = 3.0 can select no weight.* alpha below 3, or"):
        dampened(problem, alpha=3.0, **settings)


def test_by_example_no_importance_is_above_the_bound_and_by_mixed_batches_some_is():
    """Two examples with opposite gradients: in one batch they cancel."""
    x, labels = np.eye(2, dtype=np.float32), np.array([0, 0])
    problem = problem_of(jnp.ones((2, K)), (x[:1], labels[:1]), (np.eye(2)[:1] * -1, labels[:1]))
    with pytest.raises(ValueError, match=r"alpha = 2.0 can select no weight"):
        dampened(problem, alpha=2.0, importance="per_sample")
    assert dampened(problem, alpha=1.99, importance="per_sample")[1]["selected_share"] == 0
    assert dampened(problem, alpha=100.0)[1]["selected_share"] == 0.5


def test_a_collapse_is_noted():
    """What two of three examples read is set to 0: they then get class 0, which is not theirs."""
    x, labels = np.eye(3, dtype=np.float32), np.array([1, 2, 0])
    kernel = jnp.asarray(5 * np.eye(3)[labels], jnp.float32)
    problem = problem_of(kernel, (x[:2], labels[:2]), (x, labels))
    info = dampened(problem, importance="per_sample", alpha=0.5, dampening=0.0)[1]
    assert info["retain_accuracy"] == pytest.approx([1, 1 / 3])
    (note,) = info["notes"]
    assert note.startswith(
        "The model collapsed: accuracy on the retain data fell from 1.000 to 0.333; raise"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, r"alpha = 0.0, .*: wanted above 0"),
        ({"dampening": -1.0}, r"dampening = -1.0, .* at least 0"),
        ({"batch_size": 0}, r"batch_size = 0: .* at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DampeningConfig(**settings)


@pytest.mark.parametrize(
    ("name", "choices"),
    [("importance", "'batch', 'per_sample'"), ("order", "'shuffled', 'stored'")],
)
def test_words_that_are_no_choice_are_refused(name, choices):
    config = DampeningConfig()
    object.__setattr__(config, name, "other")  # type checks would refuse it first
    with pytest.raises(ValueError, match=rf"{name} = 'other': write one of \({choices}\)"):
        config.__post_init__()
