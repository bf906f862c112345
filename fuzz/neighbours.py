"""The cases next to a case: one dimension up or down, what hangs on it moved along as little as possible.

Knows the parts of a case and the values there are to draw; runs nothing. What a law is (`twin`, `program`) is no
dimension.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import lcm
from typing import Any

from fuzz.case import Case
from fuzz.order import micro_batches
from fuzz.space import EPSILONS, VALUES, WORLDS, rates, values_of

PARTS = ("layout", "model", "batch", "ppo", "switches")

# Dimensions by the names that maintainers use, in the order of what tells most.
LAYOUT = {"EP": "ep", "TP": "tp", "ETP": "etp", "ranks": "world"}
SIZES = {
    "experts": "experts",
    "top-k": "top_k",
    "layers": "layers",
    "micro-batches": "micro_batches",
    "rows per micro-batch": "micro_rows",
    "prompt": "prompt",
    "response": "response",
    "mini-batches": "mini_batches",
    "epochs": "epochs",
    "seed": "seed",
}
SETTINGS = (*VALUES, "eps", "heads", "kv_heads", "ffn", "shared_ffn", "vocab")
DIMENSIONS = LAYOUT | SIZES | {name: name for name in SETTINGS}

# The least value of what is counted, what it is a multiple of, and how many times at least.
LEAST = {"experts": 2, "vocab": 8, "seed": 0}
TIMES = {"ffn": 2, "shared_ffn": 2}
STEP = {"experts": "ep", "kv_heads": "tp", "heads": "kv_heads", "ffn": "etp", "shared_ffn": "tp", "vocab": "tp"}


@dataclass(frozen=True)
class Neighbour:
    """A case that differs in one dimension; `along` has what else had to move."""

    dimension: str
    direction: str  # 'down' or 'up'
    value: Any
    case: Case
    along: tuple[tuple[str, Any], ...] = ()


def value_of(case: Case, dimension: str) -> Any:
    """Where a case stands in a dimension."""
    return _values(case)[DIMENSIONS[dimension]]


def neighbours(case: Case) -> list[Neighbour]:
    """The next valid case down and up in every dimension that can move alone, the most telling first; never raises."""
    return list(_neighbours(case))


def _neighbours(case: Case) -> Iterator[Neighbour]:
    values = _values(case)
    for dimension, field in DIMENSIONS.items():
        for direction, value in _next(field, values).items():
            other = moved(case, **{field: value}, **_same_rate(case, field, value))
            if other is not None:
                yield Neighbour(dimension, direction, value, other, _along(case, other, field))


def _values(case: Case) -> dict[str, Any]:
    """Every field of a case under its name. Rows as micro-batches, which a layout does not change."""
    parts = [getattr(case, part) for part in PARTS]
    flat = {f.name: getattr(part, f.name) for part in parts for f in fields(part)}
    flat["micro_batches"] = micro_batches(case)
    return flat | {"precision": case.precision, "seed": case.seed}


def _next(field: str, values: dict[str, Any]) -> dict[str, Any]:
    """The value before and the value after, as they would be drawn."""
    here = values[field]
    if field in LAYOUT.values():
        both = {"down": here // 2 if here % 2 == 0 else None, "up": here * 2 if here < WORLDS[-1] else None}
    elif field in (*VALUES, "eps"):
        both = _listed(here, values_of(field, values["optimizer"], values["precision"]))
    else:
        step = values[STEP[field]] if field in STEP else 1
        least = max(LEAST.get(field, 1), step * TIMES.get(field, 0))
        both = {"down": here - step if here - step >= least else None, "up": here + step}
    return {direction: value for direction, value in both.items() if value is not None}


def _listed(here: Any, bag: tuple[Any, ...]) -> dict[str, Any]:
    """One that is not in the bag lies above its first value."""
    if here not in bag:
        return {"down": bag[0]} if bag else {}
    place = bag.index(here)
    return {"down": bag[place - 1] if place else None, "up": bag[place + 1] if place + 1 < len(bag) else None}


def moved(case: Case, **changes: Any) -> Case | None:
    """The case with fields changed and the rest fitted to them; None where that cannot be."""
    try:
        made = _made(case, _fitted(_values(case) | changes))
    except ValueError:
        return None
    kept = all(_values(made)[field] == value for field, value in changes.items())
    return made if kept and made != case else None


def _same_rate(case: Case, field: str, value: Any) -> dict[str, Any]:
    """What belongs to another optimizer or precision: the same place among its learning rates; an eps that it bears."""
    if field == "precision" and case.ppo.eps not in EPSILONS[value]:
        return {"eps": EPSILONS[value][0]}
    if field != "optimizer":
        return {}
    same = dict(zip(rates(case.ppo.optimizer), rates(value), strict=True))
    lr, critic_lr = case.ppo.lr, case.ppo.critic_lr
    return {"lr": same.get(lr, lr), "critic_lr": same.get(critic_lr, critic_lr), "momentum": 0.0}


def _fitted(values: dict[str, Any]) -> dict[str, Any]:
    """What must fit the layout, the family or one another, moved up to the next value that does."""
    v = dict(values)
    dense = v["tp"] * v["cp"] * v["pp"]
    v["world"] = lcm(v["world"], dense, v["ep"] * v["etp"] * v["pp"])
    for name, of in STEP.items():
        v[name] = _up_to(v[name], v[of])
    mixtral, qwen3 = v["family"] == "mixtral", v["family"] == "qwen3moe"
    v["top_k"] = max(1 + mixtral, min(v["top_k"], v["experts"]))
    v["norm_topk_prob"] = mixtral or (v["norm_topk_prob"] and v["top_k"] > 1)
    v["shared_ffn"] = (v["shared_ffn"] or 2 * v["tp"]) if v["family"] == "qwen2moe" else 0
    v["hidden"] = v["hidden"] if qwen3 else v["heads"] * v["head_dim"]
    v["rows"] = v["micro_batches"] * v["mini_batches"] * (v["world"] // dense) * v["micro_rows"]
    return v


def _up_to(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


def _made(case: Case, values: dict[str, Any]) -> Case:
    parts = {part: _remade(getattr(case, part), values) for part in PARTS}
    return replace(case, **parts, precision=values["precision"], seed=values["seed"])


def _remade(part: Any, values: dict[str, Any]) -> Any:
    return replace(part, **{f.name: values[f.name] for f in fields(part)})


def _along(case: Case, other: Case, field: str) -> tuple[tuple[str, Any], ...]:
    """What else differs and can be named; rows follow from the layout."""
    before, after = _values(case), _values(other)
    return tuple((name, after[name]) for name in after if after[name] != before[name] and name not in (field, "rows"))
