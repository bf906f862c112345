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
from fuzz.space import EPSILONS, VALUES, WORLDS, rates, recomputing, reducing, values_of
from toy_models.coordinates import stages
from toy_models.spec import NORMALISED, OWN_HEAD_DIM, SHARED, Layout, groupings

PARTS = ("layout", "model", "batch", "ppo", "switches")

# Dimensions by the names that maintainers use, in the order of what tells most.
LAYOUT = {"EP": "ep", "TP": "tp", "ETP": "etp", "PP": "pp", "VPP": "vpp", "CP": "cp", "ranks": "world"}
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
# Of these there is no list: what is simplest, and what says most beside it.
CUT = ("split", "dense", "group", "expert_groups", "group_topk")
WIDTHS = ("heads", "kv_heads", "ffn", "shared_ffn", "dense_ffn", "vocab")
SETTINGS = (*VALUES, "eps", *CUT, *WIDTHS)
DIMENSIONS = LAYOUT | SIZES | {name: name for name in SETTINGS}

# The least value of what is counted, what it is a multiple of, and how many times at least.
LEAST = {"experts": 2, "vocab": 8, "seed": 0}
TIMES = {"ffn": 2, "shared_ffn": 2}
STEP = {"experts": "ep", "ffn": "etp", "shared_ffn": "tp", "dense_ffn": "tp", "vocab": "tp"}
EFFECT = {"order": "world", "p2p": "pp", "deallocate": "pp"}  # what must be above 1, else a setting does nothing


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
    return flat(case)[DIMENSIONS[dimension]]


def neighbours(case: Case) -> list[Neighbour]:
    """The next valid case down and up in every dimension that can move alone, the most telling first; never raises."""
    return list(_neighbours(case))


def _neighbours(case: Case) -> Iterator[Neighbour]:
    here = flat(case)
    for dimension, field in DIMENSIONS.items():
        for direction, value in _next(field, here).items():
            other = moved(case, **{field: value}, **_with(case, field, value))
            if other is not None:
                yield Neighbour(dimension, direction, value, other, _along(case, other, field))


def flat(case: Case) -> dict[str, Any]:
    """Every field of a case under its name. Rows as micro-batches, which a layout does not change."""
    parts = [getattr(case, part) for part in PARTS]
    flat = {f.name: getattr(part, f.name) for part in parts for f in fields(part)}
    flat["micro_batches"] = micro_batches(case)
    return flat | {"precision": case.precision, "seed": case.seed}


def _next(field: str, values: dict[str, Any]) -> dict[str, Any]:
    """The value before and the value after, as they would be drawn."""
    here = values[field]
    if field in LAYOUT.values() and field != "vpp":
        both = {"down": here // (2 if here % 2 == 0 else 3) or None, "up": here * 2 if here < WORLDS[-1] else None}
    elif field in (*VALUES, "eps"):
        both = _listed(here, values_of(field, values["optimizer"], values["precision"]))
    elif field == "kv_heads":
        both = _heads_below_and_above(here, values["tp"])
    else:
        both = _cut(field, values) if field in CUT else _counted(field, values)
    if field in EFFECT and values[EFFECT[field]] == 1:
        both = both | {"up": None}
    return {direction: value for direction, value in both.items() if value is not None}


def _counted(field: str, values: dict[str, Any]) -> dict[str, Any]:
    here, step = values[field], _step(field, values)
    down, least = (here - 1) // step * step, max(LEAST.get(field, 1), step * TIMES.get(field, 0))
    return {"down": down if down >= least else None, "up": here // step * step + step}


def _step(field: str, values: dict[str, Any]) -> int:
    """What a number must be a multiple of."""
    if field == "layers":
        return int(values["pp"] * values["vpp"])
    if field == "heads":
        return lcm(values["kv_heads"], values["tp"])
    return int(values[STEP[field]]) if field in STEP else 1


def _heads_below_and_above(here: int, tp: int) -> dict[str, Any]:
    """Query groups are a divisor or a multiple of TP."""
    fewer, more = [n for n in range(1, tp) if tp % n == 0], range(tp, here + 2 * tp, tp)
    every = [*fewer, *more]
    return {"down": max((n for n in every if n < here), default=None), "up": min(n for n in every if n > here)}


def _cut(field: str, values: dict[str, Any]) -> dict[str, Any]:
    here = values[field]
    if field == "split":
        return {"down": None if here == "even" else "even", "up": None if here == "list" else "list"}
    if field == "dense":
        return {"down": () if here else None, "up": None if here else (0,)}
    if field in ("expert_groups", "group_topk"):
        return _grouped(field, values)
    groups = [g for g in range(values["pp"], values["micro_batches"] + 1) if values["vpp"] > 1 and _groups(values, g)]
    both = _listed(here or values["pp"], tuple(groups))
    return {name: 0 if group == values["pp"] else group for name, group in both.items()}


def _grouped(field: str, values: dict[str, Any]) -> dict[str, Any]:
    """The groups of experts of which there are fewest, with no limit to how many are chosen; and such a limit."""
    pairs, here = groupings(values["experts"], values["top_k"]), values[field]
    limits = [limit for groups, limit in pairs if groups == values["expert_groups"]]
    most = pairs[0][0] if field == "expert_groups" else max(limits, default=None)
    return {"down": 0 if here else None, "up": None if here else most}


def _groups(values: dict[str, Any], group: int) -> bool:
    """Whether the interleaved schedule can take the micro-batches in groups of so many."""
    rest = values["micro_batches"] % group
    return bool(values["pp"] <= group <= values["micro_batches"] and (rest == 0 or rest >= values["pp"]))


def _listed(here: Any, bag: tuple[Any, ...]) -> dict[str, Any]:
    """One that is not in the bag lies above its first value."""
    if here not in bag:
        return {"down": bag[0]} if bag else {}
    place = bag.index(here)
    return {"down": bag[place - 1] if place else None, "up": bag[place + 1] if place + 1 < len(bag) else None}


def fitted(case: Case, **changes: Any) -> Case | None:
    """The case with fields changed, as far as they fit, and the rest fitted to them; None where that cannot be."""
    few = "kv_heads" in changes or case.model.kv_heads < case.layout.tp
    try:
        made = _made(case, _fitted(flat(case) | changes, few))
    except ValueError:
        return None
    return made if made != case else None


def moved(case: Case, **changes: Any) -> Case | None:
    """As `fitted`; None also where a change does not fit."""
    made = fitted(case, **changes)
    kept = made is not None and all(flat(made)[field] == value for field, value in changes.items())
    return made if kept else None


def _with(case: Case, field: str, value: Any) -> dict[str, Any]:
    """What belongs to another optimizer or precision: the same place among its learning rates; an eps that it bears.

    And to a list of stages, the layers of each as they are.
    """
    if field == "split" and value == "list":
        return {"stages": stages(case.layout, case.model.layers)}
    if field == "precision" and case.ppo.eps not in EPSILONS[value]:
        return {"eps": EPSILONS[value][0]}
    if field != "optimizer":
        return {}
    same = dict(zip(rates(case.ppo.optimizer), rates(value), strict=True))
    lr, critic_lr = case.ppo.lr, case.ppo.critic_lr
    return {"lr": same.get(lr, lr), "critic_lr": same.get(critic_lr, critic_lr), "momentum": 0.0}


def _fitted(values: dict[str, Any], few: bool) -> dict[str, Any]:
    """What must fit the layout, the family or one another, moved up to the next value that does.

    `few` allows fewer query groups than TP ranks.
    """
    v = dict(values)
    dense, expert = v["tp"] * v["cp"] * v["pp"], v["ep"] * v["etp"] * v["pp"]
    v["world"] = lcm(v["world"], dense, expert)
    for name, of in STEP.items():
        v[name] = _up_to(v[name], v[of])
    if v["pp"] > 1 and dense != expert and not v["order"].endswith("-pp"):
        v["order"] = Layout().order
    if v["tp"] > 1 and not v["order"].startswith("tp-"):
        v["groups"] = "global" if v["groups"] == "global" else "explicit"
    _fit_pipeline(v)
    _fit_heads(v, few)
    _fit_family(v)
    balanced = any(v[name] for name in ("aux_loss", "seq_aux_loss", "global_aux_loss", "z_loss"))
    v |= reducing(v["optimizer"], balanced, v) | recomputing(v["recompute"], v["recompute_layers"])
    v["coupled_decay"] = v["coupled_decay"] and v["optimizer"] == "adam"
    v["rows"] = v["micro_batches"] * v["mini_batches"] * (v["world"] // dense) * v["micro_rows"]
    return v


def _fit_pipeline(v: dict[str, Any]) -> None:
    """Virtual stages, how the layers are cut and how micro-batches go through; a cut that fits no more becomes even."""
    v["vpp"] = v["vpp"] if v["pp"] > 1 else 1
    number = v["pp"] * v["vpp"]
    if v["split"] == "even" or len(v["stages"]) != number or sum(v["stages"]) != v["layers"]:
        v |= {"split": "even", "stages": (), "layers": _up_to(v["layers"], number)}
    if v["vpp"] == 1:
        return v.update(group=0, p2p="batched" if v["p2p"] == "batched" else "plain")
    v["micro_batches"] = max(v["micro_batches"], v["pp"])
    sizes = (v["group"] or v["pp"], *range(v["pp"], v["micro_batches"] + 1))
    fits = next(group for group in sizes if _groups(v, group))
    return v.update(group=fits if fits > v["pp"] else 0)


def _fit_heads(v: dict[str, Any], few: bool) -> None:
    tp = v["tp"]
    cannot = v["kv_heads"] % tp and (not few or tp % v["kv_heads"])
    v["kv_heads"] = _up_to(v["kv_heads"], tp) if cannot else v["kv_heads"]
    v["heads"] = _up_to(v["heads"], _step("heads", v))
    if (v["heads"] + 2 * v["kv_heads"]) * v["head_dim"] % tp:
        v["kv_heads"] = _up_to(v["kv_heads"], tp)
        v["heads"] = _up_to(v["heads"], v["kv_heads"])


def _fit_family(v: dict[str, Any]) -> None:
    mixtral, sigmoid = v["family"] in NORMALISED, v["score"] == "sigmoid"
    v["top_k"] = max(1 + mixtral, min(v["top_k"], v["experts"]))
    v["norm_topk_prob"] = (mixtral or sigmoid or v["norm_topk_prob"]) and v["top_k"] > 1
    v["shared_ffn"] = (v["shared_ffn"] or 2 * v["tp"]) if v["family"] in SHARED else 0
    v["biases"] = v["biases"] and v["etp"] == 1 and not v["shared_ffn"]
    v["shared_overlap"] = v["shared_overlap"] and v["dispatcher"] == "alltoall" and v["shared_ffn"] > 0
    v["shared_overlap"] = v["shared_overlap"] and v["recompute"] not in ("shared_experts", "all")
    v["clamp"], v["glu_offset"] = (v["clamp"], v["glu_offset"]) if v["gated"] else (0.0, 0.0)
    v["expert_bias"] = v["expert_bias"] if sigmoid else 0.0
    v["bias_rate"] = v["bias_rate"] if v["expert_bias"] else 0.0
    v["drops"] = v["drops"] if v["capacity"] else "probs"
    v["pad_to_capacity"] = v["pad_to_capacity"] and 0 < v["capacity"] * v["top_k"] <= v["experts"]
    v["expert_groups"] = 0 if v["expert_groups"] and v["experts"] % v["expert_groups"] else v["expert_groups"]
    within_groups = (v["expert_groups"], v["group_topk"]) in groupings(v["experts"], v["top_k"])
    v["group_topk"] = v["group_topk"] if within_groups else 0
    v["hidden"] = v["hidden"] if v["family"] in OWN_HEAD_DIM else v["heads"] * v["head_dim"]
    losses = v["aux_loss"] or v["seq_aux_loss"] or v["global_aux_loss"]
    other = sigmoid or v["norm_topk_prob"] or v["scaling"] != 1 or v["group_topk"] or v["capacity"] or losses
    v["sinkhorn"] = v["sinkhorn"] and not other
    within = [layer for layer in v["dense"] if layer < v["layers"]]
    v["dense"] = () if mixtral else tuple(within[: v["layers"] - 1])
    v["dense_ffn"] = (v["dense_ffn"] or 2 * v["tp"]) if v["dense"] else 0


def _up_to(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


def _made(case: Case, values: dict[str, Any]) -> Case:
    parts = {part: _remade(getattr(case, part), values) for part in PARTS}
    return replace(case, **parts, precision=values["precision"], seed=values["seed"])


def _remade(part: Any, values: dict[str, Any]) -> Any:
    return replace(part, **{f.name: values[f.name] for f in fields(part)})


def _along(case: Case, other: Case, field: str) -> tuple[tuple[str, Any], ...]:
    """What else differs and can be named; rows follow from the layout."""
    before, after = flat(case), flat(other)
    return tuple((name, after[name]) for name in after if after[name] != before[name] and name not in (field, "rows"))
