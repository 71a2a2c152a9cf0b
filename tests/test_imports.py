"""Imports point one way: the package is read from its linear algebra up, and never loops back."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import jaxunlearn

# From the bottom up. A module imports from lines above its own, never from its own line or below;
# a package counts as one. A new module is entered here, or the tests fail.
ORDER = (
    ("environment", "evaluate_config", "linalg", "models", "paths", "quiet", "report", "typed"),
    ("convolution", "randomized"),
    ("config", "data", "layers"),
    ("flax_layers",),
    ("watch",),
    ("batches", "capture", "prepared", "preprocessing"),
    ("activations", "checkpoint", "nnx_models", "sharding", "sources", "taps"),
    ("backdoor", "conv_gram", "projectors", "surrogates"),
    ("gram", "steps"),
    ("epochs", "moments"),
    ("subspace",),
    ("soft_projectors",),
    ("edits", "guard", "training", "transforms"),
    ("evaluation", "families", "guard_files", "methods"),
    ("exported", "store"),
    (
        "alignment_profile",
        "contour_assessment",
        "feature_assessment",
        "forget_vector_report",
        "model_outputs",
        "saliency_assessment",
        "shift_assessment",
    ),  # parts of the experiment
    ("output_assessment",),
    ("assessment", "network", "progress", "relearning", "stages"),
    ("preparation",),
    ("run_report",),
    ("compare_config", "experiment", "requests", "tune_config"),
    ("audit_config", "stored_audit"),
    ("auditing", "compare", "tune"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}

# What the order alone does not say.
ALONE = ("models", "report")  # import nothing of jaxunlearn but themselves
BLIND = {"evaluation": {"methods", "transforms", "edits", "store"}}  # judges variables alone
USERS_OF_MODELS = {
    "__init__",
    "cli",
    "experiment",
    "network",
    "preparation",
    "requests",
}  # all others: any model


def _modules():
    """Source of every module by dotted name, the package's own as ``__init__``."""
    root = Path(jaxunlearn.__file__).parent
    modules = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__") or "__init__"
        modules[name] = path.read_text(encoding="utf-8")
    return modules


def _imported(source, modules):
    """Modules of jaxunlearn that a source imports anywhere, also inside functions."""
    full_names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            full_names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, (
                f"relative import of {node.module}: write jaxunlearn.{node.module}"
            )
            full_names |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = set()
    for name in full_names:
        top, _, rest = name.partition(".")
        if top == "jaxunlearn":
            # The name is a module, or something in the module before its last dot.
            found.add(rest if rest in modules else rest.rpartition(".")[0] or "__init__")
    return found


def _arrows(modules):
    """``(importing, imported)`` modules, packages as one and without their inner imports."""
    pairs = {
        (name.split(".")[0], other.split(".")[0])
        for name, source in modules.items()
        for other in _imported(source, modules)
    }
    return {(name, other) for name, other in pairs if name != other}


def _upward(arrows):
    known = [(a, b) for a, b in arrows if {a, b} <= LEVEL.keys()]  # the first test has the others
    return sorted(f"{a} imports {b}" for a, b in known if LEVEL[a] <= LEVEL[b])


@pytest.fixture(scope="module")
def modules():
    return _modules()


@pytest.fixture(scope="module")
def arrows(modules):
    return _arrows(modules)


def test_every_module_has_its_place_in_the_order(modules):
    unknown = {name.split(".")[0] for name in modules} - LEVEL.keys()
    assert not unknown, f"enter {sorted(unknown)} in ORDER of this file"
    assert len(LEVEL) == sum(len(names) for names in ORDER), "a name stands twice"


def test_no_import_points_upward(arrows):
    assert ("transforms", "projectors") in arrows
    assert not _upward(arrows)


@pytest.mark.parametrize("name", ALONE)
def test_models_and_reports_import_nothing_but_themselves(arrows, name):
    assert not [other for importing, other in arrows if importing == name]


@pytest.mark.parametrize("name", BLIND)
def test_evaluation_does_not_know_how_variables_came_to_be(arrows, name):
    assert not BLIND[name] & {other for importing, other in arrows if importing == name}


def test_models_are_imported_by_the_experiment_alone(arrows):
    assert {name for name, other in arrows if other == "models"} <= USERS_OF_MODELS


def test_no_modules_import_each_other_within_a_package_either(modules):
    graph = {name: _imported(source, modules) for name, source in modules.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(modules)  # else: CycleError


@pytest.mark.parametrize(
    "source",
    [
        "from jaxunlearn.methods import unsc",
        "from jaxunlearn.methods.unsc import UNSCConfig",
        "import jaxunlearn.methods.unsc as unsc",
        "from jaxunlearn import methods",
        "def f():\n    from jaxunlearn.methods import unsc",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jaxunlearn.methods",
        "from jaxunlearn import unsc",
        "import jaxunlearn",
    ],
)
def test_an_upward_arrow_is_found_however_it_is_written(modules, source):
    [arrow] = _upward(_arrows(modules | {"gram": source}))
    assert arrow in ("gram imports methods", "gram imports __init__")


def test_a_relative_import_is_refused(modules):
    with pytest.raises(AssertionError, match=r"write jaxunlearn\.linalg"):
        _imported("from .linalg import psd_eigh", modules)
