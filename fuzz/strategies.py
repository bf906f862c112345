"""Strategies that draw cases: valid by construction, simplest first. Knows Hypothesis and the parts of a case only.

Knobs are keyword-only: None lets Hypothesis choose, a value pins. Hypothesis prefers fewer choices to smaller ones, so
every case draws the same number of choices, in the order in which it should shrink: world, layout, experts, top-k,
layers, tokens, steps, switches, everything else. What is off is drawn too, and ignored.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

from hypothesis import strategies as st

from fuzz.case import PRECISIONS, TWINS, Case
from toy_models.spec import DISPATCHERS, FAMILIES, PPO, RAGGEDNESS, Batch, Layout, MoEModel, Switches

T = TypeVar("T")
Draw = Callable[[st.SearchStrategy], Any]

WORLDS = (1, 2, 4, 8)
DEGREES = (1, 2, 4, 8)
CHOICES = {"family": FAMILIES, "precision": PRECISIONS, "twin": TWINS, "dispatcher": DISPATCHERS}
MOST_ROWS = 24  # several micro-batches per rank are drawn only where all rows together stay within this
BUSY = 3  # steps between a case with no option on and one with most of them


def worlds(max_ranks: int) -> list[int]:
    """The world sizes that are drawn, at most `max_ranks`."""
    return [world for world in WORLDS if world <= max_ranks]


@cache
def all_layouts(world: int) -> tuple[Layout, ...]:
    """Every layout of a world with power-of-two degrees, simplest first: few degrees above one, small, EP before TP."""
    places = [x for x in itertools.product(DEGREES, repeat=3) if world % (x[0] * x[1]) == world % x[2] == 0]
    return tuple(sorted((Layout(world=world, ep=ep, etp=etp, tp=tp) for ep, etp, tp in places), key=_complexity))


def _complexity(layout: Layout) -> tuple:
    degrees = (layout.ep, layout.etp, layout.tp)
    return sum(degree > 1 for degree in degrees), layout.ep * layout.etp * layout.tp, degrees


def _fitting(world: int, pins: dict[str, int]) -> list[Layout]:
    return [x for x in all_layouts(world) if all(getattr(x, name) == value for name, value in pins.items())]


def layouts(*, max_ranks: int = 4, world: int | None = None, **degrees: int | None) -> st.SearchStrategy[Layout]:
    """Layouts of 1 to `max_ranks` ranks; `tp`, `ep`, `etp`, `dp`, `edp` pin degrees. ValueError where no layout fits.

    Shrinks towards one rank, and within a world towards small degrees. Within a world all are equally likely.
    """
    pins = {name: degree for name, degree in degrees.items() if degree is not None}
    _check_pins(pins)
    if max_ranks < 1:
        raise ValueError(f"max_ranks={max_ranks} must be at least 1")
    tried = worlds(max_ranks) if world is None else [world]
    fitting = {size: found for size in tried if (found := _fitting(size, pins))}
    if not fitting:
        raise ValueError(_nothing_fits(tried, pins))
    return _layouts(fitting)


def _check_pins(pins: dict[str, int]) -> None:
    known = ("tp", "ep", "etp", "dp", "edp")
    unknown = sorted(set(pins) - set(known))
    if unknown:
        raise ValueError(f"cannot pin {', '.join(unknown)}; layouts can be pinned by world, {', '.join(known)}")


def _possible(tried: Sequence[int], name: str, pins: dict[str, int]) -> list[int]:
    return sorted({getattr(layout, name) for size in tried for layout in _fitting(size, pins)})


def _nothing_fits(tried: Sequence[int], pins: dict[str, int]) -> str:
    """What was asked, and what each pin could be: with the others as they are where there is such a value."""
    asked = ", ".join(f"{name}={value}" for name, value in pins.items())
    others = {name: {key: value for key, value in pins.items() if key != name} for name in pins}
    degrees = {name: _possible(tried, name, rest) or _possible(tried, name, {}) for name, rest in others.items()}
    possible = "; ".join(f"{name} can be {', '.join(map(str, values))}" for name, values in degrees.items())
    return f"no layout of world={' or '.join(map(str, tried))} has {asked}; {possible}"


@st.composite
def _layouts(draw: Draw, fitting: dict[int, list[Layout]]) -> Layout:
    # Larger worlds have more layouts: each counts as often as its place in the list.
    bag = [size for place, size in enumerate(fitting, 1) for _ in range(place)]
    found = fitting[draw(st.sampled_from(bag))]
    # Degree by degree: an index into the whole list stays where the next smaller ones happen to pass. Each value counts
    # as often as layouts have it. (`integers`, as `sampled_from` makes no choice where there is one value.)
    for name in ("ep", "etp", "tp"):
        degrees = sorted(getattr(layout, name) for layout in found)
        degree = degrees[draw(st.integers(0, len(degrees) - 1))]
        found = [layout for layout in found if getattr(layout, name) == degree]
    return found[0]


def _option(draw: Draw, busy: int) -> bool:
    """Whether an option is on: never in the least busy case, three times in four in the busiest."""
    return draw(st.integers(0, BUSY)) > BUSY - busy


def _switched(draw: Draw, busy: int, off: T, on: Sequence[T]) -> T:
    """`off`, or one of `on`; two choices either way."""
    active, value = _option(draw, busy), draw(st.sampled_from(on))
    return value if active else off


def cases(
    *,
    max_ranks: int = 4,
    world: int | None = None,
    tp: int | None = None,
    ep: int | None = None,
    etp: int | None = None,
    family: str | None = None,
    precision: str | None = None,
    twin: str | None = None,
    dispatcher: str | None = None,
) -> st.SearchStrategy[Case]:
    """Whole cases. Shrinks towards one rank, one layer, two experts, one row of one prompt and one response token.

    ValueError at once where nothing satisfies the pins.
    """
    pins = {"family": family, "precision": precision, "twin": twin, "dispatcher": dispatcher}
    for name, allowed in CHOICES.items():
        if pins[name] is not None and pins[name] not in allowed:
            raise ValueError(f"{name}={pins[name]!r} is unknown; choose one of {', '.join(allowed)}")
    return _cases(layouts(max_ranks=max_ranks, world=world, tp=tp, ep=ep, etp=etp), pins)


@st.composite
def _cases(draw: Draw, places: st.SearchStrategy[Layout], pins: dict[str, str | None]) -> Case:
    layout = draw(places)
    sizes = _sizes(draw, layout)
    shape = _shape(draw)
    busy = draw(st.integers(0, BUSY))
    switches = _switches(draw, busy, pins["dispatcher"])
    model = _model(draw, busy, layout, sizes, pins["family"])
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
    """Experts (odd numbers too), top-k of 1 to 4, layers."""
    more = draw(st.integers(0, 3))
    experts = 2 + more if layout.ep == 1 else layout.ep * (1 + more)
    top_k = 1 + min(draw(st.integers(0, 3)), experts - 1)
    return {"experts": experts, "top_k": top_k, "layers": draw(st.integers(1, 2))}


def _shape(draw: Draw) -> dict[str, int]:
    """Rows per micro-batch, micro-batches per rank and mini-batch, lengths, optimizer steps (at most four)."""
    names = {"micro_rows": 2, "micro_batches": 3, "prompt": 6, "response": 5}
    shape = {name: draw(st.integers(1, most)) for name, most in names.items()}
    shape["mini_batches"] = draw(st.sampled_from((1, 2, 2, 3)))
    epochs = draw(st.sampled_from((1, 1, 1, 2)))
    return shape | {"epochs": epochs if shape["mini_batches"] < 3 else 1}


def _switches(draw: Draw, busy: int, dispatcher: str | None) -> Switches:
    drawn = draw(st.sampled_from(("alltoall", "alltoall", "allgather")))
    return Switches(dispatcher=dispatcher or drawn, perform_initialization=not _option(draw, busy))


def _model(draw: Draw, busy: int, layout: Layout, sizes: dict[str, int], family: str | None) -> MoEModel:
    possible = ("qwen3moe", "qwen2moe", "mixtral")[: 3 if sizes["top_k"] > 1 else 2]
    chosen = family or draw(st.sampled_from(possible))
    if chosen == "mixtral":
        sizes = sizes | {"top_k": max(2, sizes["top_k"])}
    normalised = draw(st.booleans())
    kv_heads = layout.tp * draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 2))
    shared = layout.tp * draw(st.integers(2, 4))
    return MoEModel(
        family=chosen,
        **sizes,
        norm_topk_prob=chosen == "mixtral" or (normalised and sizes["top_k"] > 1),
        hidden=8 if chosen == "qwen3moe" else heads * 4,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=4,
        ffn=layout.etp * draw(st.integers(2, 4)),
        shared_ffn=shared if chosen == "qwen2moe" else 0,
        vocab=layout.tp * draw(st.integers(-(-8 // layout.tp), 16 // layout.tp)),
        tied=_option(draw, busy),
        skew=_switched(draw, busy, 0.0, (4.0, 10.0, 1.0)),
        aux_loss=_switched(draw, busy, 0.0, (1.0, 0.3, 7.0)),
        z_loss=_switched(draw, busy, 0.0, (0.1, 0.03, 1.0)),
    )


def _rows(layout: Layout, shape: dict[str, int]) -> int:
    cut = shape["mini_batches"] * layout.dp * shape["micro_rows"]
    return cut * min(shape["micro_batches"], max(1, MOST_ROWS // cut))


def _batch(draw: Draw, busy: int, layout: Layout, shape: dict[str, int]) -> Batch:
    return Batch(
        rows=_rows(layout, shape),
        prompt=shape["prompt"],
        response=shape["response"],
        micro_rows=shape["micro_rows"],
        raggedness=draw(st.sampled_from(RAGGEDNESS)),
        holes=_option(draw, busy),
        pad_is_eos=_option(draw, busy),
    )


# Adam divides by its eps: in float32 rounding of 1e-7 over an eps of 1e-8 would move a weight by the whole rate, and
# no end-to-end law could judge it. The optimizer's own law judges every eps, from the gradients that it was given.
EPSILONS = {"float64": (1e-8, 1e-4, 1e-2), "float32": (1e-3, 1e-4, 1e-2)}


def _ppo(draw: Draw, busy: int, shape: dict[str, int], precision: str) -> PPO:
    optimizer = draw(st.sampled_from(("sgd", "adam")))
    rates = [draw(st.sampled_from((0.1, 0.03, 0.3))) for _ in range(2)]
    factor = 1.0 if optimizer == "sgd" else 0.3
    momentum = _switched(draw, busy, 0.0, (0.9, 0.5))
    return PPO(
        epochs=shape["epochs"],
        mini_batches=shape["mini_batches"],
        temperature=_switched(draw, busy, 1.0, (0.7, 1.6)),
        gamma=_switched(draw, busy, 1.0, (0.9, 0.5)),
        lam=_switched(draw, busy, 1.0, (0.95, 0.6, 0.0)),
        kl_coef=_switched(draw, busy, 0.0, (0.1, 1.0)),
        clip_eps=draw(st.sampled_from((0.2, 0.05, 0.01))),
        value_clip=draw(st.sampled_from((0.2, 0.05, 0.01))),
        entropy_coef=_switched(draw, busy, 0.0, (0.1, 1.0)),
        whiten=_option(draw, busy),
        optimizer=optimizer,
        lr=rates[0] * factor,
        critic_lr=rates[1] * factor,
        weight_decay=_switched(draw, busy, 0.0, (0.1, 1.0)),
        momentum=momentum if optimizer == "sgd" else 0.0,
        eps=draw(st.sampled_from(EPSILONS[precision])),
        max_norm=draw(st.sampled_from((0.0, 0.3, 1.0, 0.05, 0.0, 30.0))),
    )
