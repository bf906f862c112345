"""Cases as JSON: lossless, data only. A file may come from a stranger: nothing in it is executed and all is bounded.

Schema numbers only grow. A field that a later schema adds has a default that means what older files meant, so a file
once written loads for ever; SINCE names the schema with which each such field came.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fuzz.case import Case, Operation, Rollout, Update
from toy_models.spec import PPO, Batch, Layout, MoEModel, Switches

SCHEMA = 1
SINCE: dict[str, int] = {}  # "part.field" -> the schema that added it; every other field is of schema 1
MOST_CHARACTERS = 100_000
PARTS = {"layout": Layout, "model": MoEModel, "batch": Batch, "ppo": PPO, "switches": Switches}
OPERATIONS: dict[str, type[Operation]] = {"Rollout": Rollout, "Update": Update}


def to_json(case: Case) -> str:
    """The case with all fields, two spaces of indent."""
    data: dict[str, Any] = {"schema": SCHEMA}
    for name, kind in PARTS.items():
        part = getattr(case, name)
        data[name] = {f.name: getattr(part, f.name) for f in fields(kind)}
    data["program"] = [type(operation).__name__ for operation in case.program]
    data |= {name: getattr(case, name) for name in ("twin", "precision", "seed")}
    return json.dumps(data, indent=2) + "\n"


def from_json(text: str) -> Case:
    """The case that a file holds; ValueError, in one line that says what is wrong, for anything else."""
    data = _parsed(text)
    schema = _schema(data)
    _check_names("", data, {"schema", *(f.name for f in fields(Case))}, schema)
    parts = {name: _part(name, kind, data[name], schema) for name, kind in PARTS.items() if name in data}
    rest = {name: data[name] for name in ("twin", "precision", "seed") if name in data}
    return Case(**parts, **rest, program=_program(data["program"]))


def _parsed(text: str) -> Mapping[str, Any]:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"a case file of {len(text)} characters is too long; at most {MOST_CHARACTERS} are read")
    try:
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_int=_int)
    except RecursionError:
        raise ValueError("a case file is nested too deeply; a case has two levels") from None
    if not isinstance(data, dict):
        raise ValueError(f"a case file must hold a JSON object, not {type(data).__name__}")
    return data


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{_quoted(twice)} is given twice in one object")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that a case may hold")


def _int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a number of {len(digits)} digits is too large for a case")
    return int(digits)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name[:60]) for name in names[:5])


def _schema(data: Mapping[str, Any]) -> int:
    schema = data.get("schema")
    if type(schema) is not int or schema < 1:
        raise ValueError(f"schema={str(schema)[:60]!r} must be an int of 1..{SCHEMA}")
    if schema > SCHEMA:
        raise ValueError(f"schema={schema} is newer than {SCHEMA}, the newest known here; update ep-ppo-fuzz")
    return schema


def _check_names(path: str, data: Mapping[str, Any], known: set[str], schema: int) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(
            f"{path or 'the case'} has unknown fields {_quoted(unknown)}; known are {', '.join(sorted(known))}"
        )
    of_schema = {name for name in known if SINCE.get(f"{path}.{name}".lstrip("."), 1) <= schema}
    missing = sorted(of_schema - set(data))
    if missing:
        raise ValueError(f"{path or 'the case'} lacks {_quoted(missing)}, which schema {schema} has")


def _part(name: str, kind: type, data: Any, schema: int) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{name} must be a JSON object, not {type(data).__name__}")
    _check_names(name, data, {f.name for f in fields(kind)}, schema)
    for field, value in data.items():
        if isinstance(value, (list, dict)) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name}.{field} must be a plain finite value, not {str(value)[:60]}")
    return kind(**data)


def _program(names: Any) -> tuple[Operation, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) and name in OPERATIONS for name in names):
        raise ValueError(f"program={str(names)[:60]} must be a list of {', '.join(OPERATIONS)}")
    return tuple(OPERATIONS[name]() for name in names)
