"""Configurations of several runs: one problem, several methods and seeds; or a search.

A comparison's file is a run's without ``[unlearn]``, and a table ``[compare]``:

    [compare]
    seeds = [0, 1, 2]

    [compare.methods.finetune]              # the row's title, and the method of that name
    epochs = 5

    [compare.methods."SSD, per example"]    # or a method named by the key method
    method = "dampening"
    importance = "per_sample"

    [compare.methods.influence]
    skip = "an hour a run"                  # a row that says so
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any

from pydantic import Field

from jaxunlearn.config import (
    RunConfig,
    UnlearnConfig,
    apply_override,
    config_from_mapping,
    read_tables,
)
from jaxunlearn.typed import typed

Natural = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class CompareConfig:
    """``[compare]``: who is compared, and over which seeds of training and unlearning."""

    methods: dict[str, dict[str, Any]]
    seeds: tuple[Natural, ...] = (0,)

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError(
                "methods: none; write a table for each, such as [compare.methods.finetune]"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)}; wanted different ones, at least one")


@dataclass(frozen=True)
class Entry:
    """A method of a comparison.

    Attributes:
      title: of its rows.
      unlearn: the method and its settings.
      skip: why it is not run, or None.
    """

    title: str
    unlearn: UnlearnConfig
    skip: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A comparison to be made.

    Attributes:
      base: the run of the first seed, with a method that does nothing.
      entries: the methods.
      seeds: of the runs.
    """

    base: RunConfig
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...] = field(default=(0,))


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    r"""Reads a comparison's TOML file; ``out`` defaults to ``runs/<stem of the file>``.

    Args:
      path: the file.
      overrides: ``section.key=value``, also ``compare.seeds=[0]``.

    Raises:
      FileNotFoundError: no such file.
      ValueError: invalid TOML, or all faults of the content, one line each.

    Examples:
      >>> path = getfixture("tmp_path") / "toy.toml"
      >>> _ = path.write_text("[data]\nforget = 3\n[compare.methods.finetune]\nepochs = 5")
      >>> comparison = load_comparison(path)
      >>> comparison.entries[0].unlearn, comparison.seeds
      (UnlearnConfig(method='finetune', options={'epochs': 5}), (0,))
    """
    tables = read_tables(path)
    try:
        return comparison_from_mapping(tables, overrides)
    except ValueError as error:
        raise ValueError(f"{path}:\n{indent(str(error), '  ')}") from error


def comparison_from_mapping(
    mapping: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Comparison:
    """The comparison that a mapping like that of a TOML file describes.

    Examples:
      >>> tables = {"data": {"forget": 3}, "compare": {"methods": {"unsc": {}}}}
      >>> comparison_from_mapping(tables, ["compare.seeds=[1, 2]"]).seeds
      (1, 2)
    """
    tables = copy.deepcopy(dict(mapping))
    ours = [text for text in overrides if text.strip().startswith("compare.")]
    if "unlearn" in tables or any(text.strip().startswith("unlearn") for text in overrides):
        raise ValueError(
            "unlearn: a comparison has none; write a table [compare.methods.NAME] for each method"
        )
    if "compare" not in tables:
        raise ValueError("compare: missing; wanted a table [compare] with seeds and methods")
    section = {"compare": tables.pop("compare")}
    for override in ours:
        apply_override(override, section)
    compare = typed(CompareConfig, section["compare"], where="compare")
    entries = tuple(entry_of(title, table) for title, table in compare.methods.items())
    shared = [text for text in overrides if text not in ours]
    own = {"unlearn": {"method": "identity"}, "seed": compare.seeds[0]}
    base = config_from_mapping(tables | own, shared)
    return Comparison(base, entries, compare.seeds)


def entry_of(title: str, table: Mapping[str, Any]) -> Entry:
    """A method of a comparison, of the table under its title."""
    options = dict(table)
    method, skip = options.pop("method", title), options.pop("skip", None)
    return Entry(title, UnlearnConfig(method, options), skip)
