"""The public names: one sorted list, documented, and cheap until they are used."""

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxunlearn

ROOT = Path(__file__).resolve().parents[1]
NAMES = [name for name in jaxunlearn.__all__ if name != "__version__"]
HEAVY = {"matplotlib", "scipy", "sklearn", "tensorflow", "tensorflow_datasets"}


def _fresh(program):
    """What a program prints in an interpreter of its own, without this suite's virtual devices."""
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert not done.returncode, done.stderr
    return done.stdout.split()


def test_public_names_are_sorted_and_said_once():
    assert sorted(set(NAMES)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_documented(name):
    value = getattr(jaxunlearn, name)
    if name == "METHODS":
        assert all(method.summary for method in value.values())
        return
    text = inspect.getdoc(value) or ""
    # NamedTuples and dataclasses without a docstring get their own signature as one.
    assert len(text) > 20
    assert not text.startswith(f"{name}(")


def test_type_checkers_and_the_interpreter_see_the_same_names():
    tree = ast.parse(Path(jaxunlearn.__file__).read_text())
    imports = {
        alias.asname: node.module.removeprefix("jaxunlearn.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("jaxunlearn.")
        for alias in node.names
    }
    assert imports == jaxunlearn._HOME


def test_no_public_name_hides_a_module():
    modules = {module.name for module in pkgutil.iter_modules(jaxunlearn.__path__)}
    assert not modules & set(NAMES)


def test_public_names_are_listed_and_others_refused():
    assert set(dir(jaxunlearn)) >= set(jaxunlearn.__all__)
    with pytest.raises(AttributeError, match=r"'jaxunlearn' has no attribute 'unlearn_all'"):
        jaxunlearn.unlearn_all  # noqa: B018


def test_the_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert jaxunlearn.__version__ == project["version"]


def test_importing_the_package_waits_for_nothing():
    loaded = _fresh("import sys, jaxunlearn, jaxunlearn.cli; print(*sys.modules)")
    assert not {"jax", "flax", "orbax", *HEAVY} & set(loaded)


def test_unlearning_loads_no_library_that_only_reports_and_data_sets_need():
    problem = "Batches, UNSCConfig, UnlearningProblem, accumulate_gram, fit, load_source, unsc"
    loaded = _fresh(f"from jaxunlearn import {problem}; import sys; print(*sys.modules)")
    assert "flax" in loaded
    assert not HEAVY & set(loaded)


def test_importing_every_module_leaves_the_choice_of_devices_open():
    modules = [
        module.name for module in pkgutil.walk_packages(jaxunlearn.__path__, prefix="jaxunlearn.")
    ]
    assert importlib.import_module("jaxunlearn.experiment").__name__ in modules
    # JAX refuses this setting once an array was made.
    program = f"import jax, {', '.join(modules)}; jax.config.update('jax_num_cpu_devices', 3)"
    assert _fresh(f"{program}; print(jax.device_count())")[-1] == "3"
