"""Known bugs of what megatron-core recomputes; a part of `fuzz.known`. Knows cases; no torch, no ranks."""

from fuzz.case import Case
from fuzz.known_bug import Known
from toy_models import coordinates
from toy_models.spec import PPO, Batch, MoEModel, Switches

PAGE = "docs/findings/recomputation.md"
MENDS = "toy_models.planted.mends_of_recomputation"


def _stages(case: Case) -> tuple[int, ...]:
    return coordinates.stages(case.layout, case.model.layers)


KNOWN = (
    Known(
        id="recomputed-beyond-the-last-layer",
        upstream=f"{PAGE}; mended in 0.19.2",
        lives=("0.16.1",),
        # The chunk that begins before the last layer ends behind it.
        covers=lambda case: (
            case.switches.recompute == "uniform" and any(n % case.switches.recompute_layers for n in _stages(case))
        ),
        law="every rank finishes",
        mend=f"{MENDS}:last_chunk_ends_with_the_layers",
        example=Case(switches=Switches(recompute="uniform", recompute_layers=2)),
    ),
    Known(
        id="padding-mask-of-layers-not-recomputed",
        upstream=f"{PAGE}; mended in 0.19.2",
        lives=("0.16.1",),
        # Layers beyond recompute_num_layers are called without it; balance losses and the load look at it.
        covers=lambda case: (
            case.switches.recompute == "block"
            and case.switches.padding_mask == "padding"
            and max(_stages(case)) > case.switches.recompute_layers
            and (case.model.balance > 0 or case.model.expert_bias > 0)
        ),
        law="gradients match the reference",
        mend=f"{MENDS}:padding_mask_of_every_layer",
        example=Case(
            model=MoEModel(layers=2, aux_loss=1.0),
            batch=Batch(rows=2, prompt=4, response=4, micro_rows=2, raggedness="one_long"),
            switches=Switches(recompute="block", recompute_layers=1, padding_mask="padding"),
        ),
    ),
    Known(
        id="nothing-recomputed-behind-frozen-embeddings",
        upstream=PAGE,
        lives=("0.16.1", "0.19.2"),
        # What enters the first layer carries no gradient, so what a checkpoint returns carries none.
        covers=lambda case: (
            case.switches.recompute in ("uniform", "block", "layernorm", "all") and case.ppo.frozen == "embedding"
        ),
        law="gradients match the reference",
        mend=f"{MENDS}:recomputed_behind_frozen_embeddings",
        example=Case(ppo=PPO(frozen="embedding"), switches=Switches(recompute="uniform", recompute_layers=1)),
    ),
    Known(
        id="norms-recomputed-without-transformer-engine",
        upstream=PAGE,
        lives=("0.16.1", "0.19.2"),
        # fp8=False, the default, is taken for fp8: a name that only TransformerEngine brings.
        covers=lambda case: case.switches.recompute in ("layernorm", "all"),
        law="every rank finishes",
        mend=f"{MENDS}:norms_recomputed_without_fp8",
        example=Case(switches=Switches(recompute="layernorm")),
    ),
)
