"""Every fault of a config is named before work starts; what is valid survives a round trip."""

import dataclasses
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxunlearn.audit_config import load_audit
from jaxunlearn.compare_config import load_comparison
from jaxunlearn.config import (
    ModelConfig,
    RunConfig,
    TrainConfig,
    config_from_mapping,
    fingerprint,
    load_config,
    to_mapping,
    typed,
)
from jaxunlearn.methods import METHODS
from jaxunlearn.models import build
from jaxunlearn.paths import reference_data, resolve_path
from jaxunlearn.tune_config import load_search

FORGET = {"data": {"forget": 3}}

FULL = """
seed = 7
out = "somewhere"
[data]
source = "tfds:cifar10"
scope = "classes"
forget = [1, 3]
validation = 0.1
[model]
name = "allcnn"
width = 0.5
features = [256, 64]
[train]
learning_rate = 1
schedule = "steps"
milestones = [30, 60]
patience = 5
[retrain]
enabled = false
[unlearn]
method = "salun"
share = 0.8
[evaluate]
retain_sample = 5000
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="toy.toml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_a_file_that_names_only_the_forget_class_gets_the_digits_recipe(write):
    config = load_config(write("data.forget = 3"))
    assert (config.data.source, config.data.scope, config.data.forget) == ("digits", "class", 3)
    assert (config.model.name, config.unlearn.method) == ("mlp", "unsc")
    assert (config.train.epochs, config.train.batch_size) == (60, 96)
    assert (config.train.learning_rate, config.train.weight_decay) == (0.05, 5e-4)
    assert (config.seed, config.out) == (0, "runs/toy")


def test_every_section_of_a_file_is_read(write):
    config = load_config(write(FULL))
    assert config.data.forget == (1, 3)
    assert config.model.options == {"width": 0.5, "features": [256, 64]}
    assert config.train.milestones == (30, 60)
    assert isinstance(config.train.learning_rate, float)
    assert not config.retrain.enabled
    assert config.unlearn.options == {"share": 0.8}
    assert (config.evaluate.retain_sample, config.seed, config.out) == (5000, 7, "somewhere")


@pytest.mark.parametrize(
    "text", ["data.forget = 3", FULL, 'model.factory = "a.b:c"\ndata.forget = 0']
)
def test_a_config_survives_the_round_trip_through_json(write, text):
    config = load_config(write(text))
    assert config_from_mapping(json.loads(json.dumps(to_mapping(config)))) == config


def test_reading_a_mapping_leaves_it_as_it_was():
    mapping = {"data": {"forget": 3}, "model": {"width": 2}}
    config_from_mapping(mapping, ["data.forget=4", "train.epochs=2"])
    assert mapping == {"data": {"forget": 3}, "model": {"width": 2}}


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("data.source=npz:images.npz", "data", "source", "npz:images.npz"),
        ('data.source="digits"', "data", "source", "digits"),
        ("data.forget = 5", "data", "forget", 5),
        ("train.learning_rate=1", "train", "learning_rate", 1.0),
        ("train.flip=true", "train", "flip", True),
        ("unlearn.energy=[0.9, 0.97]", "unlearn", "options", {"energy": [0.9, 0.97]}),
        ("model.stem.width=64", "model", "options", {"stem": {"width": 64}}),
    ],
)
def test_an_override_has_a_toml_value_or_is_a_bare_word(override, section, key, value):
    config = config_from_mapping(FORGET, [override])
    assert getattr(getattr(config, section), key) == value


def test_overrides_reach_the_top_level_and_the_last_one_wins(write):
    config = load_config(write("seed = 1\ndata.forget = 3"), ["seed=2", "seed=3", "out=runs/a b"])
    assert (config.seed, config.out) == (3, "runs/a b")


@pytest.mark.parametrize("override", ["train.epochs", "train.epochs=", "=3", "train.=3"])
def test_an_override_that_is_no_assignment_is_refused(override):
    with pytest.raises(ValueError, match=rf"override '{override}': write section\.key=value"):
        config_from_mapping(FORGET, [override])


def test_an_override_below_a_number_is_refused():
    with pytest.raises(ValueError, match=r"override 'seed.epochs=3': seed is not a table"):
        config_from_mapping({"seed": 1, **FORGET}, ["seed.epochs=3"])


@pytest.mark.parametrize(
    ("faulty", "line"),
    [
        (
            {"data": {"forget": 3, "sorce": "x"}},
            "data.sorce: unknown key; did you mean data.source?",
        ),
        ({"trian": {}}, "trian: unknown key; did you mean train?"),
        ({"quux": 1}, "quux: unknown key; known: data, model, train, retrain, unlearn, evaluate"),
        ({"data": {}}, "data.forget: missing, and it has no default"),
        ({"train": 3}, "train: got 3 (int), wanted a table"),
        ({"train": {"epochs": True}}, "train.epochs: got True (bool), wanted a valid integer"),
        ({"train": {"epochs": "60"}}, "train.epochs: got '60' (str), wanted a valid integer"),
        ({"train": {"epochs": 0}}, "train.epochs: got 0 (int), wanted greater than or equal to 1"),
        ({"train": {"decay": "0.2"}}, "train.decay: got '0.2' (str), wanted a valid number"),
        ({"train": {"decay": True}}, "train.decay: got True (bool), wanted a valid number"),
        ({"train": {"flip": 1}}, "train.flip: got 1 (int), wanted a valid boolean"),
        ({"train": {"learning_rate": float("nan")}}, "got nan (float), wanted a finite number"),
        ({"train": {"milestones": [1, "x"]}}, "got [1, 'x'] (list), wanted a valid integer in the"),
        ({"train": {"schedule": "cosin"}}, "wanted 'cosine', 'steps' or 'constant'"),
        (
            {"data": {"forget": 3, "validation": 1.0}},
            "data.validation: got 1.0 (float), wanted le",
        ),
        (
            {"data": {"forget": "3"}},
            "data.forget: got '3' (str), wanted a valid integer or a valid array or a valid number",
        ),
        (
            {"data": {"forget": 1, "scope": "clas"}},
            "data.scope: got 'clas' (str), wanted 'class', ",
        ),
        (
            {"model": {"name": "mlp", "factory": "a:b"}},
            "model: name = 'mlp' and factory = 'a:b'",
        ),
        ({"model": {"factory": "a.b"}}, "factory = 'a.b'; write 'package.module:function'"),
        ({"train": {"warmup_epochs": 60}}, "train: warmup_epochs = 60, wanted fewer than epochs"),
        ({"train": {"schedule": "steps"}}, 'milestones = [] with schedule = "steps"'),
        ({"train": {"milestones": [3]}}, 'milestones = [3] with schedule = "cosine"'),
        ({"train": {"schedule": "steps", "milestones": [6, 3]}}, "[6, 3], wanted epochs in rising"),
        ({"train": {"checkpoint": "a", "weights": "b"}}, "checkpoint and weights exclude each"),
        ({"train": {"patience": 3}}, "train.patience = 3 needs validation data; write data.val"),
        ({"evaluate": {"members": "last"}}, "evaluate.members: got 'last' (str), wanted 'first'"),
    ],
)
def test_a_fault_is_one_line_with_its_dotted_key(faulty, line):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        config_from_mapping(FORGET | faulty)
    assert line in str(caught.value)


def test_a_missing_data_section_is_named():
    with pytest.raises(ValueError, match=r"^data: missing, and it has no default$"):
        config_from_mapping({})


def test_all_faults_of_a_file_are_reported_together_under_its_path(write):
    path = write("sed = 1\n[data]\nforget = 'x'\n[train]\nepoch = 3\ncrop = -1\n")
    with pytest.raises(ValueError, match=r"^.*toy\.toml:\n  sed: unknown key") as caught:
        load_config(path)
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "sed",
        "train.epoch",
        "data.forget",
        "train.crop",
    ]


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path}: no such file; wanted the TOML file"):
            load_config(path)


def test_invalid_toml_is_refused_with_its_line(write):
    with pytest.raises(ValueError, match=r"toy\.toml: not valid TOML: .*line 2"):
        load_config(write("seed = 1\ndata = = 3"))


def test_a_factory_takes_the_place_of_the_default_network():
    config = config_from_mapping({**FORGET, "model": {"factory": "a.b:c", "depth": 3}})
    assert config.model == ModelConfig(name=None, factory="a.b:c", options={"depth": 3})


def test_sections_made_in_python_are_checked_for_contradictions_too():
    with pytest.raises(ValueError, match="checkpoint and weights exclude each other"):
        TrainConfig(checkpoint="a", weights="b")
    for given in ({"rules": "nets:RULES"}, {"rules": "nets.RULES", "weights": "net.pth"}):
        with pytest.raises(ValueError, match=r"rules are written 'package\.module:RULES'"):
            TrainConfig(**given)


@dataclass(frozen=True)
class _Method:
    energy: float | tuple[float, ...] = 0.97
    labels: str = "pseudo"

    def __post_init__(self):
        if self.labels == "none":
            raise ValueError("labels = none, wanted pseudo")


def test_typed_builds_the_config_of_any_method():
    assert typed(_Method, {"energy": [1, 0.5]}, where="unlearn") == _Method(energy=(1.0, 0.5))
    assert typed(_Method, {}, where="unlearn") == _Method()


@pytest.mark.parametrize(
    ("mapping", "line"),
    [
        ({"enrgy": 1}, r"^unlearn\.enrgy: unknown key; did you mean unlearn\.energy\?$"),
        ({"energy": "high"}, r"^unlearn\.energy: got 'high' \(str\), wanted a valid number or a"),
        ({"labels": "none"}, "^unlearn: labels = none, wanted pseudo$"),
    ],
)
def test_typed_names_the_section_in_its_faults(mapping, line):
    with pytest.raises(ValueError, match=line):
        typed(_Method, mapping, where="unlearn")


def test_the_fingerprint_follows_the_content_alone():
    config = config_from_mapping(FORGET)
    mapping = to_mapping(config)
    assert fingerprint(mapping) == fingerprint(dict(reversed(mapping.items())))
    changed = dataclasses.replace(config, seed=1)
    assert fingerprint(mapping) != fingerprint(to_mapping(changed))
    assert isinstance(changed, RunConfig)
    assert len(fingerprint(mapping)) == 12


def test_the_variable_names_the_reference_data(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXUNLEARN_DATA", str(tmp_path))
    assert reference_data() == tmp_path
    monkeypatch.delenv("JAXUNLEARN_DATA")
    sibling = Path(__file__).resolve().parents[2] / "shared"
    assert reference_data() == (sibling if sibling.is_dir() else None)


def test_a_path_is_taken_as_given_before_the_reference_data(monkeypatch, tmp_path):
    weights = tmp_path / "data" / "weights"
    weights.mkdir(parents=True)
    (weights / "net.npz").touch()
    monkeypatch.setenv("JAXUNLEARN_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve_path("net.npz") == weights / "net.npz"
    assert resolve_path("weights/net.npz") == weights / "net.npz"
    (tmp_path / "net.npz").touch()
    assert resolve_path("net.npz") == tmp_path / "net.npz"


def test_home_and_variables_in_a_path_are_expanded(monkeypatch, tmp_path):
    (tmp_path / "net.npz").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_path("~/net.npz") == resolve_path("$HOME/net.npz") == tmp_path / "net.npz"


def test_a_path_that_is_nowhere_is_refused_with_every_place(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXUNLEARN_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no\.npz: not found at .* or .*") as caught:
        resolve_path("no.npz")
    places = [Path.cwd(), tmp_path / "data", tmp_path / "data" / "weights"]
    assert all(str(place / "no.npz") in str(caught.value) for place in places)


COMMITTED = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_config_is_one_that_its_method_and_model_take(path):
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    if "compare" in tables:
        comparison = load_comparison(path)
        config, methods = comparison.base, [x.unlearn for x in comparison.entries if not x.skip]
    elif "audit" in tables:
        asked = load_audit(path)
        config, methods = asked.base, [x.unlearn for x in asked.entries]
    elif "tune" in tables:
        config = load_search(path).base
        methods = [config.unlearn]
    else:
        config = load_config(path)
        methods = [config.unlearn]
    for unlearn in methods:
        typed(METHODS[unlearn.method].config, unlearn.options, where="unlearn")
    build(config.model.name, num_classes=10, **config.model.options)
