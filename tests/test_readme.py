"""README and docs: the code runs, the commands parse, links and tables hold.

Blocks marked ``python`` are run, all of a page in one namespace, in a folder that has the
repository's configs, examples and benchmarks and the files that the page shows: a block whose first
line is a comment with a file name. ``python no-run`` is not run. Numbers are not compared.
"""

import doctest
import inspect
import json
import pkgutil
import re
import shlex
import sys
import textwrap
import tomllib
import types
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from jaxunlearn.audit_config import AuditConfig
from jaxunlearn.cli import app
from jaxunlearn.compare_config import CompareConfig
from jaxunlearn.config import RunConfig, config_from_mapping, fingerprint, to_mapping
from jaxunlearn.evaluation.membership import SVCAttack
from jaxunlearn.methods import (
    METHODS,
    DeepUnlearningConfig,
    DimensionalAlignmentConfig,
    ForgetVectorsConfig,
    UNSCConfig,
)
from jaxunlearn.models import MODELS
from jaxunlearn.preparation import prepare
from jaxunlearn.report import example_arrays
from jaxunlearn.tune_config import TuneConfig
from jaxunlearn.typed import typed

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
PAPERS = ("unsc", "deep_unlearning", "dimensional_alignment", "forget_vectors")
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)``` *$", re.M | re.S
)
DOCTESTS = doctest.DocTestRunner(
    verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
)
SHELLS = ("bash", "console", "sh", "shell")


class Block(NamedTuple):
    """A fenced block: the words after the fence, its text, and the line at which that begins."""

    info: list[str]
    text: str
    line: int

    @property
    def file_name(self):
        """Name in a first line such as ``# my_models.py``."""
        match = re.match(r"# (\w+\.\w+)\n", self.text)
        return match and match[1]


def _blocks(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            match["info"].split(),
            textwrap.dedent(match["text"]),
            text[: match.start()].count("\n") + 1,
        )
        for match in FENCE.finditer(text)
    ]


def _prose(page):
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def _spans(page):
    """Inline code."""
    return re.findall(r"`([^`\n]+)`", _prose(page))


def _commands(page):
    """Command lines as words: of shell blocks (``$ `` before them in ``console``) and inline."""
    lines = [span for span in _spans(page) if span.startswith("jaxunlearn ")]
    for block in _blocks(page):
        if block.info[:1] and block.info[0] in SHELLS:
            joined = block.text.replace("\\\n", " ").splitlines()
            prompted = [line[2:] for line in joined if line.startswith("$ ")]
            lines += prompted if block.info[0] == "console" else joined
    words = [shlex.split(line, comments=True) for line in lines]
    while_set = re.compile(r"\w+=")
    return [
        line[next(i for i, w in enumerate(line) if not while_set.match(w)) :]
        for line in words
        if line
    ]


def _with(kind):
    """Pages in which something is found, with what is found."""
    return [pytest.param(page, found, id=page.name) for page in PAGES if (found := kind(page))]


def _python(page):
    return [
        block
        for block in _blocks(page)
        if block.info[:1] == ["python"] and "no-run" not in block.info
    ]


def _toml(page):
    return [block for block in _blocks(page) if block.info[:1] == ["toml"]]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Makes the working folder of a page."""

    def enter(page):
        for shown in ("benchmarks", "configs", "examples"):
            if (ROOT / shown).exists():
                (tmp_path / shown).symlink_to(ROOT / shown)
        for block in _blocks(page):
            if block.file_name:
                (tmp_path / block.file_name).write_text(block.text)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path

    return enter


def test_there_is_a_readme_and_an_index_of_the_docs():
    assert PAGES[0].exists()
    index = (ROOT / "docs" / "index.md").read_text()
    assert not [
        page.name
        for page in DOCS
        if page.name not in (*re.findall(r"\((.*?)\)", index), "index.md")
    ]


@pytest.mark.parametrize(("page", "blocks"), _with(_python))
def test_code_runs(page, blocks, workspace, monkeypatch, capsys):
    workspace(page)
    module = types.ModuleType(f"code_of_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where classes look for their home
    for block in blocks:
        if ">>> " in block.text:
            case = doctest.DocTestParser().get_doctest(
                block.text, module.__dict__, page.name, str(page), block.line
            )
            report = []
            DOCTESTS.run(case, out=report.append, clear_globs=False)
            assert not report, "".join(report)
            module.__dict__.update(case.globs)  # the parser took a copy
        else:
            # Empty lines first, for the right line numbers in a traceback.
            source = "\n" * block.line + block.text
            exec(compile(source, str(page), "exec"), module.__dict__)
    if "training" in (report := getattr(module, "report", {})):  # of a real run
        _check_keys(report)


@pytest.mark.parametrize(("page", "blocks"), _with(_toml))
def test_shown_configs_are_valid(page, blocks, workspace):
    workspace(page)
    for block in blocks:
        tables = tomllib.loads(block.text)
        tables.setdefault("data", {}).setdefault("forget", 3)
        _check(config_from_mapping(tables), checked := {})
        assert checked


@pytest.mark.parametrize(("page", "commands"), _with(_commands))
def test_commands_parse_and_name_what_exists(page, commands, workspace, monkeypatch):
    folder = workspace(page)
    checked = {}
    monkeypatch.setattr("jaxunlearn.experiment.run", lambda config, **_: _check(config, checked))
    monkeypatch.setattr("jaxunlearn.compare.compare", _check_comparison)
    monkeypatch.setattr("jaxunlearn.tune.tune", _check_search)
    monkeypatch.setattr("jaxunlearn.auditing.run_audit", _check_audit)
    for command in commands:
        for word in command:
            if word.endswith((".py", ".toml")):
                assert (folder / word).exists(), f"{word} of {shlex.join(command)}"
        if command[:2] == ["python", "-m"] and command[2].startswith("benchmarks"):
            assert (folder / f"{command[2].replace('.', '/')}.py").exists(), shlex.join(command)
        if command[0] == "jaxunlearn" and "CONFIG" not in command:
            result = CliRunner().invoke(app, command[1:])
            assert not result.exit_code, f"{shlex.join(command)}\n{result.output}"


def _check(config, checked):
    """Everything of a run up to its first computation; for data that may not be here, less."""
    key = fingerprint(to_mapping(config) | {"out": ""})
    if key not in checked:
        kind = METHODS[config.unlearn.method].config
        checked[key] = typed(kind, config.unlearn.options, where="unlearn")
        given = (config.train.checkpoint, config.train.weights, config.retrain.checkpoint)
        if config.data.source == "digits" and not any(given):
            prepare(config)


def _check_comparison(comparison, **_):
    for entry in comparison.entries:
        unlearn = entry.unlearn if entry.skip is None else comparison.base.unlearn
        _check(replace(comparison.base, unlearn=unlearn), {})
    return {"summary": []}


def _check_search(search, **_):
    for key, axis in search.tune.space.items():
        for value in axis.ends:
            options = search.base.unlearn.options | {key: value}
            _check(replace(search.base, unlearn=replace(search.base.unlearn, options=options)), {})
    return {"best": {"gap": 0.0, "settings": {}}}


def _check_audit(asked, **_):
    for entry in asked.entries:
        _check(replace(asked.base, unlearn=entry.unlearn), {})
    return {"goal": asked.settings.goal, "verdict": {}, "reasons": {}}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", _prose(file), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_package_exist(page):
    for span in _spans(page):
        if re.fullmatch(r"jaxunlearn(\.\w+)+", span):
            pkgutil.resolve_name(span)


def _rows(text):
    """Cells of the rows of a text's tables, by their first cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    # A bar inside inline code or written \| ends no cell.
    table = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return {cells[0].strip().strip("`"): [cell.strip() for cell in cells[1:]] for cells in table}


def _defaults(config, prefix=""):
    """Dotted key to default, of a dataclass and the dataclasses in it; none for free options."""
    found = {}
    for field in fields(config):
        if is_dataclass(field.type):
            found |= _defaults(field.type, f"{prefix}{field.name}.")
        elif field.name != "options":
            default = field.default
            if field.default_factory is not MISSING:
                default = field.default_factory()
            found[prefix + field.name] = "required" if default is MISSING else _written(default)
    return found


def _written(value):
    return "none" if value is None else f"`{json.dumps(value)}`"


@pytest.mark.parametrize(
    ("page", "config"),
    [
        ("configuration.md", RunConfig),
        ("how-to-compare.md", CompareConfig),
        ("how-to-compare.md", TuneConfig),
        ("audit.md", AuditConfig),
        ("unsc.md", UNSCConfig),
        ("deep-unlearning.md", DeepUnlearningConfig),
        ("dimensional-alignment.md", DimensionalAlignmentConfig),
        ("forget-vectors.md", ForgetVectorsConfig),
    ],
    ids=["configuration", "compare", "tune", "audit", *PAPERS],
)
def test_every_setting_is_documented_with_its_default(page, config):
    _check_settings(_rows((ROOT / "docs" / page).read_text(encoding="utf-8")), config, page)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in PAPERS])
def test_every_baseline_has_a_section_with_its_settings(name):
    """A heading of second order that ends with the name in code, on one of the pages."""
    heading = rf"^## [^\n]*`{name}`\n(.*?)(?=^## |\Z)"
    found = [re.search(heading, page.read_text(encoding="utf-8"), re.M | re.S) for page in PAGES]
    (section,) = [match[1] for match in found if match]
    _check_settings(_rows(section), METHODS[name].config, f"the section on {name}")


def _check_settings(rows, config, where):
    for key, default in _defaults(config).items():
        assert key in rows, f"{where} has no row for {key}"
        assert default in rows[key], f"{key}: {rows[key]}, wanted {default}"


def test_every_network_is_documented_with_its_options():
    rows = _rows((ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"))
    for name, network in MODELS.items():
        options = {
            key: parameter.default
            for key, parameter in inspect.signature(network).parameters.items()
            if key not in ("num_classes", "parent", "name")
        }
        shown = ", ".join(f"`{key} = {json.dumps(value)}`" for key, value in options.items())
        assert rows[name] == [shown]


def test_every_array_and_every_outcome_of_the_attack_is_documented():
    assert not {*example_arrays(), *SVCAttack._fields} - _named_in_report_page()


def _check_keys(report):
    """Every key of a report stands on its page, but those that name settings, layers, classes."""
    method, environment = report["method"], report["environment"]
    layer = next(iter(method["info"]["layers"].values()))
    report = report | {
        "config": {},
        "environment": environment | {"versions": {}},
        "method": method | {"config": {}, "info": method["info"] | {"layers": None, "one": layer}},
    }
    assert not sorted({*_keys(report)} - _named_in_report_page() - {"one"})


def _named_in_report_page():
    spans = _spans(ROOT / "docs" / "report.md")
    return {word for span in spans for word in re.findall(r"\w+", span)}


def _keys(tree):
    if isinstance(tree, dict):
        yield from tree
        tree = [branch for key, branch in tree.items() if key not in ("da_per_class", "layers")]
    if isinstance(tree, list):
        for branch in tree:
            yield from _keys(branch)


def test_the_changelog_gives_a_reason_for_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert not sorted(name for name in names if f"`{name}`" not in changelog)
