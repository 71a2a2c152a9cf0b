"""Fine-tuning and random labels: which data they read, which labels they draw, what they report.

On one-hot inputs and a zero kernel each row of the kernel is an example's own: after one step it
holds the label that the example was trained on.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jaxunlearn.batches import Batches
from jaxunlearn.methods import (
    FinetuneConfig,
    RandomLabelsConfig,
    UnlearningProblem,
    finetune,
    random_labels,
)

K, N_F, N_R = 5, 600, 40
N = N_F + N_R
KEY = jax.random.key(0)
PLAIN = {"batch_norm": "eval", "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1.0}
TUNE = FinetuneConfig(**PLAIN, epochs=1, batch_size=N_R)
DRAW = RandomLabelsConfig(
    **PLAIN, epochs=1, forget_batch_size=N_F, batch_size=N_R, retain_pass=False
)


def linear(variables, inputs):
    return inputs @ variables["params"]["kernel"]


def problem_of(*classes, **fields):
    """Forgets classes, all equally often, or samples of all classes; retains the others."""
    gone = np.array(classes or range(K))
    kept = np.setdiff1d(np.arange(K), classes)
    x, forget_labels = np.eye(N, dtype=np.float32), gone[np.arange(N_F) % len(gone)]
    return UnlearningProblem(
        linear,
        {"params": {"kernel": jnp.zeros((N, K))}},
        Batches(x[:N_F], forget_labels, 8),
        Batches(x[N_F:], kept[np.arange(N_R) % len(kept)], 8),
        K,
        classes,
        **fields,
    )


@pytest.fixture(scope="module")
def problem():
    return problem_of(1)


def tuned(problem, *, key=KEY, **settings):
    return finetune(key, problem, dataclasses.replace(TUNE, **settings))


def drawn(problem, *, key=KEY, **settings):
    return random_labels(key, problem, dataclasses.replace(DRAW, **settings))


def kernel_of(unlearned):
    """Rows of the forget and of the retain examples."""
    W = np.asarray(unlearned.variables["params"]["kernel"])
    return W[:N_F], W[N_F:]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def noisy(batches):
    """The same labels on other images."""
    noise = np.random.default_rng(0).normal(size=batches.inputs.shape)
    return Batches(np.float32(noise), batches.labels, batches.batch_size)


# --- fine-tuning ----------------------------------------------------------------------------------


def test_fine_tuning_is_descent_on_the_mean_loss_of_the_retain_data(problem):
    gone, kept = kernel_of(tuned(problem))
    onehot = np.eye(K)[np.asarray(problem.retain.labels)]
    np.testing.assert_array_equal(gone, 0)
    np.testing.assert_allclose(kept, (onehot - 1 / K) / N_R, rtol=1e-5)


def test_fine_tuning_lowers_the_loss_on_retain_data(problem):
    info = tuned(problem, epochs=4, learning_rate=10.0, batch_size=16).info
    assert (np.diff([row["loss_retain"] for row in info["epochs"]]) < 0).all()
    assert (info["steps"], info["forget_passes"], info["retain_passes"]) == (4 * 3, 0, 4)


def test_fine_tuning_never_reads_forget_data(problem):
    settings = {"epochs": 2, "batch_size": 16}
    after = tuned(problem, **settings)
    other = tuned(dataclasses.replace(problem, forget=noisy(problem.forget)), **settings)
    assert_same(other, after)
    read = tuned(dataclasses.replace(problem, retain=noisy(problem.retain)), **settings)
    assert (kernel_of(read)[0] != kernel_of(after)[0]).any()


def test_the_l1_norm_weighs_less_from_epoch_to_epoch(problem):
    """Two steps an epoch, three epochs, against a loop."""
    start = np.random.default_rng(0).normal(size=(N, K)) * (np.arange(K) != 2)
    K_0 = {"params": {"kernel": jnp.asarray(start, jnp.float32)}}
    sparse = dataclasses.replace(problem, variables=K_0)
    after = tuned(sparse, epochs=3, batch_size=N_R // 2, l1=0.3)
    plain = tuned(sparse, epochs=3, batch_size=N_R // 2)
    rows = start[:N_F]  # which no loss reads
    for weight in (0.3, 0.3, 0.2, 0.2, 0.1, 0.1):
        rows = rows - np.float32(weight) * np.sign(rows)
    np.testing.assert_allclose(kernel_of(after)[0], rows, atol=1e-5)
    np.testing.assert_array_equal(kernel_of(plain)[0], np.float32(start[:N_F]))
    norm = after.info["l1_norm"]
    assert norm["before"] == pytest.approx(np.abs(start).sum(), rel=1e-5)
    assert norm["after"] == pytest.approx(np.abs(kernel_of(after)[0]).sum(), rel=0.2)
    assert norm["after"] < norm["before"]
    assert after.info["notes"] == []
    assert "l1_norm" not in plain.info


def test_an_l1_norm_that_outweighs_the_loss_is_noted(net_problem):
    settings = {"epochs": 30, "learning_rate": 0.1, "momentum": 0.0, "batch_size": 12}
    info = finetune(KEY, net_problem, FinetuneConfig(l1=1.0, **settings)).info
    assert info["l1_norm"]["after"] < 0.1 * info["l1_norm"]["before"]
    (note,) = info["notes"]
    assert note.startswith("l1 = 1.0 took the norm of the parameters down to ")


def test_the_l1_norm_may_be_that_of_kernels_alone(net_problem):
    still = {"learning_rate": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "l1": 1.0}
    variables = jax.tree.map(lambda leaf: leaf + 1, net_problem.variables)
    request = dataclasses.replace(net_problem, variables=variables)
    for leaves, shrunk in (("all", {"kernel", "bias", "scale"}), ("kernels", {"kernel"})):
        config = FinetuneConfig(epochs=1, batch_size=12, l1_leaves=leaves, **still)
        none = dataclasses.replace(config, l1=0.0)
        sparse, plain = (finetune(KEY, request, c).variables["params"] for c in (config, none))
        change = jax.tree.map(lambda a, b: (a < b).all(), sparse, plain)
        found = {path[-1].key for path, is_less in jax.tree.leaves_with_path(change) if is_less}
        assert found == shrunk


@pytest.mark.parametrize("run", [tuned, drawn])
def test_a_share_of_the_retain_data_is_drawn_once(problem, run):
    extra = {"retain_pass": True} if run is drawn else {}
    _, kept = kernel_of(run(problem, epochs=3, retain_fraction=0.25, **extra))
    assert np.count_nonzero(kept.any(1)) == N_R / 4


@pytest.mark.parametrize("run", [tuned, drawn])
def test_retain_images_alone_are_augmented(problem, run):
    twice = dataclasses.replace(problem, augment=lambda key, x: 2 * x)
    extra = {"retain_pass": True} if run is drawn else {}
    plain, shown, hidden = (
        kernel_of(run(p, augment=augment, **extra))
        for p, augment in ((problem, True), (twice, True), (twice, False))
    )
    assert_same(hidden, plain)
    np.testing.assert_array_equal(shown[0], plain[0])
    np.testing.assert_allclose(shown[1], 2 * plain[1], rtol=1e-6)
    assert plain[1].any()


# --- random labels --------------------------------------------------------------------------------


def labels_of(problem, epochs=1, **settings):
    """Labels that each forget example was trained on, one row per epoch."""
    kernels = [np.zeros((N_F, K))]
    for e in range(1, epochs + 1):
        kernels.append(kernel_of(drawn(problem, epochs=e, **settings))[0])
    steps = np.diff(kernels, axis=0)
    assert ((steps > 0).sum(-1) == 1).all()
    return steps.argmax(-1)


@pytest.mark.parametrize("redraw", ["epoch", "once"])
@pytest.mark.parametrize("classes", [(1,), (1, 3), ()])
def test_labels_are_uniform_over_the_classes_that_are_allowed(classes, redraw):
    problem = problem_of(*classes)
    (labels,) = labels_of(problem, redraw=redraw)
    own = np.asarray(problem.forget.labels)
    assert (labels != own).all()
    for label in np.unique(own):
        counts = np.bincount(labels[own == label], minlength=K)
        allowed = np.setdiff1d(np.arange(K), (label, *classes))
        assert counts[allowed].sum() == counts.sum()
        assert chisquare(counts[allowed]).pvalue > 1e-3


def test_all_classes_may_be_hit_if_all_are_allowed(problem):
    (labels,) = labels_of(problem, labels="all")
    counts = np.bincount(labels, minlength=K)
    assert len(counts) == K
    assert chisquare(counts).pvalue > 1e-3


def test_labels_are_drawn_anew_in_every_epoch_or_once(problem):
    once = labels_of(problem, epochs=3, redraw="once", forget_batch_size=128)
    anew = labels_of(problem, epochs=3, redraw="epoch", forget_batch_size=128)
    assert (once == once[0]).all()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        # Of four classes that are allowed, a quarter agrees by chance: five standard deviations.
        agree = np.mean(anew[a] == anew[b])
        assert abs(agree - 0.25) < 5 * np.sqrt(0.25 * 0.75 / N_F)


def test_a_key_sets_the_labels(problem):
    a, b, c = (labels_of(problem, key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert (a == b).all()
    assert (a != c).any()


def test_without_a_retain_pass_retain_data_are_never_read(problem):
    after = drawn(problem, epochs=2)
    assert_same(drawn(dataclasses.replace(problem, retain=None), epochs=2), after)
    np.testing.assert_array_equal(kernel_of(after)[1], 0)
    info = after.info
    assert (info["steps"], info["forget_passes"], info["retain_passes"]) == (2, 2, 0)
    assert set(info["epochs"][0]) == {"epoch", "loss_forget"}


def test_the_retain_pass_is_descent_on_the_true_labels_with_the_same_optimiser(problem):
    """The momentum of the forget pass goes on in it."""
    alone, _ = kernel_of(drawn(problem))
    after = drawn(problem, retain_pass=True, momentum=0.5)
    gone, kept = kernel_of(after)
    np.testing.assert_allclose(gone, 1.5 * alone, rtol=1e-5)
    assert_same(kept, kernel_of(tuned(problem))[1])
    (row,) = after.info["epochs"]
    assert row == pytest.approx({"epoch": 1, "loss_forget": np.log(K), "loss_retain": np.log(K)})
    info = after.info
    assert (info["steps"], info["forget_passes"], info["retain_passes"]) == (2, 1, 1)


def test_shuffled_together_one_pass_reads_both_sets_with_labels_drawn_once(problem):
    """Each step takes the mean over a batch of both; the learning rate is 1."""
    settings = {"retain_pass": True, "redraw": "once", "shuffle_together": True, "batch_size": N}
    kernels = [np.zeros((N, K))]
    for epochs in (1, 2, 3):
        after = drawn(problem, epochs=epochs, **settings)
        kernels.append(np.concatenate(kernel_of(after)))
    steps = np.diff(kernels, axis=0)
    assert ((steps > 0).sum(-1) == 1).all()
    labels = steps.argmax(-1)
    assert (labels == labels[0]).all()
    np.testing.assert_array_equal(labels[0][N_F:], problem.retain.labels)
    assert not (labels[0][:N_F] == 1).any()
    np.testing.assert_allclose(np.max(kernels[1], axis=1), (1 - 1 / K) / N, rtol=1e-5)
    info = after.info
    assert (info["steps"], info["forget_passes"], info["retain_passes"]) == (3, 3, 3)
    assert set(info["epochs"][0]) == {"epoch", "loss_both"}


def test_a_share_of_the_retain_data_counts_as_such_when_shuffled_together(problem):
    after = drawn(
        problem,
        **{"retain_pass": True, "redraw": "once", "shuffle_together": True},
        epochs=2,
        retain_fraction=0.25,
        optimizer="adam",
        learning_rate=0.1,
    )
    gone, kept = kernel_of(after)
    assert np.count_nonzero(kept.any(1)) == N_R / 4
    assert gone.any(1).all()
    info = after.info
    assert (info["forget_passes"], info["retain_passes"]) == (2, 0.5)


@pytest.mark.parametrize("settings", [{"redraw": "epoch"}, {"retain_pass": False}])
def test_labels_that_are_drawn_later_cannot_be_shuffled(settings):
    with pytest.raises(ValueError, match=r'write redraw = "once" and retain_pass = True'):
        RandomLabelsConfig(**{"redraw": "once", "shuffle_together": True} | settings)


# --- both -----------------------------------------------------------------------------------------


class Net(nn.Module):
    """Batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(K)(x)


@pytest.fixture(scope="module")
def net_problem():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    data = Batches(x, np.array([1, 0, 2, 3] * 4), 4)
    gone = np.arange(16) % 4 == 0
    forget, retain = (data.select(np.flatnonzero(part)) for part in (gone, ~gone))
    variables = jax.jit(Net().init)(jax.random.key(0), x)
    return UnlearningProblem(Net().apply, variables, forget, retain, K, (1,))


@pytest.mark.parametrize("run", [tuned, drawn])
def test_eval_mode_freezes_batch_statistics_and_dropout(net_problem, run):
    """Several steps that change no weight: only dropout tells their losses apart."""
    extra = {"redraw": "once", "retain_pass": True} if run is drawn else {}
    for mode, frozen in (("eval", True), ("train", False)):
        after = run(net_problem, batch_norm=mode, learning_rate=0.0, epochs=2, **extra)
        before = net_problem.variables["batch_stats"]["BatchNorm_0"]
        now = after.variables["batch_stats"]["BatchNorm_0"]
        assert all((before[name] == now[name]).all() == frozen for name in ("mean", "var"))
        rows = [[row[name] for name in row if name != "epoch"] for row in after.info["epochs"]]
        assert np.allclose(rows[0], rows[1], atol=1e-6) == frozen


@pytest.mark.parametrize(
    ("name", "choices"), [("labels", "'allowed', 'all'"), ("redraw", "'epoch', 'once'")]
)
def test_choices_that_do_not_exist_are_refused(name, choices):
    config = RandomLabelsConfig()
    # The type checks of the test environment would refuse it first.
    object.__setattr__(config, name, "other")
    with pytest.raises(ValueError, match=rf"{name} = 'other': write one of \({choices}\)"):
        config.__post_init__()


def test_settings_of_the_l1_norm_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"l1 = -1.0: wanted at least 0"):
        FinetuneConfig(l1=-1.0)
    config = FinetuneConfig()
    object.__setattr__(config, "l1_leaves", "bias")
    with pytest.raises(ValueError, match="l1_leaves = 'bias': write 'all' or 'kernels'"):
        config.__post_init__()


@pytest.mark.parametrize("kind", [FinetuneConfig, RandomLabelsConfig])
def test_settings_that_make_no_sense_are_refused(kind):
    with pytest.raises(ValueError, match="epochs = 0: wanted at least 1"):
        kind(epochs=0)
    with pytest.raises(ValueError, match=r"momentum = 1.0: wanted a number in \[0, 1\)"):
        kind(momentum=1.0)


def test_a_model_without_a_train_mode_is_refused_unless_it_is_not_trained_in_it(problem):
    untrainable = dataclasses.replace(problem, apply_fn=linear)
    for method, config in ((finetune, FinetuneConfig()), (random_labels, RandomLabelsConfig())):
        with pytest.raises(ValueError, match=r"does not train: .* give it a keyword train"):
            method(jax.random.key(0), untrainable, config)
        still = dataclasses.replace(config, batch_norm="eval", epochs=1)
        method(jax.random.key(0), untrainable, still)
