"""Known bugs of biases, gates, sinks and shared experts; a part of `fuzz.known`. Knows cases; no torch, no ranks."""

from fuzz.case import Case
from fuzz.known_bug import Known
from toy_models.spec import PPO, Batch, Layout, MoEModel, Switches

MENDS = "toy_models.planted.mends_of_layers"
BATCH, CUT = Batch(rows=2, prompt=4, response=2), Layout(world=2, tp=2, ep=2)
SHARED = {"family": "qwen2moe", "hidden": 8, "heads": 2, "kv_heads": 2, "shared_ffn": 4}

KNOWN = (
    Known(
        id="tokens-dropped-at-random-places",
        upstream="docs/findings/tokens-dropped-at-random-places.md",
        lives=("0.16.1", "0.19.2"),
        # topk among numbers that are all 0 or 1 takes any.
        covers=lambda case: case.model.drops == "position",
        law="routing is valid",
        mend=f"{MENDS}:tokens_dropped_in_order",
        example=Case(
            model=MoEModel(experts=3, capacity=0.5, drops="position"), batch=Batch(rows=2, prompt=6, response=6)
        ),
    ),
    Known(
        id="biases-of-whole-experts",
        upstream="docs/findings/biases-of-whole-experts.md",
        lives=("0.16.1", "0.19.2"),
        # An expert that is not cut adds its bias, in place, to what a reduction over one rank returned as it was.
        covers=lambda case: case.model.biases and case.layout.ep == 1,
        law="every rank finishes",
        mend=f"{MENDS}:biases_added_out_of_place",
        example=Case(model=MoEModel(biases=True), batch=BATCH),
    ),
    Known(
        id="biases-recomputed-without-end",
        upstream="docs/findings/biases-recomputed-without-end.md",
        lives=("0.16.1",),
        # A checkpoint returns the bias itself, which autograd makes its output: its backward pass asks for itself.
        covers=lambda case: case.model.biases and bool(case.model.dense) and case.switches.recompute in ("mlp", "all"),
        law="every rank finishes",
        mend=f"{MENDS}:biases_handed_on_as_views",
        example=Case(
            model=MoEModel(layers=2, dense=(1,), dense_ffn=3, biases=True),
            batch=BATCH,
            switches=Switches(recompute="mlp"),
        ),
    ),
    Known(
        id="biases-of-other-experts",
        upstream="docs/findings/biases-of-other-experts.md",
        lives=("0.16.1", "0.19.2"),
        # An expert's second bias is marked as sequence parallel: its gradient is summed over TP, with other experts'.
        covers=lambda case: case.model.biases and case.layout.tp > 1,
        law="gradients match the reference",
        mend=f"{MENDS}:biases_of_experts_stay_apart",
        example=Case(layout=CUT, model=MoEModel(heads=2, kv_heads=2, biases=True), batch=BATCH),
    ),
    Known(
        id="overlapped-experts-without-clamp",
        upstream="docs/findings/overlapped-experts-without-clamp.md",
        lives=("0.16.1", "0.19.2"),
        # The overlapped forward pass has a gated activation of its own, which knows no clamp and no offset.
        covers=lambda case: case.switches.shared_overlap and bool(case.model.clamp or case.model.glu_offset),
        law="logits match the reference",  # with an offset of 1 other tokens are sampled, which is an earlier law
        mend=f"{MENDS}:overlapped_experts_are_clamped",
        example=Case(
            model=MoEModel(**SHARED, glu_offset=-0.25),  # type: ignore[arg-type]
            batch=BATCH,
            switches=Switches(shared_overlap=True),
        ),
    ),
    Known(
        id="shared-gate-before-its-gather",
        upstream="docs/findings/shared-gate-before-its-gather.md",
        lives=("0.16.1",),
        # Overlapped, the shared expert is never called as a module: the hook that waits for its gate does not run.
        covers=lambda case: (
            case.switches.shared_overlap and case.switches.overlap_gather and case.model.family == "qwen2moe"
        ),
        law="every rank finishes",
        mend=f"{MENDS}:shared_gate_waits",
        example=Case(
            layout=Layout(world=2),
            model=MoEModel(**SHARED),  # type: ignore[arg-type]
            batch=Batch(rows=4),
            ppo=PPO(mini_batches=2, optimizer="adam", lr=0.03, critic_lr=0.03, eps=0.01),
            switches=Switches(
                distributed=True, overlap_reduce=True, overlap_gather=True, bucket=1, shared_overlap=True
            ),
        ),
    ),
    Known(
        id="gates-of-other-heads",
        upstream="docs/findings/gates-of-other-heads.md",
        lives=("0.16.1",),
        # With fewer query groups than TP ranks a rank picks its own queries of a group, and all of the group's gates.
        covers=lambda case: case.model.output_gate and case.model.kv_heads < case.layout.tp,
        law="every rank finishes",
        mend=f"{MENDS}:gates_of_own_heads",
        example=Case(layout=CUT, model=MoEModel(heads=2, kv_heads=1, output_gate=True), batch=BATCH),
    ),
    Known(
        id="sinks-left-out-of-the-norm",
        upstream="docs/findings/sinks-left-out-of-the-norm.md",
        lives=("0.16.1", "0.19.2"),
        # Sinks are cut over TP and not marked so: the norm counts those of the first TP rank.
        covers=lambda case: case.model.sinks == "learnable" and case.layout.tp > 1 and case.layout.cp == 1,
        law="gradient norm is that of the observed gradients",
        mend=f"{MENDS}:sinks_counted_on_every_rank",
        example=Case(layout=CUT, model=MoEModel(heads=2, kv_heads=2, sinks="learnable"), batch=BATCH),
    ),
)
