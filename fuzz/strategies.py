"""Strategies that draw cases: valid by construction, simplest first. Knows Hypothesis and the parts of a case only.

Knobs are keyword-only: None lets Hypothesis choose, a value pins. Hypothesis prefers fewer choices to smaller ones, so
every case draws the same number of choices, in the order in which it should shrink: world, layout, experts, top-k,
layers, tokens, steps, switches, everything else. What is off is drawn too, and ignored.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from fuzz.case import PRECISIONS, TWINS, Case
from fuzz.space import ADAM, DEGREES, EPSILONS, VALUES, fitting
from fuzz.space import all_layouts as all_layouts
from fuzz.space import worlds as worlds
from toy_models.spec import DISPATCHERS, FAMILIES, PPO, Batch, Layout, MoEModel, Switches

Draw = Callable[[st.SearchStrategy], Any]

CHOICES = {"family": FAMILIES, "precision": PRECISIONS, "twin": TWINS, "dispatcher": DISPATCHERS}
MOST_ROWS = 24  # several micro-batches per rank are drawn only where all rows together stay within this
BUSY = 3  # steps between a case with no option on and one with most of them
# Before anything else Hypothesis goes once through all choices that are drawn from 0 on and lie below this, first to
# last, puts each to 0, and tries the smaller values of those that others hang on. So a failure goes to a smaller world,
# layout and model while most of its budget is left; later passes begin with the last choice.
ALTERNATIVES = 11


def layouts(
    *, max_ranks: int = 4, world: int | None = None, mostly: int | None = None, **degrees: int | None
) -> st.SearchStrategy[Layout]:
    """Layouts of 1 to `max_ranks` ranks; `tp`, `ep`, `etp`, `dp`, `edp` pin degrees. ValueError where no layout fits.

    Shrinks towards one rank, and within a world towards small degrees. Within a world all are equally likely. `world`
    pins; `mostly` draws that world, and smaller ones now and then, so that a failure can shrink below it.
    """
    pins = {name: degree for name, degree in degrees.items() if degree is not None}
    if max_ranks < 1:
        raise ValueError(f"max_ranks={max_ranks} must be at least 1")
    if world is not None and mostly is not None:
        raise ValueError(f"world={world} is drawn always, mostly={mostly} in most cases; use one of them")
    usual = world if mostly is None else mostly
    found = fitting(worlds(max_ranks) if usual is None else [usual], pins)
    if mostly is None:
        # Larger worlds have more layouts: each counts as often as its place in the list.
        return _layouts(found, [size for place, size in enumerate(found, 1) for _ in range(place)])
    smaller = fitting([*worlds(mostly - 1), mostly], pins)
    return _layouts(smaller, [*smaller, *[mostly] * (ALTERNATIVES - len(smaller))])


@st.composite
def _layouts(draw: Draw, found: dict[int, list[Layout]], bag: Sequence[int]) -> Layout:
    # (`integers`, as `sampled_from` makes no choice where there is one value.)
    world = bag[draw(st.integers(0, len(bag) - 1))]
    draw(st.integers(world, world))  # what follows hangs on the world: seen by its bounds, so that 2 is tried after 1
    left = found[world]
    # Degree by degree: an index into the whole list stays where the next smaller ones happen to pass.
    for name in ("ep", "etp", "tp"):
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


def _any(draw: Draw, name: str) -> Any:
    return draw(st.sampled_from(VALUES[name]))


def cases(
    *,
    max_ranks: int = 4,
    world: int | None = None,
    mostly: int | None = None,
    tp: int | None = None,
    ep: int | None = None,
    etp: int | None = None,
    family: str | None = None,
    precision: str | None = None,
    twin: str | None = None,
    dispatcher: str | None = None,
) -> st.SearchStrategy[Case]:
    """Whole cases. Shrinks towards one rank, one layer, two experts, one row of one prompt and one response token.

    `mostly` draws that world, and smaller ones now and then. ValueError at once where nothing satisfies the pins.
    """
    pins = {"family": family, "precision": precision, "twin": twin, "dispatcher": dispatcher}
    for name, allowed in CHOICES.items():
        if pins[name] is not None and pins[name] not in allowed:
            raise ValueError(f"{name}={pins[name]!r} is unknown; choose one of {', '.join(allowed)}")
    return _cases(layouts(max_ranks=max_ranks, world=world, mostly=mostly, tp=tp, ep=ep, etp=etp), pins)


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
    return {"experts": experts, "top_k": top_k, "layers": _count(draw, 1, 2)}


def _shape(draw: Draw) -> dict[str, int]:
    """Micro-batches per rank and mini-batch, their rows, lengths, optimizer steps (at most four)."""
    names = {"micro_batches": 3, "micro_rows": 2, "prompt": 6, "response": 5}
    shape = {name: _count(draw, 1, most) for name, most in names.items()}
    shape["mini_batches"] = draw(st.sampled_from((1, 2, 2, 3)))
    epochs = draw(st.sampled_from((1, 1, 1, 2)))
    return shape | {"epochs": epochs if shape["mini_batches"] < 3 else 1}


def _switches(draw: Draw, busy: int, dispatcher: str | None) -> Switches:
    drawn = draw(st.sampled_from(("alltoall", "alltoall", "allgather")))
    return Switches(dispatcher=dispatcher or drawn, perform_initialization=not _option(draw, busy))


def _model(draw: Draw, busy: int, layout: Layout, sizes: dict[str, int], family: str | None) -> MoEModel:
    possible = FAMILIES[: 3 if sizes["top_k"] > 1 else 2]
    chosen = family or draw(st.sampled_from(possible))
    if chosen == "mixtral":
        sizes = sizes | {"top_k": max(2, sizes["top_k"])}
    normalised = draw(st.booleans())
    kv_heads = layout.tp * _count(draw, 1, 2)
    heads = kv_heads * _count(draw, 1, 2)
    shared = layout.tp * _count(draw, 2, 4)
    return MoEModel(
        family=chosen,
        **sizes,
        norm_topk_prob=chosen == "mixtral" or (normalised and sizes["top_k"] > 1),
        hidden=8 if chosen == "qwen3moe" else heads * 4,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=4,
        ffn=layout.etp * _count(draw, 2, 4),
        shared_ffn=shared if chosen == "qwen2moe" else 0,
        vocab=layout.tp * _count(draw, -(-8 // layout.tp), 16 // layout.tp),
        tied=_option(draw, busy),
        skew=_switched(draw, busy, "skew"),
        aux_loss=_switched(draw, busy, "aux_loss"),
        z_loss=_switched(draw, busy, "z_loss"),
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
    )
