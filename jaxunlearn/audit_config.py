"""Configurations of audits: one problem, families of models, methods.

An audit's file is a run's without ``[unlearn]``, and a table ``[audit]``:

    [audit]
    goal = "untraining"        # mandatory, see docs/audit.md
    models = 32                # N original, N unlearned per method, 2 N retrained

    [audit.methods.unsc]       # title, and the method of that name; its settings
    learning_rate = 0.3
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxunlearn.compare_config import Entry, entry_of
from jaxunlearn.config import RunConfig, apply_override, config_from_mapping, read_tables
from jaxunlearn.typed import typed

Positive = Annotated[int, Field(ge=1)]
CONTROLS = ("original", "retrained", "do_nothing", "head_edit")
_STORED = ("logits", "null")  # before the names of arrays in audit.npz, as titles are


@dataclass(frozen=True)
class AuditConfig:
    """``[audit]``: which claim is tested, of which methods, and with how many models."""

    goal: Literal["untraining", "unlearning"]
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: Annotated[int, Field(ge=8)] = 32  # N in a family
    examples: Annotated[int, Field(ge=10)] = 1000  # at most, of each split
    permutations: Annotated[int, Field(ge=99)] = 999
    bootstraps: Annotated[int, Field(ge=100)] = 1000

    def __post_init__(self) -> None:
        if taken := [title for title in self.methods if title in CONTROLS]:
            raise ValueError(f"methods: {taken} are the names of controls; choose other titles")
        if taken := [title for title in self.methods if title in _STORED]:
            raise ValueError(f"methods: {taken} are names in audit.npz; choose other titles")


@dataclass(frozen=True)
class Audit:
    """An audit to be made.

    Attributes:
      base: the run, with a method that does nothing.
      entries: the methods.
      settings: of the audit.
    """

    base: RunConfig
    entries: tuple[Entry, ...]
    settings: AuditConfig


def load_audit(path: str | Path, overrides: Sequence[str] = ()) -> Audit:
    r"""Reads an audit's TOML file; ``out`` defaults to ``runs/<stem of the file>``.

    Args:
      path: the file.
      overrides: ``section.key=value``, also ``audit.models=16``.

    Raises:
      FileNotFoundError: no such file.
      ValueError: invalid TOML, or all faults of the content, one line each.

    Examples:
      >>> path = getfixture("tmp_path") / "toy.toml"
      >>> _ = path.write_text('[data]\nforget = 3\n[audit]\ngoal = "untraining"')
      >>> load_audit(path, ["audit.models=16"]).settings.models
      16
    """
    tables = read_tables(path)
    try:
        return audit_from_mapping(tables, overrides)
    except ValueError as error:
        raise ValueError(f"{path}:\n{indent(str(error), '  ')}") from error


def audit_from_mapping(mapping: Mapping[str, Any], overrides: Sequence[str] = ()) -> Audit:
    """The audit that a mapping like that of a TOML file describes.

    Examples:
      >>> tables = {"data": {"forget": 3}, "audit": {"goal": "unlearning", "methods": {"unsc": {}}}}
      >>> audit_from_mapping(tables).entries[0].title
      'unsc'
    """
    tables = copy.deepcopy(dict(mapping))
    if "unlearn" in tables or any(text.strip().startswith("unlearn") for text in overrides):
        raise ValueError(
            "unlearn: an audit has none; write a table [audit.methods.NAME] for each method"
        )
    for override in overrides:
        apply_override(override, tables)
    if "audit" not in tables:
        raise ValueError('audit: missing; wanted a table [audit] with goal = "untraining", say')
    settings = typed(AuditConfig, tables.pop("audit"), where="audit")
    entries = tuple(entry_of(title, table) for title, table in settings.methods.items())
    if skipped := [entry.title for entry in entries if entry.skip is not None]:
        raise ValueError(f"audit.methods: skip in {skipped} is for comparisons; leave them out")
    base = config_from_mapping(tables | {"unlearn": {"method": "identity"}})
    given = (base.train.checkpoint, base.train.weights, base.retrain.checkpoint)
    if not base.retrain.enabled or any(given) or base.train.patience:
        raise ValueError(
            "an audit trains all of its models, for all of their epochs: leave out checkpoint, "
            "weights and patience of [train] and [retrain], and retrain.enabled = false"
        )
    return Audit(base, entries, settings)
