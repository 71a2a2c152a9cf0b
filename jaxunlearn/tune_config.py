"""Configurations of searches: a run, and which settings of its method are looked for.

A search's file is a run's and a table ``[tune]``:

    [unlearn]
    method = "scrub"
    epochs = 5                       # settings that are not searched keep these values

    [tune]
    trials = 30

    [tune.space.learning_rate]
    low = 1e-4
    high = 1e-1
    log = true

    [tune.space.order]
    choices = ["paper", "min_first"]
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any

from pydantic import Field

from jaxunlearn.config import RunConfig, apply_override, config_from_mapping, read_tables
from jaxunlearn.typed import typed

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Axis:
    """``[tune.space.KEY]``: values of one setting, a range or a list.

    A range whose ends are both integers has integers in it.
    """

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[bool | int | float | str, ...] | None = None

    def __post_init__(self) -> None:
        given = (self.low is not None, self.high is not None, self.choices is not None)
        if given not in ((True, True, False), (False, False, True)) or (given[2] and self.log):
            raise ValueError("wanted low and high (and log, if need be), or else choices")
        if self.choices is not None and len(set(self.choices)) < 2:
            raise ValueError(f"choices = {list(self.choices)}; wanted two or more different ones")
        if self.low is None or self.high is None:
            return
        if not self.low < self.high or (self.log and not self.low > 0):
            above = "0 < low < high" if self.log else "low < high"
            raise ValueError(f"low = {self.low}, high = {self.high}; wanted {above}")

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values between which all others lie, or all of them."""
        return self.choices or (self.low, self.high)


@dataclass(frozen=True)
class TuneConfig:
    """``[tune]``: the budget of a search, and its space."""

    space: dict[str, Axis]
    trials: Positive = 30
    seeds: tuple[Natural, ...] = (0,)  # of training and unlearning; a trial runs on each

    def __post_init__(self) -> None:
        if not self.space:
            raise ValueError(
                "space: empty; write a table for each setting, such as [tune.space.learning_rate]"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)}; wanted different ones, at least one")


@dataclass(frozen=True)
class Search:
    """A search to be made.

    Attributes:
      base: the run with the settings that are not searched.
      tune: budget and space.
      tables: what ``base`` was made of.
    """

    base: RunConfig
    tune: TuneConfig
    tables: Mapping[str, Any]


def load_search(path: str | Path, overrides: Sequence[str] = ()) -> Search:
    r"""Reads a search's TOML file; ``out`` defaults to ``runs/<stem of the file>``.

    Args:
      path: the file.
      overrides: ``section.key=value``, also ``tune.trials=5``.

    Raises:
      FileNotFoundError: no such file.
      ValueError: invalid TOML, or all faults of the content, one line each.

    Examples:
      >>> path = getfixture("tmp_path") / "toy.toml"
      >>> _ = path.write_text("data.forget = 3\ntune.space.energy = {low = 0.9, high = 0.99}")
      >>> search = load_search(path, ["tune.trials=5"])
      >>> search.tune.trials, search.tune.space["energy"].ends, search.base.unlearn.method
      (5, (0.9, 0.99), 'unsc')
    """
    tables = copy.deepcopy(read_tables(path))
    try:
        for override in overrides:
            apply_override(override, tables)
        if "tune" not in tables:
            raise ValueError("tune: missing; wanted a table [tune] with trials and a space")
        tune = typed(TuneConfig, tables.pop("tune"), where="tune")
        return Search(config_from_mapping(tables), tune, tables)
    except ValueError as error:
        raise ValueError(f"{path}:\n{indent(str(error), '  ')}") from error
