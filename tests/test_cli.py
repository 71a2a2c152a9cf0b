"""What a user of the command line sees: the table, or one message and nothing half made."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from typer.testing import CliRunner

from jaxunlearn import experiment
from jaxunlearn.checkpoint import save_variables
from jaxunlearn.cli import app
from jaxunlearn.methods import METHODS

CONFIG = """
[data]
source = "npz:toy.npz"
forget = 1
[model]
features = [4]
[train]
epochs = 4
batch_size = 16
learning_rate = 0.2
[unlearn]
epochs = 2
learning_rate = 0.3
batch_size = 16
"""
NETS = """
import flax.linen as nn

def linear(width=3):
    return nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(width)])
"""
# The command line in a process of its own that notes its epochs and may be hit by a signal.
MAIN = """
import os, signal
from jaxunlearn import experiment, training

def watched(*args, on_epoch, **options):
    def note(figures):
        with open("epochs.txt", "a") as file:
            print(figures["epoch"], file=file)
        on_epoch(figures)
        if figures["epoch"] == int(os.environ["AT"]):
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return training.fit(*args, on_epoch=note, save_every=0.0, **options)

experiment.fit = watched
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
from jaxunlearn.cli import main
main()
"""


def images(n, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    shape = (n, 2, 2, 1)
    x = np.eye(4)[labels].reshape(shape) * 150 + rng.integers(0, 100, shape)
    return x.repeat(channels, axis=-1).astype(np.uint8), labels


def save_toy(path, **changes):
    (x, y), (x_test, y_test) = images(48), images(24)
    arrays = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}
    np.savez(path, **(arrays | changes))


def network(d_in=4, width=4, fill=0.1):
    """Variables of the config's network."""

    def dense(rows, columns):
        return {"kernel": jnp.full((rows, columns), fill), "bias": jnp.zeros(columns)}

    return {"params": {"dense1": dense(d_in, width), "head": dense(width, 3)}}


def fill(folder):
    """Everything that the commands below name."""
    (folder / "toy.toml").write_text(CONFIG)
    (folder / "my_nets.py").write_text(NETS)
    save_toy(folder / "toy.npz")
    x = images(48)[0].astype(np.float32)
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        bad = x.copy()
        bad[7, 0, 0, 0] = value
        save_toy(folder / f"{name}.npz", x_train=bad, x_test=images(24)[0].astype(np.float32))
    save_toy(folder / "rgb.npz", x_train=images(48, 3)[0], x_test=images(24, 3)[0])
    (folder / "torn.npz").write_bytes((folder / "toy.npz").read_bytes()[:-100])
    save_variables(folder / "fits", network())
    save_variables(folder / "wider", network(width=5))
    save_variables(folder / "diverged", network(fill=jnp.nan))
    save_variables(folder / "torn", network())
    metadata = folder / "torn" / "_METADATA"
    metadata.write_bytes(metadata.read_bytes()[:-20])
    (folder / "foreign").mkdir()
    (folder / "foreign" / "pytorch_model.bin").touch()
    (folder / "file").write_text("mine")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    fill(folder)
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))  # the library does so too; here it is undone
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)


@pytest.fixture(scope="module")
def finished(place):
    """Output of an undisturbed run, whose folder is runs/toy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        result = invoke("run", "toy.toml")
    assert result.exit_code == 0, result.stderr
    return result


def invoke(*arguments):
    return CliRunner().invoke(app, arguments)


def process(*arguments, at=0, sent=0, script=MAIN, flags=os.environ["XLA_FLAGS"]):
    environment = os.environ | {"AT": str(at), "SIGNAL": str(int(sent)), "XLA_FLAGS": flags}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def report_of(out):
    return json.loads((Path(out) / "report.json").read_text())


def restored(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(folder).resolve())


def test_a_run_prints_bars_the_table_and_where_the_report_is(finished, place):
    assert "train original" in finished.stdout
    for text in ("unsc on npz:", "forget train", "retain test, macro", "MIA efficacy", "retrain"):
        assert text in finished.stdout
    last = "report.html, report.md and report.json in runs/toy"
    assert finished.stdout.splitlines()[-1] == last
    assert finished.stderr == ""
    assert (place / "runs/toy/report.html").stat().st_size > 10_000
    table = finished.stdout[finished.stdout.index("unsc on") :]
    assert max(map(len, table.splitlines())) <= 120


def test_running_again_repeats_the_numbers_without_any_work(finished, monkeypatch):
    before = report_of("runs/toy")
    monkeypatch.setattr(experiment, "fit", None)
    result = invoke("run", "toy.toml", "--quiet")
    assert result.exit_code == 0
    assert "train original" not in result.stdout
    assert report_of("runs/toy")["models"] == before["models"]


def test_another_config_into_the_same_folder_is_refused_with_the_difference(finished):
    result = invoke("run", "toy.toml", "train.epochs=5", "data.forget=2")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: runs/toy holds a run of another configuration (data.forget was 1, now 2; "
        "train.epochs was 4, now 5); choose another --out, or delete "
        "runs/toy/stages/original.json, runs/toy/stages/retrained.json, "
        "runs/toy/stages/unlearned.json to do these stages again\n"
    )


def test_commands_go_stage_by_stage(place):
    given = ["train.checkpoint=fits", "retrain.checkpoint=fits", "--quiet"]
    out = place / "step 'by' \"step\""
    seen = []
    for command in ("train", "unlearn", "evaluate"):
        result = invoke(command, "toy.toml", *given, "--out", str(out))
        assert result.exit_code == 0, result.stderr
        seen.append({path.stem for path in (out / "stages").iterdir()})
        assert (out / "report.json").exists() == (command == "evaluate")
    assert seen == [{"original", "retrained"}, {"original", "retrained", "unlearned"}, seen[1]]
    assert report_of(out)["config"]["out"] == str(out)


def test_the_users_own_network_checkpoint_and_data(place):
    """Made, trained, and read back without this library."""
    model = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(3)])
    x, y = images(48)
    z = (x / 255 - (x / 255).mean()) / (x / 255).std()
    kernel = np.linalg.lstsq(z.reshape(48, -1), np.eye(3)[y], rcond=None)[0]
    params = {"layers_1": {"kernel": kernel.astype(np.float32), "bias": np.zeros(3, np.float32)}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(place / "own", {"params": params})
    own = ['model={factory = "my_nets:linear"}', "train.checkpoint=own", "retrain.enabled=false"]
    settings = ["unlearn.energy=0.8", "unlearn.merge_energy=0.9"]
    result = invoke("run", "toy.toml", *own, *settings, "--out", "runs/own")
    assert result.exit_code == 0, result.stderr
    assert "note: No retrained model" in result.stdout
    before, after = (report_of("runs/own")["models"][m] for m in ("original", "unlearned"))
    assert before["accuracy"]["forget_train"] == before["accuracy"]["retain_train"] == 1
    assert after["accuracy"]["forget_train"] < 0.5
    for variables, reported in (
        ({"params": params}, before),
        (restored("runs/own/checkpoints/unlearned"), after),
    ):
        predicted = model.apply(variables, z.astype(np.float32)).argmax(1)
        for split, rows in (("forget_train", y == 1), ("retain_train", y != 1)):
            right = (predicted == y)[rows]
            assert reported["counts"][split] == {"correct": right.sum(), "total": rows.sum()}


BAD = [
    # The request.
    (["data.scope=classes", "data.forget=[]"], "empty forget set"),
    (["data.scope=samples", "data.forget=[]"], "empty forget set"),
    (["data.forget=7"], "no training example of class [7]; wanted classes with training examples"),
    (["data.scope=samples", "data.forget=[0, 99]"], "ids from 0 to 99, out of range"),
    (["data.scope=samples", "data.forget=[5, 5]"], "doubled [5]; write each of them once"),
    (["data.scope=classes", "data.forget=[0, 1, 2]"], "forget = all"),
    (["data.scope=random", "data.forget=1.0"], "wanted a share inside (0, 1)"),
    (["data.scope=clas"], "data.scope: got 'clas' (str), wanted 'class'"),
    # The data.
    (["data.source=npz:nan.npz"], "npz:nan.npz train: NaN or infinite float32 entries in 1 of 48"),
    (["data.source=npz:inf.npz"], "npz:inf.npz train: NaN or infinite float32 entries in 1 of 48"),
    (["data.source=npz:torn.npz"], "npz:torn.npz: not an .npz file of plain arrays"),
    (["data.source=npz:none.npz"], "npz:none.npz: no such file"),
    (["data.source=digit"], "source 'digit' is unknown; wanted digits, tfds:NAME or npz:PATH"),
    (["data.source=tfds:cifar10", "--data-dir", "."], "tfds:cifar10 is not prepared in"),
    (["--data-dir", "nowhere"], "data.data_dir: nowhere: not found at"),
    (["data.mean=[0.5, 0.5, 0.5]", "data.std=[1, 1, 1]"], "3 means for inputs (1, 2, 2, 1)"),
    # Weights and checkpoints.
    (["train.checkpoint=none"], "train.checkpoint: none: not found at"),
    (["train.checkpoint=wider"], "train.checkpoint:"),
    (["train.checkpoint=wider"], "checkpoint of another model\n  different (3):"),
    (["train.checkpoint=fits", "data.source=npz:rgb.npz"], "float32[4, 4], wanted float32[12, 4]"),
    (["train.checkpoint=diverged"], "NaN or inf in params/dense1/kernel (16 of 16 values)"),
    (["train.checkpoint=torn"], "torn checkpoint, its files are missing or damaged"),
    (["train.checkpoint=foreign"], "no orbax checkpoint, for it holds no _METADATA"),
    (["retrain.checkpoint=wider"], "retrain.checkpoint:"),
    (["retrain.checkpoint=none"], "retrain.checkpoint: none: not found at"),
    (["--weights", "toy.npz"], "no rules for reading third-party weights into model mlp, only"),
    (["--weights", "none.npz"], "none.npz: not found at"),
    (["--weights", "toy.npz", "train.checkpoint=fits"], "checkpoint and weights exclude each"),
    # Names and settings.
    (["unlearn.method=unscc"], "unknown method 'unscc'; did you mean 'unsc'? There are unsc"),
    (["unlearn.energie=0.9"], "unlearn.energie: unknown key; did you mean unlearn.energy?"),
    (["unlearn.epochs=0"], "epochs = 0"),
    (["train.epoch=3"], "train.epoch: unknown key; did you mean train.epochs?"),
    (["trian.epochs=3"], "trian: unknown key; did you mean train?"),
    (["train.epochs=many"], "train.epochs: got 'many' (str), wanted a valid integer"),
    (["train.epochs"], "override 'train.epochs': write section.key=value, e.g. train.epochs=10"),
    (["model.name=mpl"], "model 'mpl' is unknown: did you mean 'mlp'?"),
    (["model.width=3"], "model 'mlp' has no option width: its options are features"),
    (["train.patience=3"], "train.patience = 3 needs validation data"),
    (["model.name=allcnn", "model.features=[3]"], "model 'allcnn' has no option features"),
    (["--devices", "0"], "devices: got 0 (int), wanted"),
    (["--devices", "-1"], "devices: got -1 (int), wanted"),
    (["--devices", "1000"], "devices = 1000: there are 8 (cpu); virtual ones are made before JAX"),
    # The user's own network.
    (['model={factory = "no_nets:net"}'], "'no_nets:net': No module named 'no_nets'"),
    (['model={factory = "my_nets:liner"}'], "has no function 'liner'; did you mean 'linear'?"),
    (['model={factory = "my_nets:linear", depth = 2}'], "unexpected keyword argument 'depth'"),
    (['model={factory = "my_nets:linear", width = 4}'], "returns (1, 4) for one example; wanted"),
    # The folder.
    (["--out", "file"], "file is a file; wanted a folder for the run: choose another --out"),
    (["--out", "file/below"], "Not a directory"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(bad[0]) for bad in BAD])
def test_bad_input_is_one_message_before_any_work(arguments, message, place, monkeypatch):
    def worked(*_, **__):
        pytest.fail("work was started")

    monkeypatch.setattr(experiment, "fit", worked)
    monkeypatch.setattr(experiment.RunFolder, "stage", worked)
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "runs/bad"]
    result = invoke("run", "toy.toml", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not (place / "runs" / "bad").exists()
    assert (place / "file").read_text() == "mine"


def test_a_scope_that_a_method_does_not_support_is_refused(monkeypatch):
    monkeypatch.setitem(METHODS, "unsc", METHODS["unsc"]._replace(scopes=frozenset({"class"})))
    result = invoke("run", "toy.toml", "data.scope=random", "data.forget=0.5", "--out", "runs/bad")
    assert result.exit_code == 1
    assert "method 'unsc' does not support scope 'samples', only class; this" in result.stderr
    assert "data.scope = 'random' with 0 classes forgotten as a whole" in result.stderr
    assert not Path("runs/bad").exists()


def test_all_faults_of_a_config_come_in_one_message():
    result = invoke("run", "toy.toml", "sed=1", "train.epochs=0", "data.froget=2")
    assert result.exit_code == 1
    first, *rest = result.stderr.splitlines()
    assert first == "error: toy.toml:"
    assert {line.split(":")[0] for line in rest} == {"  sed", "  data.froget", "  train.epochs"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run"], 2, "Missing argument 'config'"),
        (["run", "toy.toml", "--ot", "x"], 2, "No such option: --ot"),
        (["rnu", "toy.toml"], 2, "No such command 'rnu'"),
        (["run", "none.toml"], 1, "error: none.toml: no such file; wanted the TOML file of a run"),
        (["run", "file"], 1, "error: file: not valid TOML"),
        (["run", "."], 1, "error: .: no such file; wanted the TOML file of a run"),
    ],
)
def test_wrong_use_is_answered_with_the_right_one(arguments, code, message):
    result = invoke(*arguments)
    assert result.exit_code == code
    assert message in result.stderr


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), FloatingPointError("x")])
def test_what_goes_wrong_in_the_middle_is_one_message_too(error, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(experiment, "fit", fails)
    result = invoke("run", "toy.toml", "--out", "runs/fails", "--quiet")
    assert (result.exit_code, result.stderr) == (1, f"error: {error}\n")


def test_faults_of_the_programs_own_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(experiment, "fit", None)
    result = invoke("run", "toy.toml", "--out", "runs/fails", "--quiet")
    assert isinstance(result.exception, TypeError)


def test_help_names_commands_options_and_defaults():
    text = invoke("--help").stdout
    for command in ("run", "train", "unlearn", "evaluate", "methods"):
        assert command in text
    text = invoke("run", "--help").stdout
    options = ("--out", "--data-dir", "--weights", "--devices", "--quiet")
    for option in (*options, "config", "overrides"):
        assert option in text
    assert invoke().stdout.strip() == invoke("--help").stdout.strip()


def test_methods_are_listed_with_what_they_need():
    text = invoke("methods").stdout
    for method in METHODS.values():
        (line,) = (line for line in text.splitlines() if line[1:].split()[:1] == [method.name])
        assert all(word in line for word in method.needs | method.scopes)


def test_flags_go_into_the_config_as_they_are_written(monkeypatch):
    seen = []

    def run(config, *, until, console):
        seen.append((config.out, config.data.data_dir, config.train.weights, until))
        assert config.devices == 3

    monkeypatch.setattr(experiment, "run", run)
    flags = ["--out", "o'\"\\u 1", "--data-dir", "~/ü", "--weights", "$HOME/w.npz"]
    assert invoke("train", "toy.toml", *flags, "--devices", "3").exit_code == 0
    assert seen == [("o'\"\\u 1", "~/ü", "$HOME/w.npz", "train")]


def test_the_variable_of_tensorflow_datasets_is_heeded(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "named/by/variable")
    result = invoke("run", "toy.toml", "data.source=tfds:mnist", "--out", "runs/bad")
    assert result.exit_code == 1
    assert "tfds:mnist is not prepared in named/by/variable" in result.stderr


def test_a_mistyped_config_is_answered_without_waiting_for_jax():
    script = """
import sys
from jaxunlearn.cli import main
try:
    main()
finally:
    print("jax" in sys.modules)
"""
    ran = process("run", "toy.toml", "train.epoch=3", script=script)
    assert (ran.returncode, ran.stdout) == (1, "False\n")
    assert ran.stderr == (
        "error: toy.toml:\n  train.epoch: unknown key; did you mean train.epochs?\n"
    )


@pytest.mark.slow
def test_virtual_devices_are_made_on_a_cpu_and_give_the_numbers_of_one(finished, place):
    command = ["unlearn", "toy.toml", "--devices", "4", "--out", "runs/four"]
    program = "from jaxunlearn.cli import main; main()"
    ran = process(*command, "retrain.enabled=false", script=program, flags="")
    assert (ran.returncode, ran.stderr) == (0, "")
    used = json.loads((place / "runs/four/environment.json").read_text())
    assert used["devices"] == ["cpu"] * 4
    for model in ("original", "unlearned"):
        folders = (f"runs/{run}/checkpoints/{model}" for run in ("toy", "four"))
        close = functools.partial(np.testing.assert_allclose, atol=1e-5)
        jax.tree.map(close, *map(restored, folders))


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_numbers_of_an_undisturbed_one(finished, place):
    killed = process("run", "toy.toml", "--out", "runs/killed", at=3, sent=signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert not (place / "runs/killed/stages/original.json").exists()
    again = process("run", "toy.toml", "--out", "runs/killed")
    assert (again.returncode, again.stderr) == (0, "")
    epochs = map(float, (place / "epochs.txt").read_text().split())
    assert list(epochs) == [1, 2, 3, 3, 4, 1, 2, 3, 4]
    one, other = report_of("runs/toy"), report_of("runs/killed")
    for part in ("models", "gap_to_retrain", "pseudo_labels", "method", "notes"):
        assert one[part] == other[part]
    for model in ("original", "retrained", "unlearned"):
        folders = (f"runs/{run}/checkpoints/{model}" for run in ("toy", "killed"))
        jax.tree.map(np.testing.assert_array_equal, *map(restored, folders))
    spent = sum(epoch["seconds"] for epoch in other["training"]["original"])
    assert other["seconds"]["train"] >= spent


def test_ctrl_c_is_answered_and_leaves_a_run_that_can_go_on(place):
    ran = process("run", "toy.toml", "--out", "runs/stopped", at=2, sent=signal.SIGINT)
    assert ran.returncode == 130
    assert ran.stderr == "interrupted; the same command goes on where this one stopped\n"
    assert [path.name for path in (place / "runs/stopped/states/original").iterdir()] == ["1"]
