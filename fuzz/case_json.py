"""Cases as JSON: lossless, data only. A file may come from a stranger: nothing in it is executed and all is bounded.

Schema numbers only grow. A field that a later schema adds has a default that means what older files meant, so a file
once written loads for ever; SINCE names the schema with which each such field came.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fuzz import memory
from fuzz.case import MOST_OPERATIONS, Case, Operation, Rollout, Update
from toy_models.spec import PPO, Batch, Layout, MoEModel, Switches

SCHEMA = 6
# "part.field" -> the schema that added it; every other field is of schema 1
SINCE = {
    **dict.fromkeys(("layout.order", "layout.split", "layout.stages", "model.dense", "model.dense_ffn"), 2),
    **dict.fromkeys(("switches.p2p", "switches.deallocate", "switches.group", "switches.forward_sp"), 2),
    **dict.fromkeys(("switches.decoder_input", "switches.padding_mask", "switches.groups", "ppo.frozen"), 2),
    **dict.fromkeys(("model.score", "model.expert_bias", "model.bias_rate", "model.scaling"), 3),
    **dict.fromkeys(("model.expert_groups", "model.group_topk", "switches.router_dtype"), 3),
    **dict.fromkeys(("model.seq_aux_loss", "model.global_aux_loss", "model.capacity", "model.pad_to_capacity"), 3),
    **dict.fromkeys(("switches.distributed", "switches.overlap_reduce", "switches.overlap_gather"), 4),
    **dict.fromkeys(("switches.align", "switches.bucket", "switches.pad_buckets", "switches.average"), 4),
    **dict.fromkeys(("switches.check_nan", "switches.count_zeros"), 4),
    **dict.fromkeys(("switches.recompute", "switches.recompute_layers", "switches.per_token"), 4),
    **dict.fromkeys(("ppo.embedding_lr", "ppo.coupled_decay", "ppo.qk_decay"), 4),
    **dict.fromkeys(("model.activation", "model.gated", "model.clamp", "model.glu_offset", "model.biases"), 5),
    **dict.fromkeys(("model.qk_norm", "model.output_gate", "model.sinks"), 5),
    **dict.fromkeys(("switches.qk_scaling", "switches.fp32_residual", "switches.deterministic"), 5),
    **dict.fromkeys(("model.drops", "model.sinkhorn"), 6),
    **dict.fromkeys(("switches.shared_overlap",), 5),
}
TUPLES = ("layout.stages", "model.dense")  # fields that are lists of ints
MOST_CHARACTERS = 100_000
MOST_SHOWN = 60  # characters of a stranger's text that a message repeats
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
    rest = {name: _plain(name, data[name]) for name in ("twin", "precision", "seed") if name in data}
    case = Case(**parts, **rest, program=_program(data["program"]))
    memory.check(case)
    return case


def _parsed(text: str) -> Mapping[str, Any]:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"a case file of {len(text)} characters is too long; at most {MOST_CHARACTERS} are read")
    try:
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_int=_int)
    except RecursionError:
        raise ValueError("a case file is nested too deeply; a case has two levels") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"a case file must be JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"a case file must hold a JSON object, not {type(data).__name__}")
    return data


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    twice = sorted(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
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
    return ", ".join(repr(name[:MOST_SHOWN]) for name in names[:5])


def _shown(value: Any) -> str:
    return type(value).__name__ if isinstance(value, (list, dict)) else repr(value)[:MOST_SHOWN]


def _plain(path: str, value: Any) -> Any:
    """The value, which must be short and flat; what it may be is checked by the field's owner."""
    if isinstance(value, (list, dict)) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{path} must be a plain finite value, not {_shown(value)}")
    if isinstance(value, str) and len(value) > MOST_SHOWN:
        raise ValueError(f"{path} is a text of {len(value)} characters; at most {MOST_SHOWN} are expected")
    return value


def _schema(data: Mapping[str, Any]) -> int:
    if "schema" not in data:
        raise ValueError(f"the case lacks 'schema', an int of 1..{SCHEMA}")
    schema = data["schema"]
    if type(schema) is not int or schema < 1:
        raise ValueError(f"schema={_shown(schema)} must be an int of 1..{SCHEMA}")
    if schema > SCHEMA:
        raise ValueError(f"schema={schema} is newer than {SCHEMA}, the newest known here; update ep-ppo-fuzz")
    return schema


def _check_names(path: str, data: Mapping[str, Any], known: set[str], schema: int) -> None:
    of_schema = {name for name in known if SINCE.get(f"{path}.{name}".lstrip("."), 1) <= schema}
    unknown, missing = sorted(set(data) - of_schema), sorted(of_schema - set(data))
    if unknown:
        has = f"{path or 'the case'} has unknown fields {_quoted(unknown)}"
        raise ValueError(f"{has}; schema {schema} knows {', '.join(sorted(of_schema))}")
    if missing:
        raise ValueError(f"{path or 'the case'} lacks {_quoted(missing)}, which schema {schema} has")


def _part(name: str, kind: type, data: Any, schema: int) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{name} must be a JSON object, not {type(data).__name__}")
    _check_names(name, data, {f.name for f in fields(kind)}, schema)
    return kind(**{field: _value(f"{name}.{field}", value) for field, value in data.items()})


def _value(path: str, value: Any) -> Any:
    if path not in TUPLES:
        return _plain(path, value)
    if not isinstance(value, list) or len(value) > MOST_SHOWN or any(type(number) is not int for number in value):
        raise ValueError(f"{path} must be a list of at most {MOST_SHOWN} ints, not {_shown(value)}")
    return tuple(value)


def _program(names: Any) -> tuple[Operation, ...]:
    if not isinstance(names, list) or len(names) > MOST_OPERATIONS:
        found = f"{len(names)} operations" if isinstance(names, list) else _shown(names)
        raise ValueError(f"program must be a list of 1..{MOST_OPERATIONS} operations, not {found}")
    for name in names:
        if not isinstance(name, str) or name not in OPERATIONS:
            raise ValueError(f"program has {_shown(name)}; operations are {', '.join(OPERATIONS)}")
    return tuple(OPERATIONS[name]() for name in names)
