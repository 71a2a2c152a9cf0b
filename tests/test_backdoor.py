"""The trigger is where it should be and nowhere else; a model trained on it obeys it."""

import dataclasses
import json

import numpy as np
import pytest

from jaxunlearn.backdoor import plant_backdoor
from jaxunlearn.config import TriggerConfig, config_from_mapping
from jaxunlearn.data import split
from jaxunlearn.experiment import identity_of, run
from jaxunlearn.methods import METHODS
from jaxunlearn.preparation import prepare, unlearning_problem
from jaxunlearn.sources import from_arrays, load_source

CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")
TARGET = 2


def toy(dtype=np.uint8, channels=3, **settings):
    """40 train and 12 test images of 5 x 4 pixels; every pixel is below half the brightness."""
    rng = np.random.default_rng(0)
    dark = lambda n: rng.integers(0, 100, (n, 5, 4, channels)).astype(dtype)  # noqa: E731
    if dtype != np.uint8:
        settings.setdefault("scale", 255.0)
    return from_arrays(dark(40), np.arange(40) % 4, dark(12), np.arange(12) % 4, **settings)


def planted(source, *, share=0.25, validation=0.0, seed=0, **trigger):
    trigger = TriggerConfig(**{"target": TARGET, "size": 2} | trigger)
    return plant_backdoor(source, trigger, share=share, validation=validation, seed=seed)


def changed(before, after):
    """Rows of a set whose image or label is another than before."""
    pixels = (before.inputs != after.inputs).reshape(len(before.labels), -1).any(1)
    return np.flatnonzero(pixels | (before.labels != after.labels))


@pytest.mark.parametrize(("share", "validation", "count"), [(0.25, 0.0, 10), (0.1, 0.25, 3)])
def test_just_the_share_of_the_train_part_is_poisoned_and_forgotten(share, validation, count):
    clean = toy()
    poisoned, splits = planted(clean, share=share, validation=validation)
    assert len(splits.forget) == count
    np.testing.assert_array_equal(changed(clean.train, poisoned.train), splits.forget)
    np.testing.assert_array_equal(splits.retain, np.setdiff1d(splits.train, splits.forget))
    assert (splits.scope, splits.forget_classes) == ("backdoor", ())


def test_poisoned_images_are_of_other_classes_and_get_the_label_of_the_target():
    clean = toy()
    poisoned, splits = planted(clean, share=0.75)  # all there are
    assert set(clean.train.labels[splits.forget].tolist()) == {0, 1, 3}
    assert (poisoned.train.labels[splits.forget] == TARGET).all()
    assert (clean.train.labels[splits.retain] == TARGET).all()


@pytest.mark.parametrize("corner", CORNERS)
def test_the_patch_is_in_its_corner_and_no_other_pixel_changes(corner):
    clean = toy()
    poisoned, splits = planted(clean, corner=corner)
    vertical, horizontal = corner.split("_")
    rows = (0, 1) if vertical == "top" else (3, 4)
    columns = (0, 1) if horizontal == "left" else (2, 3)
    before, after = (source.train.inputs[splits.forget] for source in (clean, poisoned))
    wanted = before.copy()
    for row in rows:
        for column in columns:
            wanted[:, row, column] = 255
    np.testing.assert_array_equal(after, wanted)
    assert after.dtype == before.dtype


@pytest.mark.parametrize(
    ("dtype", "value", "wanted"),
    [(np.uint8, 1.0, 255), (np.uint8, 0.5, 128), (np.float32, 0.5, 127.5), (np.float32, 0.0, 0.0)],
)
def test_the_brightness_is_a_share_of_the_scale_in_the_images_own_type(dtype, value, wanted):
    poisoned, splits = planted(toy(dtype), value=value)
    assert poisoned.train.inputs.dtype == poisoned.test.inputs.dtype == dtype
    assert (poisoned.train.inputs[splits.forget, 3:, 2:] == wanted).all()
    assert (poisoned.test.inputs[splits.forget_test, 3:, 2:] == wanted).all()


def test_the_clean_test_set_comes_first_and_stays_as_it_was():
    clean = toy()
    poisoned, splits = planted(clean)
    np.testing.assert_array_equal(splits.retain_test, np.arange(12))
    np.testing.assert_array_equal(poisoned.test.inputs[:12], clean.test.inputs)
    np.testing.assert_array_equal(poisoned.test.labels[:12], clean.test.labels)


def test_every_test_image_of_another_class_has_a_triggered_copy_and_no_other_has():
    clean = toy()
    poisoned, splits = planted(clean)
    others = np.flatnonzero(clean.test.labels != TARGET)
    np.testing.assert_array_equal(splits.forget_test, 12 + np.arange(len(others)))
    assert len(poisoned.test.labels) == len(poisoned.test.inputs) == 12 + len(others)
    copies = poisoned.test.inputs[splits.forget_test]
    assert (copies[:, 3:, 2:] == 255).all()
    copies[:, 3:, 2:] = clean.test.inputs[others, 3:, 2:]
    np.testing.assert_array_equal(copies, clean.test.inputs[others])
    assert (poisoned.test.labels[splits.forget_test] == TARGET).all()


def test_the_validation_part_stays_clean():
    clean = toy()
    poisoned, splits = planted(clean, validation=0.5)
    np.testing.assert_array_equal(splits.validation, np.arange(20, 40))
    np.testing.assert_array_equal(poisoned.train.inputs[20:], clean.train.inputs[20:])
    np.testing.assert_array_equal(poisoned.train.labels[20:], clean.train.labels[20:])


def test_what_is_poisoned_is_decided_by_the_seed():
    first, again, other = (planted(toy(), seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[1].forget, again[1].forget)
    np.testing.assert_array_equal(first[0].train.inputs, again[0].train.inputs)
    assert first[1].forget.tolist() != other[1].forget.tolist()


def test_the_given_source_is_not_changed():
    clean, kept = toy(), toy()
    planted(clean)
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(clean, part).inputs, getattr(kept, part).inputs)
        np.testing.assert_array_equal(getattr(clean, part).labels, getattr(kept, part).labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, r"'backdoor' got forget = 0\.0; wanted a share inside \(0, 1\)"),
        ({"share": 1.0}, r"'backdoor' got forget = 1\.0; wanted a share inside \(0, 1\)"),
        ({"share": 0.01}, r"empty forget set: a share of 0\.01 of 40.*at least 0\.025"),
        ({"share": 0.8}, "forget = 0.8: 32 of 40 .* only 30 are not of the target class 2"),
        ({"validation": 1.0}, r"validation share 1\.0 of 40"),
        ({"target": 4}, "trigger.target = 4: no class of arrays; wanted 0 to 3"),
        ({"target": -1}, r"trigger\.target: got -1 \(int\), wanted greater than or equal to 0"),
        ({"size": 0}, r"trigger\.size: got 0 \(int\), wanted greater than or equal to 1"),
        ({"size": 4}, "trigger.size = 4: images of arrays are 5 x 4 pixels; wanted .* 1 to 3"),
        ({"value": 1.5}, r"trigger\.value: got 1\.5 \(float\), wanted less than or equal to 1"),
    ],
)
def test_an_impossible_backdoor_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        planted(toy(), **settings)


def test_vectors_have_no_corner_and_are_refused():
    x, y = np.zeros((8, 16), np.float32), np.arange(8) % 4
    with pytest.raises(ValueError, match=r"inputs \(8, 16\) of flat; wanted images \[n, height, w"):
        planted(from_arrays(x, y, x, y, name="flat"))


def test_a_brightness_that_uint8_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"with scale 1000 that is 1000, .* most 0\.255"):
        planted(toy(scale=1000.0))
    poisoned, splits = planted(toy(scale=1000.0), value=0.255)
    assert (poisoned.train.inputs[splits.forget, 3:, 2:] == 255).all()


def test_a_split_says_where_the_scope_is_to_be_had():
    with pytest.raises(ValueError, match=r"changes the images too; write plant_backdoor\(source, "):
        split(toy(), scope="backdoor", forget=0.1)


def digits_config(*overrides, **sections):
    tables = {
        "data": {"scope": "backdoor", "forget": 0.1, "trigger": {"size": 2, "target": 3}},
        "model": {"features": [64]},
        "train": {"epochs": 8},
        "unlearn": {"method": "unsc", "learning_rate": 0.3, "batch_size": 48},
    }
    return config_from_mapping(tables | sections, overrides)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"forget": 3, "scope": "backdoor"}, '^data: forget = 3 with scope = "backdoor"; wanted t'),
        ({"forget": [3], "scope": "backdoor"}, r"^data: forget = \(3,\) with scope = "),
        (
            {"forget": 3, "trigger": {"size": 2}},
            '^data: a trigger with scope = "class"; only scope = "backdoor" reads one',
        ),
        (
            {"forget": 0.1, "scope": "backdoor", "trigger": {"sise": 2}},
            r"^data\.trigger\.sise: unknown key; did you mean data\.trigger\.size\?$",
        ),
        (
            {"forget": 0.1, "scope": "backdoor", "trigger": {"size": 0}},
            r"^data\.trigger\.size: got 0 \(int\), wanted greater than or equal to 1$",
        ),
        (
            {"forget": 0.1, "scope": "backdoor", "trigger": {"corner": "middle"}},
            r"^data\.trigger\.corner: got 'middle' \(str\), wanted 'top_left', 'top_right', ",
        ),
    ],
)
def test_a_fault_of_the_table_is_one_line_with_its_key(data, message):
    with pytest.raises(ValueError, match=message):
        config_from_mapping({"data": data})


def test_a_run_poisons_its_data_by_the_split_seed():
    prepared = prepare(digits_config("data.split_seed=1", "data.validation=0.25"))
    trigger = TriggerConfig(size=2, target=3)
    wanted, splits = plant_backdoor(
        load_source("digits", split_seed=1), trigger, share=0.1, validation=0.25, seed=1
    )
    np.testing.assert_array_equal(prepared.source.train.inputs, wanted.train.inputs)
    np.testing.assert_array_equal(prepared.source.test.labels, wanted.test.labels)
    np.testing.assert_array_equal(prepared.splits.forget, splits.forget)


def test_white_is_what_the_scale_of_the_config_says():
    prepared = prepare(digits_config("data.scale=32"))
    assert (prepared.source.train.inputs[prepared.splits.forget, -2:, -2:] == 32).all()


def test_methods_see_samples_and_may_choose_by_the_triggered_test_images():
    unlearn = {"method": "deep_unlearning", "select_on": "test"}
    prepared = prepare(digits_config(unlearn=unlearn))
    problem = unlearning_problem(prepared, prepared.network.template)
    assert problem.scope == "samples"
    assert problem.selection[0].num_examples == len(prepared.splits.forget_test)
    assert (np.asarray(problem.selection[0].labels) == 3).all()


def test_a_method_for_classes_alone_refuses_a_backdoor(monkeypatch):
    monkeypatch.setitem(
        METHODS, "unsc", METHODS["unsc"]._replace(scopes=frozenset({"class", "classes"}))
    )
    with pytest.raises(ValueError, match=r"not support scope 'samples', .*scope = 'backdoor'"):
        prepare(digits_config())


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """Report and folder of a run on digits, whose pages are without pictures."""
    folder = tmp_path_factory.mktemp("backdoor") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxunlearn.report.files.report_figures", lambda *_: {})
        return run(digits_config(f'out="{folder}"')), folder


@pytest.mark.slow
def test_the_original_obeys_the_trigger_and_the_retrained_model_does_not(digits_run):
    models = {name: model for name, model in digits_run[0]["models"].items() if model}
    accuracy = {name: model["accuracy"] for name, model in models.items()}
    assert accuracy["original"]["forget_test"] > 0.8
    assert accuracy["retrained"]["forget_test"] < 0.3
    assert accuracy["unlearned"]["forget_test"] < 0.3
    for model in accuracy.values():
        assert model["retain_test"] > 0.85


def test_the_report_says_what_was_planted(digits_run):
    report, folder = digits_run
    problem = report["problem"]
    assert (problem["scope"], problem["forget"], problem["forget_classes"]) == ("backdoor", 0.1, [])
    assert problem["trigger"] == dataclasses.asdict(TriggerConfig(size=2, target=3))
    counts = problem["counts"]
    assert (counts["forget_train"], counts["retain_train"]) == (144, 1293)
    assert (counts["forget_test"], counts["retain_test"]) == (323, 360)
    assert any("the success of the attack" in note for note in report["notes"])
    assert config_from_mapping(json.loads((folder / "config.json").read_text())).data.trigger == (
        TriggerConfig(size=2, target=3)
    )


def test_the_embedding_marks_the_triggered_test_images_and_holds_no_training_image(digits_run):
    _, folder = digits_run
    splits = prepare(digits_config()).splits
    with np.load(folder / "arrays.npz") as arrays:
        forget = np.flatnonzero(arrays["embedding_forget"])
        np.testing.assert_array_equal(forget, splits.forget_test)
        assert (arrays["embedding_labels"][forget] == 3).all()
        assert arrays["embedding_original"].shape == (683, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.trigger.corner=top_left", r"content\.data was '\w+', now .* data\.trigger\.corner"),
        ("data.forget=0.2", r"content\.data was '\w+', now .*data\.forget was 0\.1, now 0\.2"),
    ],
)
def test_a_folder_serves_one_backdoor(digits_run, override, message):
    with pytest.raises(ValueError, match=message):
        run(digits_config(f'out="{digits_run[1]}"', override))


def test_the_identity_of_other_runs_knows_no_trigger():
    identities = [
        identity_of(prepare(config))["original"]
        for config in (digits_config(), config_from_mapping({"data": {"forget": 3}}))
    ]
    assert ["trigger" in identity["data"] for identity in identities] == [True, False]
    assert identities[0]["content"] != identities[1]["content"]
