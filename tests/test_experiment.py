"""A run's numbers are those of the models on disk; every stage is done once, for one problem."""

import dataclasses
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from sklearn.datasets import load_digits

from jaxunlearn import experiment, preparation, training
from jaxunlearn.assessment import retain_sample
from jaxunlearn.config import config_from_mapping
from jaxunlearn.evaluate_config import EvaluateConfig
from jaxunlearn.experiment import run
from jaxunlearn.methods import METHODS, Method, Unlearned
from jaxunlearn.preparation import prepare
from jaxunlearn.report import report_figures

SPLITS = ("forget_train", "retain_train", "forget_test", "retain_test")
MODELS = ("original", "retrained", "unlearned")
CLASSES = 3


def toy_config(folder, *overrides, **sections):
    """A run of a second or two: two layers on three well separated classes of 2 x 2 images."""
    tables = {
        "data": {"source": f"npz:{folder / 'toy.npz'}", "forget": 1},
        "model": {"features": [4]},
        "train": {"epochs": 4, "batch_size": 16, "learning_rate": 0.2},
        "unlearn": {"epochs": 2, "learning_rate": 0.3, "batch_size": 16},
    }
    return config_from_mapping(tables | sections, [f'out="{folder / "run"}"', *overrides])


def save_toy(folder, seed=0):
    rng = np.random.default_rng(seed)

    def part(n):
        labels = np.arange(n) % CLASSES
        images = np.eye(4)[labels].reshape(n, 2, 2, 1) * 150 + rng.integers(0, 100, (n, 2, 2, 1))
        return images.astype(np.uint8), labels

    (x, y), (x_test, y_test) = part(48), part(24)
    np.savez(folder / "toy.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Folder of the toy data and of one finished run on them, which no test may change."""
    folder = tmp_path_factory.mktemp("toy")
    save_toy(folder)
    run(toy_config(folder))
    return folder


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Pages without pictures, which are tested elsewhere; ``toy``, made before, has them."""
    monkeypatch.setattr("jaxunlearn.report.files.report_figures", lambda *_: {})


@pytest.fixture
def copy(toy, tmp_path):
    """A copy of the data and of the finished run."""
    shutil.copytree(toy, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / "identity.json").write_text(
        (tmp_path / "run" / "identity.json").read_text().replace(str(toy), str(tmp_path))
    )
    return tmp_path


@pytest.fixture
def given(toy, tmp_path):
    """The toy problem with both models given: nothing to train."""
    shutil.copy(toy / "toy.npz", tmp_path)
    checkpoints = toy / "run" / "checkpoints"
    return [
        f"train.checkpoint={checkpoints / 'original'}",
        f"retrain.checkpoint={checkpoints / 'retrained'}",
    ]


def report_of(folder):
    return json.loads((folder / "run" / "report.json").read_text())


def variables_of(folder, name):
    """Without this library."""
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / "run" / "checkpoints" / name)
    return jax.tree.map(np.asarray, restored)


def assert_same_models(one, other, names=MODELS):
    for name in names:
        jax.tree.map(
            np.testing.assert_array_equal, variables_of(one, name), variables_of(other, name)
        )


def no_training(monkeypatch):
    monkeypatch.setattr(experiment, "fit", lambda *_, **__: pytest.fail("trained"))


def identity_method(key, problem, config):
    """An unlearning method that does nothing and tells nothing."""
    return Unlearned(problem.variables, {})


@pytest.fixture
def keep(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class NoConfig:
        pass

    method = Method("keep", identity_method, NoConfig, frozenset(), frozenset({"class"}), "")
    monkeypatch.setitem(METHODS, "keep", method)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "environment.json", "identity.json", "arrays.npz"),
        *("report.json", "report.md", "report.html"),
        *(f"checkpoints/{model}/_METADATA" for model in MODELS),
        *(f"stages/{model}.json" for model in MODELS),
    ],
)
def test_a_run_leaves_its_whole_story_in_its_folder(toy, name):
    assert (toy / "run" / name).is_file()


def test_the_report_has_every_number_of_the_schema(toy):
    report = report_of(toy)
    assert report["schema_version"] == 1
    assert set(report["models"]) == {*MODELS, "head_edit"}
    for model in report["models"].values():
        assert set(model["accuracy"]) == set(model["accuracy_macro"]) == set(SPLITS)
        assert all(0 <= model["accuracy"][split] <= 1 for split in SPLITS)
        assert 0 <= model["mia"] <= 1
    assert set(report["gap_to_retrain"]) == {"original", "unlearned", "head_edit"}
    assert report["seconds"].keys() == {"train", "retrain", "unlearn", "evaluate"}
    assert all(seconds > 0 for seconds in report["seconds"].values())
    assert all(memory > 0 for memory in report["peak_memory_mb"].values())
    assert report["environment"]["seed"] == report["config"]["seed"] == 0
    assert report["method"]["config"]["learning_rate"] == 0.3
    assert report["notes"] == []
    assert json.loads((toy / "run" / "config.json").read_text()) == report["config"]
    assert json.loads((toy / "run" / "environment.json").read_text()) == report["environment"]


@pytest.mark.parametrize("name", MODELS)
def test_reported_accuracies_are_those_of_the_saved_models(toy, name):
    params = variables_of(toy, name)["params"]
    with np.load(toy / "toy.npz") as data:
        data = dict(data)
    x_train = data["x_train"] / 255
    mean, std = x_train.mean(), x_train.std()
    for side in ("train", "test"):
        z = ((data[f"x_{side}"] / 255 - mean) / std).reshape(-1, 4)
        z = np.maximum(z @ params["dense1"]["kernel"] + params["dense1"]["bias"], 0)
        predicted = (z @ params["head"]["kernel"] + params["head"]["bias"]).argmax(1)
        labels = data[f"y_{side}"]
        for part, rows in (("forget", labels == 1), ("retain", labels != 1)):
            right = (predicted == labels)[rows]
            model = report_of(toy)["models"][name]
            assert model["accuracy"][f"{part}_{side}"] == pytest.approx(right.mean())
            counts = {"correct": right.sum(), "total": rows.sum()}
            assert model["counts"][f"{part}_{side}"] == counts


def test_gaps_are_differences_to_the_retrained_model(toy):
    report = report_of(toy)
    ours, target = (report["models"][m]["accuracy"] for m in ("unlearned", "retrained"))
    for split in SPLITS:
        assert report["gap_to_retrain"]["unlearned"][split] == ours[split] - target[split]


def test_the_retrained_model_never_saw_the_forget_class(toy):
    report = report_of(toy)
    assert report["models"]["original"]["accuracy"]["forget_train"] > 0.9
    assert report["models"]["retrained"]["accuracy"]["forget_train"] == 0
    assert report["models"]["retrained"]["accuracy"]["retain_train"] > 0.9


def test_the_same_config_gives_the_same_bits_and_numbers(toy, tmp_path):
    save_toy(tmp_path)
    run(toy_config(tmp_path))
    assert_same_models(toy, tmp_path)
    one, other = report_of(toy), report_of(tmp_path)
    for part in ("models", "gap_to_retrain", "pseudo_labels", "method"):
        assert one[part] == other[part]
    with np.load(toy / "run/arrays.npz") as a, np.load(tmp_path / "run/arrays.npz") as b:
        assert a.files == b.files
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])


def test_another_seed_gives_another_model(toy, given, tmp_path):
    run(toy_config(tmp_path, "seed=1", "retrain.enabled=false"), until="train")
    kernels = [variables_of(f, "original")["params"]["head"]["kernel"] for f in (toy, tmp_path)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3


def test_stages_that_are_done_are_not_done_again(copy, monkeypatch):
    before = report_of(copy)
    no_training(monkeypatch)
    method = METHODS["unsc"]._replace(run=lambda *_: pytest.fail("unlearned"))
    monkeypatch.setitem(METHODS, "unsc", method)
    report = run(toy_config(copy))
    assert report["models"] == before["models"]
    for stage in ("train", "retrain", "unlearn"):
        assert report["seconds"][stage] == before["seconds"][stage]


def test_a_run_stops_after_the_stage_that_was_asked_for_and_goes_on_from_there(
    toy, given, tmp_path, monkeypatch
):
    config = toy_config(tmp_path, *given)
    stages = tmp_path / "run" / "stages"
    assert run(config, until="train") is None
    assert {path.stem for path in stages.iterdir()} == {"original", "retrained"}
    assert run(config, until="unlearn") is None
    assert {path.stem for path in stages.iterdir()} == set(MODELS)
    assert not (tmp_path / "run" / "report.json").exists()


def test_given_models_lead_to_the_same_unlearned_model_without_training(
    toy, given, tmp_path, monkeypatch
):
    no_training(monkeypatch)
    report = run(toy_config(tmp_path, *given))
    assert_same_models(toy, tmp_path)
    assert report["models"] == report_of(toy)["models"]
    # Their cost is unknown, so the table has no ratio of it.
    assert report["seconds"]["train"] is None
    assert report["seconds"]["retrain"] is None
    assert report["training"]["original"] == {"given": str(toy / "run/checkpoints/original")}
    assert "| seconds | — | — |" in (tmp_path / "run" / "report.md").read_text()


def test_without_retraining_its_numbers_are_null_and_the_report_says_so(given, tmp_path):
    report = run(toy_config(tmp_path, given[0], "retrain.enabled=false"))
    assert report["models"]["retrained"] is None
    assert report["gap_to_retrain"] is None
    assert report["pseudo_labels"]["retrained_histogram"] is None
    assert report["pseudo_labels"]["agreement"] is None
    assert "retrain" not in report["seconds"]
    (note,) = report["notes"]
    assert note.startswith("No retrained model: retraining was switched off")
    for page in ("report.md", "report.html"):
        assert "No retrained model" in (tmp_path / "run" / page).read_text()


def test_a_reference_of_another_recipe_is_pointed_out(given, tmp_path, keep):
    report = run(toy_config(tmp_path, given[0], unlearn={"method": "keep"}))
    assert (
        "The original model was given, the retrained model was trained here" in report["notes"][0]
    )


def test_retain_accuracy_of_a_large_set_is_that_of_a_fixed_sample(
    given, tmp_path, monkeypatch, keep
):
    monkeypatch.setattr("jaxunlearn.assessment._LARGE", 40)
    monkeypatch.setattr("jaxunlearn.assessment._SAMPLE", 10)
    report = run(toy_config(tmp_path, *given, unlearn={"method": "keep"}))
    assert report["problem"]["counts"]["retain_sample"] == 10
    assert report["models"]["original"]["counts"]["retain_train"]["total"] == 10
    assert report["models"]["original"]["counts"]["forget_train"]["total"] == 16
    assert "fixed random sample of 10 of 32 images" in report["notes"][-1]


def test_the_sample_is_decided_by_size_and_seed(toy):
    splits = prepare(toy_config(toy)).splits
    sizes = {None: 32, 7: 7, 31: 31, 32: 32, 99: 32}
    for size, wanted in sizes.items():
        sample = retain_sample(splits, EvaluateConfig(retain_sample=size), 0)
        assert len(set(sample.tolist())) == len(sample) == wanted
        assert np.isin(sample, splits.retain).all()
        assert (np.diff(sample) > 0).all()
    a, b, c = (retain_sample(splits, EvaluateConfig(retain_sample=7), seed) for seed in (0, 0, 1))
    assert (a == b).all()
    assert (a != c).any()


def test_samples_are_forgotten_and_shown(given, tmp_path):
    ids = [0, 4, 5, 17]
    report = run(
        toy_config(
            tmp_path, given[0], "retrain.enabled=false", "data.scope=samples", f"data.forget={ids}"
        )
    )
    assert report["problem"]["counts"]["forget_train"] == 4
    assert report["models"]["unlearned"]["accuracy"]["forget_test"] is None
    with np.load(tmp_path / "run" / "arrays.npz") as arrays, np.load(tmp_path / "toy.npz") as data:
        forget, labels = arrays["embedding_forget"], arrays["embedding_labels"]
        assert forget.dtype == bool
        np.testing.assert_array_equal(labels[forget], data["y_train"][ids])
        np.testing.assert_array_equal(labels[~forget], data["y_test"])
        assert arrays["embedding_unlearned"].shape == (28, 2)
        figure = report_figures(report, arrays)["Embedding"]
    assert "forget example" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_test_examples_of_forgotten_classes_are_shown(toy):
    with np.load(toy / "run" / "arrays.npz") as arrays:
        np.testing.assert_array_equal(arrays["embedding_forget"], arrays["embedding_labels"] == 1)


def test_a_method_without_pseudo_labels_has_none_in_its_report(given, tmp_path, keep):
    report = run(toy_config(tmp_path, *given, unlearn={"method": "keep"}))
    assert report["pseudo_labels"] is None
    assert report["method"] == {"name": "keep", "config": {}, "info": {}}
    assert report["models"]["unlearned"] == report["models"]["original"]


class ConvOnly(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(CLASSES, (2, 2), padding="VALID")(x).reshape(len(x), CLASSES)


def test_a_model_without_features_is_reported_without_their_picture(toy, tmp_path, keep):
    shutil.copy(toy / "toy.npz", tmp_path)
    model, method = {"factory": f"{__name__}:ConvOnly"}, {"method": "keep"}
    report = run(toy_config(tmp_path, "retrain.enabled=false", model=model, unlearn=method))
    assert "There are no features to judge: no dense layer" in report["notes"][-1]


def test_training_that_is_killed_ends_with_the_same_bits_and_all_its_seconds(
    toy, tmp_path, monkeypatch
):
    save_toy(tmp_path)
    every_epoch = lambda *args, **options: training.fit(*args, **options, save_every=0.0)  # noqa: E731
    monkeypatch.setattr(experiment, "fit", every_epoch)
    epochs, save_state = [], training.save_state

    def killed(folder, step, state):
        save_state(folder, step, state)
        epochs.append(step)
        if epochs == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run(toy_config(tmp_path), until="train")
    assert run(toy_config(tmp_path), until="train") is None
    assert epochs == [1, 2, 3, 4, 1, 2, 3, 4]
    assert_same_models(toy, tmp_path, ("original", "retrained"))
    record = json.loads((tmp_path / "run/stages/original.json").read_text())
    assert len(record["history"]) == 4
    assert record["seconds"] >= sum(epoch["seconds"] for epoch in record["history"])
    assert not list((tmp_path / "run" / "states").iterdir())


def test_a_training_that_diverges_leaves_a_folder_that_takes_a_better_config(tmp_path):
    save_toy(tmp_path)
    bad = toy_config(tmp_path, "train.learning_rate=1e30", "retrain.enabled=false")
    with pytest.raises((FloatingPointError, ValueError), match=r"learning_rate|NaN or inf"):
        run(bad, until="train")
    assert not list((tmp_path / "run" / "stages").iterdir())
    assert run(toy_config(tmp_path, "retrain.enabled=false"), until="train") is None


def test_data_that_changed_in_their_place_are_refused(copy, monkeypatch):
    no_training(monkeypatch)
    save_toy(copy, seed=1)
    with pytest.raises(ValueError, match=r"another configuration \(content\.data was '\w+', now"):
        run(toy_config(copy))


def test_a_given_checkpoint_that_changed_in_its_place_is_refused(toy, given, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(toy / "run/checkpoints/original", own)
    config = toy_config(tmp_path, given[1], f"train.checkpoint={own}")
    run(config, until="train")
    shutil.rmtree(own)
    shutil.copytree(toy / "run/checkpoints/unlearned", own)
    with pytest.raises(ValueError, match=r"content\.original model was '\w+', now"):
        run(config)


def test_data_may_move_and_evaluation_may_change_within_a_run(copy, monkeypatch):
    no_training(monkeypatch)
    (copy / "elsewhere").mkdir()
    config = toy_config(copy, "evaluate.members=random", f"data.data_dir={copy / 'elsewhere'}")
    assert run(config)["config"]["evaluate"]["members"] == "random"
    with pytest.raises(ValueError, match=r"\(unlearn\.epochs was 2, now 3\)"):
        run(toy_config(copy, "unlearn.epochs=3"))


@pytest.mark.slow
def test_a_run_on_several_devices_gives_the_numbers_of_one(toy, tmp_path):
    save_toy(tmp_path)
    report, single = run(toy_config(tmp_path, "devices=3")), report_of(toy)
    for name in MODELS:
        assert report["models"][name]["counts"] == single["models"][name]["counts"]
        assert report["models"][name]["mia"] == pytest.approx(single["models"][name]["mia"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
            variables_of(tmp_path, name),
            variables_of(toy, name),
        )
    losses = [r["method"]["info"]["losses"] for r in (report, single)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert report["config"]["devices"] == 3
    assert report["environment"]["devices"] == ["cpu"] * 3
    assert single["environment"]["devices"] == ["cpu"]


def test_the_number_of_devices_may_change_within_a_run_and_the_report_says_so(copy, monkeypatch):
    no_training(monkeypatch)
    report = run(toy_config(copy, "devices=2"))
    assert report["models"] == report_of(copy)["models"]
    (note,) = report["notes"]
    assert "Done earlier in another environment than this report's: train, retrain, unlearn" in note
    assert "(different: devices" in note


def test_another_unlearning_of_the_same_models_needs_only_that_stage_again(copy, monkeypatch):
    no_training(monkeypatch)
    before = report_of(copy)["models"]
    (copy / "run" / "stages" / "unlearned.json").unlink()
    report = run(toy_config(copy, "unlearn.epochs=1"))
    assert len(report["method"]["info"]["losses"]) == 1
    assert report["config"]["unlearn"]["epochs"] == 1
    assert report["models"]["original"] == before["original"]
    assert report["models"]["retrained"] == before["retrained"]


def test_a_reference_may_come_later(given, tmp_path):
    without = toy_config(tmp_path, given[0], "retrain.enabled=false")
    assert run(without)["models"]["retrained"] is None
    assert run(toy_config(tmp_path, *given))["models"]["retrained"] is not None
    assert run(without)["gap_to_retrain"] is None


def test_stages_of_another_environment_are_pointed_out(copy, monkeypatch):
    environment = experiment.describe_environment(1) | {"backend": "gpu", "cpu_count": 1024}
    monkeypatch.setattr(experiment, "describe_environment", lambda devices: environment)
    report = run(toy_config(copy))
    assert report["environment"] == environment | {"seed": 0}
    (note,) = report["notes"]
    assert "another environment than this report's: train, retrain, unlearn" in note
    assert "(different: backend, cpu_count; see stages/)" in note


def test_validation_data_of_forgotten_classes_do_not_validate_the_retrained_model(
    tmp_path, monkeypatch
):
    save_toy(tmp_path)
    seen = {}

    def fit(key, apply_fn, variables, batches, *, validation, state_dir, **options):
        seen[state_dir.name] = batches, validation
        return training.Fitted(variables, [])

    monkeypatch.setattr(experiment, "fit", fit)
    run(toy_config(tmp_path, "data.validation=0.25", "train.patience=1"), until="train")
    assert {name: batches.num_examples for name, (batches, _) in seen.items()} == {
        "original": 36,
        "retrained": 24,
    }
    assert seen["original"][1].num_examples == 12
    assert seen["retrained"][1].num_examples == 8
    assert 1 not in np.asarray(seen["retrained"][1].labels)


def test_patience_without_validation_data_for_the_retrained_model_is_refused(tmp_path):
    save_toy(tmp_path)
    with np.load(tmp_path / "toy.npz") as data:
        data = dict(data)
    order = np.argsort(data["y_train"] == 1, kind="stable")  # the forget class comes last
    data |= {name: data[name][order] for name in ("x_train", "y_train")}
    np.savez(tmp_path / "toy.npz", **data)
    config = toy_config(tmp_path, "data.validation=0.1", "train.patience=2")
    with pytest.raises(ValueError, match="all validation data are of the forgotten classes"):
        prepare(config)


class OddDropout(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.5, deterministic=not train, rng_collection="noise")(x)
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


def test_a_model_that_cannot_be_trained_is_refused_only_where_it_is_to_be_trained(tmp_path):
    save_toy(tmp_path)
    config = toy_config(tmp_path, model={"factory": f"{__name__}:OddDropout"})
    with pytest.raises(ValueError, match=r"OddDropout cannot be trained: .*\"noise\""):
        prepare(config)
    prepared = prepare(toy_config(tmp_path))
    assert prepared.given == {"original": None, "retrained": None}


def test_the_digits_are_those_of_scikit_learn():
    prepared = prepare(config_from_mapping({"data": {"forget": 3}}))
    counts = np.bincount(load_digits().target)
    train, test = prepared.source.train.labels, prepared.source.test.labels
    np.testing.assert_array_equal(np.bincount(train) + np.bincount(test), counts)
    assert jnp.asarray(prepared.splits.forget).size == (train == 3).sum()


def test_prepared_data_are_found_by_flag_then_variable_then_reference_folder(tmp_path, monkeypatch):
    save_toy(tmp_path)
    seen, load_source = [], preparation.load_source

    def load(name, *, data_dir, split_seed):
        seen.append(data_dir)
        return load_source(name, data_dir=data_dir, split_seed=split_seed)

    monkeypatch.setattr(preparation, "load_source", load)
    reference = tmp_path / "reference"
    (reference / "data" / "tfds").mkdir(parents=True)
    monkeypatch.setenv("JAXUNLEARN_DATA", str(reference))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    prepare(toy_config(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", "/named/by/the/variable")
    prepare(toy_config(tmp_path))
    prepare(toy_config(tmp_path, f"data.data_dir={tmp_path}"))
    assert seen == [str(reference / "data" / "tfds"), None, str(tmp_path)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "deep_unlearning", "layer_filter": ["stem"]}, "no layer matches"),
        ({"method": "deep_unlearning", "augment_samples": True}, "has no augmentation"),
        ({"method": "unsc", "builder": "gpm", "energy": [0.9, 0.9]}, "2 entries for 10 classes"),
        ({"method": "unsc", "dropout": True}, "nn.Dropout"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_anything_is_trained(
    settings, message
):
    config = config_from_mapping({"data": {"forget": 3}, "unlearn": settings})
    with pytest.raises(ValueError, match=f"unlearn: .*{message}"):
        prepare(config)
