"""How a model is drawn: sizes that fit a layout, and every option of its router and its losses. No Hypothesis."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fuzz import choices as st
from fuzz.choices import Draw
from fuzz.draws import count, one, option, switched
from toy_models.spec import FAMILIES, NORMALISED, OWN_HEAD_DIM, SHARED, Layout, MoEModel, groupings

BIASES = ((0.5, 0.0625), (0.125, 0.5), (0.5, 0.0), (0.125, 0.0625))  # spread and rate of expert biases
GPT_OSS = {
    "activation": "quick_gelu", "gated": True, "glu_offset": 1.0, "qk_norm": "family", "output_gate": False,
    "sinks": "learnable", "biases": True,
}  # fmt: skip
BY_POSITION = 16  # of 24 numbers, from which on experts have a capacity; the last is for drops by gates
BALANCED = {"score": "softmax", "scaling": 1.0, "expert_bias": 0.0, "bias_rate": 0.0, "group_topk": 0}  # by Sinkhorn
WITHOUT: dict[str, Any] = {
    "capacity": 0.0, "pad_to_capacity": False, "drops": "probs", "aux_loss": 0.0, "seq_aux_loss": 0.0,
    "global_aux_loss": 0.0, "skew": 0.0,
}  # fmt: skip
IDLE = 192  # of 256 numbers, from which on groups of experts are not limited


def draw_sizes(draw: Draw, layout: Layout) -> dict[str, int]:
    """Experts (odd numbers too), top-k of 1 to 4, layers (per stage of a pipeline)."""
    more = draw(st.integers(0, 3))
    experts = 2 + more if layout.ep == 1 else layout.ep * (1 + more)
    top_k = 1 + min(draw(st.integers(0, 3)), experts - 1)
    return {"experts": experts, "top_k": top_k, "layers": count(draw, 1, 2)}


def draw_model(draw: Draw, busy: int, layout: Layout, sizes: Mapping[str, Any], family: str | None) -> MoEModel:
    possible = [family for family in FAMILIES if sizes["top_k"] > 1 or family not in NORMALISED]
    chosen = family or draw(st.sampled_from(possible))
    if chosen in NORMALISED:
        sizes = {**sizes, "top_k": max(2, sizes["top_k"])}
    normalised = draw(st.booleans())
    few, kv_heads = option(draw, busy), layout.tp * count(draw, 1, 2)
    heads = kv_heads * count(draw, 1, 2)
    head_dim = 6 if few and layout.tp % 3 == 0 else 4
    kv_heads = 1 if few and (heads + 2) * head_dim % layout.tp == 0 else kv_heads
    dense, dense_ffn = _dense(draw, busy, sizes["layers"]), layout.tp * count(draw, 1, 3)
    dense = () if chosen in NORMALISED else dense
    shared = layout.tp * count(draw, 2, 4)
    # One in 24: it has no balance losses, scores or capacity, and few tokens are a tie.
    router, sinkhorn = _router(draw, busy, sizes), draw(st.integers(0, 23)) == 23
    sinkhorn = sinkhorn and chosen not in NORMALISED
    router, normalised = (router | BALANCED, False) if sinkhorn else (router, normalised)
    normalised = normalised or chosen in NORMALISED or router["score"] == "sigmoid"
    model = MoEModel(
        family=chosen,
        **sizes,
        **router,
        norm_topk_prob=normalised and sizes["top_k"] > 1,
        hidden=8 if chosen in OWN_HEAD_DIM else heads * head_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=layout.etp * count(draw, 2, 4),
        shared_ffn=shared if chosen in SHARED else 0,
        vocab=layout.tp * count(draw, -(-8 // layout.tp), 16 // layout.tp),
        tied=option(draw, busy),
        skew=switched(draw, busy, "skew"),
        aux_loss=switched(draw, busy, "aux_loss"),
        **_capacity(draw, busy, sizes, router),
        seq_aux_loss=switched(draw, busy, "seq_aux_loss"),
        global_aux_loss=switched(draw, busy, "global_aux_loss"),
        z_loss=switched(draw, busy, "z_loss"),
        dense=dense,
        dense_ffn=dense_ffn if dense else 0,
        **_layers(draw, busy, layout, chosen),
    )
    return replace(model, sinkhorn=True, **WITHOUT) if sinkhorn else model


def _layers(draw: Draw, busy: int, layout: Layout, family: str) -> dict[str, Any]:
    """What MLPs and attention are made of. Megatron has biases of experts that are not cut, and none of shared ones."""
    names = ("activation", "clamp", "glu_offset", "qk_norm", "sinks")
    drawn = {name: switched(draw, busy, name) for name in names}
    drawn |= {name: option(draw, busy) for name in ("gated", "output_gate", "biases")}
    drawn["gated"], other = not drawn["gated"], option(draw, busy)
    if family == "gptoss" and not other:
        drawn |= GPT_OSS | {"clamp": drawn["clamp"] or 0.5}
    if not drawn["gated"]:
        drawn |= {"clamp": 0.0, "glu_offset": 0.0}
    return drawn | {"biases": drawn["biases"] and layout.etp == 1 and family not in SHARED}


def _dense(draw: Draw, busy: int, layers: int) -> tuple[int, ...]:
    """Layers without experts: the first, all but one, every other, or any; none where there is one layer."""
    on, kind, seed = option(draw, busy), draw(st.integers(0, 3)), draw(st.integers(0, 255))
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


def _router(draw: Draw, busy: int, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """How experts are chosen. Groups are now and then there and not limited: then they do nothing."""
    score, biased, biases = "sigmoid" if option(draw, busy) else "softmax", option(draw, busy), one(draw, BIASES)
    grouped, which, scaling = option(draw, busy), draw(st.integers(0, 255)), switched(draw, busy, "scaling")
    spread, rate = biases if biased and score == "sigmoid" else (0.0, 0.0)
    pairs = groupings(sizes["experts"], sizes["top_k"])
    groups, limit = pairs[which % len(pairs)] if grouped else (0, 0)
    limit = 0 if which >= IDLE else limit
    drawn = {"score": score, "scaling": scaling, "expert_bias": spread, "bias_rate": rate}
    return drawn | {"expert_groups": groups, "group_topk": limit}


def _capacity(draw: Draw, busy: int, sizes: Mapping[str, Any], router: Mapping[str, Any]) -> dict[str, Any]:
    """How many copies an expert takes, from far too few to more than there are. By gates rarely: equal tokens at the
    head of a row have equal gates, and which of them is dropped is anybody's guess: one case in five is inconclusive.

    Padding to capacity fails where there is room for more than all tokens (docs/findings/padding-beyond-all-tokens.md);
    and megatron counts it as load, and which tokens it takes for it is anybody's guess.
    """
    often, capacity, padded = draw(st.integers(0, 23)), switched(draw, busy, "capacity"), option(draw, busy)
    capacity = capacity if often >= BY_POSITION else 0.0
    padded = padded and 0 < capacity * sizes["top_k"] <= sizes["experts"] and not router["bias_rate"]
    drops = "position" if capacity and often < 23 else "probs"
    return {"capacity": capacity, "pad_to_capacity": padded, "drops": drops}
