"""Frozen dataclasses from mappings such as TOML tables: checked, with all faults in one message."""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def typed(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """A frozen dataclass from a mapping, with TOML's types: 1 is a float too, true and "1" no 1.

    Args:
      cls: dataclass; tables are dataclass fields, ranges ``Annotated[int, Field(ge=1)]``.
      mapping: its values; missing keys take their defaults.
      where: dotted key of the mapping, for the messages.

    Raises:
      ValueError: unknown, missing or wrong keys, one line each.

    Examples:
      >>> Retrain = dataclasses.make_dataclass("Retrain", [("enabled", bool, True)])
      >>> typed(Retrain, {"enable": False}, where="retrain")
      Traceback (most recent call last):
      ValueError: retrain.enable: unknown key; did you mean retrain.enabled?
    """
    faults = list(_unknown_keys(cls, mapping, where))
    try:
        # Strict JSON knows exactly TOML's types; strict Python would refuse tables and arrays.
        value = TypeAdapter(cls).validate_json(json.dumps(mapping, default=str), strict=True)
    except ValidationError as error:
        faults += _wrong_values(error, mapping, where)
    if faults:
        raise ValueError("\n".join(faults))
    return value


def _unknown_keys(cls: type, mapping: Mapping[str, Any], where: str) -> Iterator[str]:
    fields = get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for key, value in mapping.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(fields)}"
            yield f"{prefix}{key}: unknown key; {hint}"
        elif dataclasses.is_dataclass(fields[key]) and isinstance(value, Mapping):
            yield from _unknown_keys(fields[key], value, prefix + key)


def _wrong_values(error: ValidationError, mapping: Mapping[str, Any], where: str) -> list[str]:
    """One line per key, where pydantic reports each member of a union as a fault of its own."""
    lines: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        key, got = where, cast(Any, mapping)
        for part in fault["loc"]:
            if not (isinstance(got, Mapping) and part in got):
                break  # the rest is no key: a union's member, an array's index, a missing key
            key, got = f"{key}.{part}".lstrip("."), got[part]
        message = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        message = message.replace("an object", "a table")
        if any(isinstance(part, int) for part in fault["loc"]):
            message += " in the array"
        if fault["type"] == "missing":
            missing = f"{key}.{fault['loc'][-1]}".lstrip(".")
            lines[missing] = f"{missing}: missing, and it has no default"
        elif fault["type"] == "value_error":
            lines[key] = f"{key}: {message}".removeprefix(": ")
        elif key in lines:
            lines[key] += f" or {message}"
        else:
            lines[key] = f"{key}: got {got!r} ({type(got).__name__}), wanted {message}"
    return list(lines.values())
