"""Strategies that draw cases: valid by construction, simplest first. Knows Hypothesis and the parts of a case only.

Knobs are keyword-only: None lets Hypothesis choose, a value pins. Hypothesis prefers fewer choices to smaller ones, so
every case draws the same number of choices, in the order in which it should shrink: world, layout, experts, top-k,
layers, tokens, steps, switches, everything else. What is off is drawn too, and ignored.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hypothesis.strategies import SearchStrategy, composite

from fuzz import choices as st
from fuzz.case import PRECISIONS, TWINS, Case
from fuzz.choices import Draw
from fuzz.draws import BUSY, any_of, count, option, rarely, switched
from fuzz.layout_strategies import draw_layout, draw_pipeline, pinned, worlds_to_draw
from fuzz.layout_strategies import layouts as layouts
from fuzz.model_strategies import draw_model, draw_sizes
from fuzz.space import ADAM, EPSILONS, REDUCTION, VALUES, recomputing, reducing, schedules
from fuzz.space import all_layouts as all_layouts
from fuzz.space import worlds as worlds
from toy_models.spec import DISPATCHERS, FAMILIES, PIPES, PPO, Batch, Layout, Switches

MIXED = 8  # tokens per rank in a micro-batch, from which on Sinkhorn balances them
CHOICES = {"family": FAMILIES, "precision": PRECISIONS, "twin": TWINS, "dispatcher": DISPATCHERS}
MOST_ROWS = 16  # several micro-batches per rank are drawn only where all rows together stay within this


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
    return _cases(worlds_to_draw(max_ranks, world, mostly, degrees), pinned(degrees), pins)


def scripted(world: int, draw: st.Scripted) -> Case:
    """The case that `cases(mostly=world)` makes of a script."""
    return _case(draw, worlds_to_draw(world, None, world, {}), {}, dict.fromkeys(CHOICES))


@composite
def rows(draw: Callable[[SearchStrategy], Any], world: int, script: st.Script) -> Case:
    """Cases of a script or simpler in each choice, mostly as it is there; shrinks as `cases(mostly=world)` does."""
    return _case(st.below(draw, script), worlds_to_draw(world, None, world, {}), {}, dict.fromkeys(CHOICES))


@composite
def _cases(draw: Callable[[SearchStrategy], Any], *how: Any) -> Case:
    return _case(st.drawn(draw), *how)


def _case(draw: Draw, bag: Sequence[int], degrees: dict[str, int], pins: dict[str, str | None]) -> Case:
    layout = draw_layout(draw, bag, degrees)
    sizes = draw_sizes(draw, layout)
    shape = _shape(draw)
    busy = draw(st.integers(0, BUSY))
    layout, sizes["layers"] = draw_pipeline(draw, busy, layout, sizes["layers"])
    switches = _switches(draw, busy, layout, shape, pins["dispatcher"])
    model = draw_model(draw, busy, layout, sizes, pins["family"])
    overlaps = switches.shared_overlap and switches.dispatcher == "alltoall" and model.shared_ffn > 0
    if model.capacity and model.drops == "probs":
        shape["micro_rows"] = 1  # equal tokens at the head of two rows of a micro-batch would be a tie
    batch = _batch(draw, busy, layout, shape)
    tokens = batch.micro_rows * (batch.prompt + batch.response)
    if tokens < MIXED * layout.tp * layout.cp:  # all experts are as good for the only token of a shard: a tie
        model = replace(model, sinkhorn=False)
    precision = pins["precision"] or draw(st.sampled_from(("float64", "float64", "float64", "float32")))
    ppo = _ppo(draw, busy, shape, precision)
    reduction = {name: option(draw, busy) for name in REDUCTION} | {"bucket": switched(draw, busy, "bucket")}
    again = recomputing(switched(draw, busy, "recompute"), count(draw, 1, 3))
    overlaps = overlaps and again["recompute"] not in ("shared_experts", "all")
    switches = replace(switches, shared_overlap=overlaps)
    switches = replace(switches, **reducing(ppo.optimizer, model.balance > 0, reduction), **again)
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


def _shape(draw: Draw) -> dict[str, int]:
    """Micro-batches per rank and mini-batch, their rows, lengths, optimizer steps (at most four)."""
    names = {"micro_batches": 4, "micro_rows": 4, "prompt": 6, "response": 5}
    shape = {name: count(draw, 1, most) for name, most in names.items()}
    shape["mini_batches"] = draw(st.sampled_from((1, 2, 2, 3)))
    epochs = draw(st.sampled_from((1, 1, 1, 2)))
    return shape | {"epochs": epochs if shape["mini_batches"] < 3 else 1}


def _switches(draw: Draw, busy: int, layout: Layout, shape: dict[str, int], dispatcher: str | None) -> Switches:
    drawn, schedule = draw(st.sampled_from(("alltoall", "alltoall", "allgather"))), draw(st.integers(0, 15))
    initialized, p2p, deallocate = not option(draw, busy), draw(st.sampled_from(PIPES)), option(draw, busy)
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
        forward_sp=not option(draw, busy),
        decoder_input=option(draw, busy),
        padding_mask=switched(draw, busy, "padding_mask"),
        groups=_groups(draw, busy, layout),
        router_dtype=switched(draw, busy, "router_dtype"),
        qk_scaling=option(draw, busy),
        fp32_residual=option(draw, busy),
        deterministic=option(draw, busy),
        shared_overlap=option(draw, busy),
    )


def _groups(draw: Draw, busy: int, layout: Layout) -> str:
    groups = switched(draw, busy, "groups")
    same_tp = layout.tp == 1 or layout.order.startswith("tp-")
    return groups if same_tp or groups != "other" else "explicit"


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
        raggedness=any_of(draw, "raggedness"),
        holes=option(draw, busy),
        pad_is_eos=option(draw, busy),
    )


def _ppo(draw: Draw, busy: int, shape: dict[str, int], precision: str) -> PPO:
    optimizer = any_of(draw, "optimizer")
    lr, critic_lr = any_of(draw, "lr"), any_of(draw, "critic_lr")
    factor = 1.0 if optimizer == "sgd" else ADAM
    momentum = switched(draw, busy, "momentum")
    return PPO(
        epochs=shape["epochs"],
        mini_batches=shape["mini_batches"],
        temperature=switched(draw, busy, "temperature"),
        gamma=switched(draw, busy, "gamma"),
        lam=switched(draw, busy, "lam"),
        kl_coef=switched(draw, busy, "kl_coef"),
        clip_eps=any_of(draw, "clip_eps"),
        value_clip=any_of(draw, "value_clip"),
        entropy_coef=switched(draw, busy, "entropy_coef"),
        whiten=option(draw, busy),
        optimizer=optimizer,
        lr=lr * factor,
        critic_lr=critic_lr * factor,
        weight_decay=switched(draw, busy, "weight_decay"),
        momentum=momentum if optimizer == "sgd" else 0.0,
        eps=draw(st.sampled_from(EPSILONS[precision])),
        max_norm=draw(st.sampled_from((*VALUES["max_norm"], 0.0))),
        frozen=rarely(draw, busy, "frozen"),
        embedding_lr=switched(draw, busy, "embedding_lr"),
        coupled_decay=option(draw, busy) and optimizer == "adam",
        qk_decay=option(draw, busy),
    )
