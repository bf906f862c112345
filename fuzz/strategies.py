"""Strategies that draw cases: valid by construction, simplest first. Knows Hypothesis and the parts of a case only.

Knobs are keyword-only: None lets Hypothesis choose, a value pins. Hypothesis prefers fewer choices to smaller ones, so
every case draws the same number of choices, in the order in which it should shrink: world, layout, experts, top-k,
layers, tokens, steps, switches, everything else. What is off is drawn too, and ignored.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hypothesis.strategies import SearchStrategy, composite

from fuzz import choices as st
from fuzz.case import PRECISIONS, TWINS, Case
from fuzz.space import ADAM, DEGREES, EPSILONS, NAMED, VALUES, fitting, schedules, worlds_below
from fuzz.space import all_layouts as all_layouts
from fuzz.space import worlds as worlds
from toy_models.spec import (
    DISPATCHERS,
    FAMILIES,
    OWN_HEAD_DIM,
    PIPES,
    PPO,
    SHARED,
    SPLITS,
    Batch,
    Layout,
    MoEModel,
    Switches,
    groupings,
)

Draw = st.Draw

CHOICES = {"family": FAMILIES, "precision": PRECISIONS, "twin": TWINS, "dispatcher": DISPATCHERS}
MOST_STAGES = 8  # with virtual ones; of more than half as many each has one layer
MOST_ROWS = 16  # several micro-batches per rank are drawn only where all rows together stay within this
BIASES = ((0.5, 0.0625), (0.125, 0.5), (0.5, 0.0), (0.125, 0.0625))  # spread and rate of expert biases
IDLE = 192  # of 256 numbers, from which on groups of experts are not limited
BUSY = 3  # steps between a case with no option on and one with most of them
# Before anything else Hypothesis goes once through all choices that are drawn from 0 on and lie below this, first to
# last, puts each to 0, and tries the smaller values of those that others hang on. So a failure goes to a smaller world,
# layout and model while most of its budget is left; later passes begin with the last choice.
ALTERNATIVES = st.ALTERNATIVES


def layouts(
    *, max_ranks: int = 4, world: int | None = None, mostly: int | None = None, **degrees: int | None
) -> SearchStrategy[Layout]:
    """Layouts of 1 to `max_ranks` ranks; `tp`, `pp`, `cp`, `ep`, `etp`, `dp`, `edp` pin. ValueError where none fits.

    Shrinks towards one rank, and within a world towards small degrees. Within a world all are equally likely. `world`
    pins; `mostly` draws that world, and smaller ones now and then, so that a failure can shrink below it.
    """
    return _layouts(_bag(max_ranks, world, mostly, degrees), _pinned(degrees))


def _pinned(degrees: Mapping[str, int | None]) -> dict[str, int]:
    return {name: degree for name, degree in degrees.items() if degree is not None}


def _bag(max_ranks: int, world: int | None, mostly: int | None, degrees: Mapping[str, int | None]) -> list[int]:
    """The worlds to choose from, each as often as it shall count."""
    pins = _pinned(degrees)
    if max_ranks < 1:
        raise ValueError(f"max_ranks={max_ranks} must be at least 1")
    if world is not None and mostly is not None:
        raise ValueError(f"world={world} is drawn always, mostly={mostly} in most cases; use one of them")
    usual = world if mostly is None else mostly
    found = list(fitting(worlds(max_ranks) if usual is None else [usual], pins))
    if mostly is None:
        # Larger worlds have more layouts: each counts as often as its place in the list.
        return [size for place, size in enumerate(found, 1) for _ in range(place)]
    smaller = list(fitting([*worlds_below(mostly), mostly], pins))
    return [*smaller, *[mostly] * (ALTERNATIVES - len(smaller))]


@composite
def _layouts(draw: Callable[[SearchStrategy], Any], bag: Sequence[int], pins: dict[str, int]) -> Layout:
    return _layout(st.drawn(draw), bag, pins)


def _layout(draw: Draw, bag: Sequence[int], pins: dict[str, int]) -> Layout:
    # (`integers`, as `sampled_from` makes no choice where there is one value.)
    world = bag[draw(st.integers(0, len(bag) - 1))]
    draw(st.integers(world, world))  # what follows hangs on the world: seen by its bounds, so that 2 is tried after 1
    left = fitting([world], pins)[world]
    # Degree by degree: an index into the whole list stays where the next smaller ones happen to pass.
    for name in NAMED:
        degree = _degree(draw, [getattr(layout, name) for layout in left])
        left = [layout for layout in left if getattr(layout, name) == degree]
    return left[0]


def _degree(draw: Draw, degrees: Sequence[int]) -> int:
    """One of `degrees`, all equally likely.

    The first choice names it, and goes on naming it when the world shrinks; the second, at 0 in every shrunk case,
    evens out how often each is named.
    """
    named = [max((d for d in degrees if d <= name), default=min(degrees)) for name in DEGREES]
    others = sorted((Counter(list(degrees) * len(named)) - Counter(named)).elements())
    name, even = draw(st.integers(0, len(named) - 1)), draw(st.integers(0, len(degrees) - 1))
    return others[len(named) * (even - 1) + name] if even else named[name]


def _count(draw: Draw, least: int, most: int) -> int:
    return least + draw(st.integers(0, most - least))


def _option(draw: Draw, busy: int) -> bool:
    """Whether an option is on: never in the least busy case, three times in four in the busiest."""
    return draw(st.integers(0, BUSY)) > BUSY - busy


def _switched(draw: Draw, busy: int, name: str) -> Any:
    """What a setting is when it is off, or one of its other values; two choices either way."""
    off, *on = VALUES[name]
    active, value = _option(draw, busy), draw(st.sampled_from(on))
    return value if active else off


def _rarely(draw: Draw, busy: int, name: str) -> Any:
    """As `_switched`, for what takes much away from what the laws judge."""
    often, value = draw(st.integers(0, 2)), _switched(draw, busy, name)
    return value if often == 2 else VALUES[name][0]


def _any(draw: Draw, name: str) -> Any:
    return draw(st.sampled_from(VALUES[name]))


def cases(
    *,
    max_ranks: int = 4,
    world: int | None = None,
    mostly: int | None = None,
    family: str | None = None,
    precision: str | None = None,
    twin: str | None = None,
    dispatcher: str | None = None,
    **degrees: int | None,
) -> SearchStrategy[Case]:
    """Whole cases. Shrinks towards one rank, one layer, two experts, one row of one prompt and one response token.

    `mostly` draws that world, and smaller ones now and then; `tp`, `pp`, `cp`, `ep`, `etp`, `dp`, `edp` pin degrees.
    ValueError at once where nothing satisfies the pins.
    """
    pins = {"family": family, "precision": precision, "twin": twin, "dispatcher": dispatcher}
    for name, allowed in CHOICES.items():
        if pins[name] is not None and pins[name] not in allowed:
            raise ValueError(f"{name}={pins[name]!r} is unknown; choose one of {', '.join(allowed)}")
    return _cases(_bag(max_ranks, world, mostly, degrees), _pinned(degrees), pins)


def scripted(world: int, draw: st.Scripted) -> Case:
    """The case that `cases(mostly=world)` makes of a script."""
    return _case(draw, _bag(world, None, world, {}), {}, dict.fromkeys(CHOICES))


@composite
def rows(draw: Callable[[SearchStrategy], Any], world: int, script: st.Script) -> Case:
    """Cases of a script or simpler in each choice, mostly as it is there; shrinks as `cases(mostly=world)` does."""
    return _case(st.below(draw, script), _bag(world, None, world, {}), {}, dict.fromkeys(CHOICES))


@composite
def _cases(draw: Callable[[SearchStrategy], Any], *how: Any) -> Case:
    return _case(st.drawn(draw), *how)


def _case(draw: Draw, bag: Sequence[int], degrees: dict[str, int], pins: dict[str, str | None]) -> Case:
    layout = _layout(draw, bag, degrees)
    sizes = _sizes(draw, layout)
    shape = _shape(draw)
    busy = draw(st.integers(0, BUSY))
    layout, sizes["layers"] = _pipeline(draw, busy, layout, sizes["layers"])
    switches = _switches(draw, busy, layout, shape, pins["dispatcher"])
    model = _model(draw, busy, layout, sizes, pins["family"])
    if model.capacity:
        shape["micro_rows"] = 1  # equal tokens at the head of two rows of a micro-batch would be a tie
    batch = _batch(draw, busy, layout, shape)
    precision = pins["precision"] or draw(st.sampled_from(("float64", "float64", "float64", "float32")))
    ppo = _ppo(draw, busy, shape, precision)
    return Case(
        layout=layout,
        model=model,
        batch=batch,
        ppo=ppo,
        switches=switches,
        precision=precision,
        twin=pins["twin"] or draw(st.sampled_from((None,) * 6 + TWINS)),
        seed=draw(st.integers(0, 2**16)),
    )


def _sizes(draw: Draw, layout: Layout) -> dict[str, int]:
    """Experts (odd numbers too), top-k of 1 to 4, layers (per stage of a pipeline)."""
    more = draw(st.integers(0, 3))
    experts = 2 + more if layout.ep == 1 else layout.ep * (1 + more)
    top_k = 1 + min(draw(st.integers(0, 3)), experts - 1)
    return {"experts": experts, "top_k": top_k, "layers": _count(draw, 1, 2)}


def _pipeline(draw: Draw, busy: int, layout: Layout, per_stage: int) -> tuple[Layout, int]:
    """The layout with its order, virtual stages and cut, and the layers in all. Shrinks towards an even cut."""
    order, virtual = _switched(draw, busy, "order"), 1 + (layout.pp > 1) * _option(draw, busy) * _count(draw, 1, 2)
    split, uneven, seed = draw(st.sampled_from(SPLITS[1:])), _option(draw, busy), draw(st.integers(0, 255))
    order = order if order.endswith("-pp") or layout.pp == 1 or layout.dp == layout.edp else layout.order
    virtual = min(virtual, max(1, MOST_STAGES // layout.pp))
    number = layout.pp * virtual
    per_stage = per_stage if number <= MOST_STAGES // 2 else 1
    if layout.pp == 1 or not uneven:
        return replace(layout, order=order, vpp=virtual), per_stage * number
    counts = _stages(split, layout.pp, virtual, per_stage, seed)
    return replace(layout, order=order, vpp=virtual, split=split, stages=counts), sum(counts)


def _stages(split: str, pp: int, vpp: int, layers: int, seed: int) -> tuple[int, ...]:
    """Layers of each stage that an option of megatron gives; `seed` says which of the ways."""
    counts, first, last = [layers] * (pp * vpp), 1 + seed % 3, 1 + seed // 3 % 3
    if split == "ends":
        return tuple(((first, *[layers] * (pp - 2), last)) * vpp)
    if split == "list":
        drawn = random.Random(seed)
        counts = [drawn.choice((0, 1, 1, 2)) for _ in counts]
        return tuple(counts if any(counts) else [1, *counts[1:]])
    counts[0] -= split in ("embedding", "both")
    counts[-1] -= split in ("loss", "both")
    return tuple(counts) if any(counts) else tuple(count + 1 for count in counts)


def _dense(draw: Draw, busy: int, layers: int) -> tuple[int, ...]:
    """Layers without experts: the first, all but one, every other, or any; none where there is one layer."""
    on, kind, seed = _option(draw, busy), draw(st.integers(0, 3)), draw(st.integers(0, 255))
    if not on or layers == 1:
        return ()
    one = seed % layers
    drawn = random.Random(seed)
    patterns = (
        [0],
        [layer for layer in range(layers) if layer != one],
        range(one % 2, layers, 2),
        [layer for layer in range(layers) if layer != one and drawn.random() < 0.5],
    )
    return tuple(patterns[kind])


def _shape(draw: Draw) -> dict[str, int]:
    """Micro-batches per rank and mini-batch, their rows, lengths, optimizer steps (at most four)."""
    names = {"micro_batches": 4, "micro_rows": 4, "prompt": 6, "response": 5}
    shape = {name: _count(draw, 1, most) for name, most in names.items()}
    shape["mini_batches"] = draw(st.sampled_from((1, 2, 2, 3)))
    epochs = draw(st.sampled_from((1, 1, 1, 2)))
    return shape | {"epochs": epochs if shape["mini_batches"] < 3 else 1}


def _switches(draw: Draw, busy: int, layout: Layout, shape: dict[str, int], dispatcher: str | None) -> Switches:
    drawn, schedule = draw(st.sampled_from(("alltoall", "alltoall", "allgather"))), draw(st.integers(0, 15))
    initialized, p2p, deallocate = not _option(draw, busy), draw(st.sampled_from(PIPES)), _option(draw, busy)
    chosen, group = dispatcher or drawn, 0
    if layout.vpp == 1:
        p2p = "plain" if busy and p2p != "batched" else "batched"
    else:
        pairs = schedules(layout.pp)
        shape["micro_batches"], size = pairs[schedule % len(pairs)]
        group = size if size > layout.pp else 0
    return Switches(
        dispatcher=chosen,
        perform_initialization=initialized,
        p2p=p2p,
        deallocate=deallocate,
        group=group,
        forward_sp=not _option(draw, busy),
        decoder_input=_option(draw, busy),
        padding_mask=_switched(draw, busy, "padding_mask"),
        groups=_groups(draw, busy, layout),
        router_dtype=_switched(draw, busy, "router_dtype"),
    )


def _groups(draw: Draw, busy: int, layout: Layout) -> str:
    groups = _switched(draw, busy, "groups")
    same_tp = layout.tp == 1 or layout.order.startswith("tp-")
    return groups if same_tp or groups != "other" else "explicit"


def _model(draw: Draw, busy: int, layout: Layout, sizes: Mapping[str, Any], family: str | None) -> MoEModel:
    possible = FAMILIES if sizes["top_k"] > 1 else FAMILIES[:-1]  # all but Mixtral
    chosen = family or draw(st.sampled_from(possible))
    if chosen == "mixtral":
        sizes = {**sizes, "top_k": max(2, sizes["top_k"])}
    normalised = draw(st.booleans())
    few, kv_heads = _option(draw, busy), layout.tp * _count(draw, 1, 2)
    heads = kv_heads * _count(draw, 1, 2)
    head_dim = 6 if few and layout.tp % 3 == 0 else 4
    kv_heads = 1 if few and (heads + 2) * head_dim % layout.tp == 0 else kv_heads
    dense, dense_ffn = _dense(draw, busy, sizes["layers"]), layout.tp * _count(draw, 1, 3)
    dense = () if chosen == "mixtral" else dense
    shared = layout.tp * _count(draw, 2, 4)
    router = _router(draw, busy, sizes)
    normalised = normalised or chosen == "mixtral" or router["score"] == "sigmoid"
    return MoEModel(
        family=chosen,
        **sizes,
        **router,
        norm_topk_prob=normalised and sizes["top_k"] > 1,
        hidden=8 if chosen in OWN_HEAD_DIM else heads * head_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=layout.etp * _count(draw, 2, 4),
        shared_ffn=shared if chosen in SHARED else 0,
        vocab=layout.tp * _count(draw, -(-8 // layout.tp), 16 // layout.tp),
        tied=_option(draw, busy),
        skew=_switched(draw, busy, "skew"),
        aux_loss=_switched(draw, busy, "aux_loss"),
        **_capacity(draw, busy, sizes, router),
        seq_aux_loss=_switched(draw, busy, "seq_aux_loss"),
        global_aux_loss=_switched(draw, busy, "global_aux_loss"),
        z_loss=_switched(draw, busy, "z_loss"),
        dense=dense,
        dense_ffn=dense_ffn if dense else 0,
    )


def _router(draw: Draw, busy: int, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """How experts are chosen. Groups are now and then there and not limited: then they do nothing."""
    score, biased, biases = "sigmoid" if _option(draw, busy) else "softmax", _option(draw, busy), _one(draw, BIASES)
    grouped, which, scaling = _option(draw, busy), draw(st.integers(0, 255)), _switched(draw, busy, "scaling")
    spread, rate = biases if biased and score == "sigmoid" else (0.0, 0.0)
    pairs = groupings(sizes["experts"], sizes["top_k"])
    groups, limit = pairs[which % len(pairs)] if grouped else (0, 0)
    limit = 0 if which >= IDLE else limit
    drawn = {"score": score, "scaling": scaling, "expert_bias": spread, "bias_rate": rate}
    return drawn | {"expert_groups": groups, "group_topk": limit}


def _one(draw: Draw, values: Sequence[Any]) -> Any:
    return draw(st.sampled_from(values))


def _capacity(draw: Draw, busy: int, sizes: Mapping[str, Any], router: Mapping[str, Any]) -> dict[str, Any]:
    """How many copies an expert takes, from far too few to more than there are. Rarely: equal tokens at the head of
    a row have equal gates, and where one of them is dropped it may be either, so that one case in five is inconclusive.

    Padding to capacity fails where there is room for more than all tokens (docs/findings/padding-beyond-all-tokens.md);
    and megatron counts it as load, and which tokens it takes for it is anybody's guess.
    """
    often, capacity, padded = draw(st.integers(0, 23)), _switched(draw, busy, "capacity"), _option(draw, busy)
    capacity = capacity if often == 23 else 0.0
    padded = padded and 0 < capacity * sizes["top_k"] <= sizes["experts"] and not router["bias_rate"]
    return {"capacity": capacity, "pad_to_capacity": padded}


def _rows(layout: Layout, shape: dict[str, int]) -> int:
    cut = shape["mini_batches"] * layout.dp * shape["micro_rows"]
    fewer = min(shape["micro_batches"], max(1, MOST_ROWS // cut))
    return cut * (fewer if layout.vpp == 1 else shape["micro_batches"])


def _batch(draw: Draw, busy: int, layout: Layout, shape: dict[str, int]) -> Batch:
    return Batch(
        rows=_rows(layout, shape),
        prompt=shape["prompt"],
        response=shape["response"],
        micro_rows=shape["micro_rows"],
        raggedness=_any(draw, "raggedness"),
        holes=_option(draw, busy),
        pad_is_eos=_option(draw, busy),
    )


def _ppo(draw: Draw, busy: int, shape: dict[str, int], precision: str) -> PPO:
    optimizer = _any(draw, "optimizer")
    lr, critic_lr = _any(draw, "lr"), _any(draw, "critic_lr")
    factor = 1.0 if optimizer == "sgd" else ADAM
    momentum = _switched(draw, busy, "momentum")
    return PPO(
        epochs=shape["epochs"],
        mini_batches=shape["mini_batches"],
        temperature=_switched(draw, busy, "temperature"),
        gamma=_switched(draw, busy, "gamma"),
        lam=_switched(draw, busy, "lam"),
        kl_coef=_switched(draw, busy, "kl_coef"),
        clip_eps=_any(draw, "clip_eps"),
        value_clip=_any(draw, "value_clip"),
        entropy_coef=_switched(draw, busy, "entropy_coef"),
        whiten=_option(draw, busy),
        optimizer=optimizer,
        lr=lr * factor,
        critic_lr=critic_lr * factor,
        weight_decay=_switched(draw, busy, "weight_decay"),
        momentum=momentum if optimizer == "sgd" else 0.0,
        eps=draw(st.sampled_from(EPSILONS[precision])),
        max_norm=draw(st.sampled_from((*VALUES["max_norm"], 0.0))),
        frozen=_rarely(draw, busy, "frozen"),
    )
