"""Bugs of released megatron-core that this suite meets and steps around: which cases, which law, how it is mended.

Each entry carries a mend, applied in every rank where the bug lives, so that all laws are judged in its region too; on
stock megatron-core its example must break its law (`test_known_bugs_still_live`). Knows cases; no torch, no ranks.
"""

from functools import lru_cache
from importlib import metadata

from fuzz import known_layers, known_recomputation
from fuzz.case import Case, twin_of
from fuzz.known_bug import Known as Known
from toy_models.coordinates import groups
from toy_models.spec import PPO, Batch, Layout, MoEModel, Switches

SUPPORTED = ("0.16.1", "0.19.2")


@lru_cache(maxsize=1024)
def _other_groups(layout: Layout) -> bool:
    """Whether the ranks that share experts are others than those that share dense weights."""
    return groups(layout, "etp") != groups(layout, "tp")


KNOWN = (
    Known(
        id="expert-gradients-over-dense-dp",
        upstream="NVIDIA/Megatron-LM#5916, commit cd4afffa64",
        lives=("0.16.1",),
        # With EP=1 the experts count as dense parameters; where ETP is not TP they live on other replicas.
        covers=lambda case: case.layout.ep == 1 and case.layout.etp != case.layout.tp,
        law="gradients match the reference",
        mend="toy_models.planted.mends:expert_gradients_over_expert_dp",
        example=Case(layout=Layout(world=2, etp=2), batch=Batch(rows=2)),
    ),
    Known(
        id="experts-of-other-replicas",
        upstream="docs/findings/experts-of-other-replicas.md",
        lives=("0.16.1", "0.19.2"),
        # The same where ETP is TP, which the fix of the bug above leaves out: a rank order that puts CP before TP
        # makes ETP groups of other ranks than TP groups.
        covers=lambda case: case.layout.ep == 1 and case.layout.etp == case.layout.tp and _other_groups(case.layout),
        law="gradients match the reference",
        mend="toy_models.planted.mends:expert_gradients_over_expert_dp",
        example=Case(
            layout=Layout(world=4, tp=2, cp=2, etp=2, order="cp-tp-ep-dp-pp"), model=MoEModel(heads=2, kv_heads=2)
        ),
    ),
    Known(
        id="norm-of-uninitialized-shards",
        upstream="NVIDIA/Megatron-LM#4084, commit a8bad4b441; docs/findings/norm-of-uninitialized-shards.md",
        lives=("0.16.1",),
        # Only the weight initialisers mark a shard as tensor parallel, and the norm counts no other shard of TP rank 1.
        covers=lambda case: not case.switches.perform_initialization and max(case.layout.tp, case.layout.etp) > 1,
        law="gradient norm is that of the observed gradients",
        mend="toy_models.planted.mends:shards_marked_without_initialization",
        example=Case(
            layout=Layout(world=2, tp=2, ep=2),
            model=MoEModel(heads=2, kv_heads=2),
            ppo=PPO(),
            switches=Switches(perform_initialization=False),
        ),
    ),
    Known(
        id="interleaved-two-stages",
        upstream="NVIDIA/Megatron-LM#1450 (open); docs/findings/interleaved-two-stages.md",
        lives=("0.16.1", "0.19.2"),
        # Both neighbours are one rank: the two messages that it sends are taken for each other.
        covers=lambda case: case.layout.pp == 2 and case.layout.vpp > 1 and case.switches.p2p == "batched",
        law="ratio is one before the first step",
        mend="toy_models.planted.mends:two_stages_meet_in_order",
        example=Case(
            layout=Layout(world=2, pp=2, vpp=2), model=MoEModel(layers=4), batch=Batch(rows=4, prompt=2, response=2)
        ),
    ),
    Known(
        id="uneven-ends-of-two-stages",
        upstream="docs/findings/uneven-ends-of-two-stages.md",
        lives=("0.16.1", "0.19.2"),
        # Both ends are given and no stage is left between them: a division by their number, which is zero.
        covers=lambda case: case.layout.split == "ends" and case.layout.pp == 2 and case.layout.vpp > 1,
        law="every rank finishes",
        mend="toy_models.planted.mends:uneven_ends_without_a_middle",
        example=Case(
            layout=Layout(world=2, pp=2, vpp=2, split="ends", stages=(2, 1, 2, 1)),
            model=MoEModel(layers=6),
            batch=Batch(rows=2),
            switches=Switches(p2p="plain"),
        ),
    ),
    Known(
        id="layout-of-another-pipeline",
        upstream="docs/findings/layout-of-another-pipeline.md",
        lives=("0.16.1", "0.19.2"),
        # The layout asks parallel_state for the pipeline rank and for virtual stages, whatever groups it is handed.
        covers=lambda case: case.layout.split == "list" and case.switches.groups == "other",
        law="every layer is there once",
        mend="toy_models.planted.mends:layout_of_the_given_pipeline",
        example=Case(
            layout=Layout(world=2, pp=2, split="list", stages=(1, 2)),
            model=MoEModel(layers=3),
            switches=Switches(groups="other"),
        ),
    ),
    Known(
        id="experts-before-tensors",
        upstream="docs/findings/experts-before-tensors.md",
        lives=("0.16.1", "0.19.2"),
        # preprocess reads the counts of the TP x EP group as if TP were its faster axis.
        covers=lambda case: (
            case.layout.etp > 1
            and case.layout.ep > 1
            and case.layout.order.index("ep") < case.layout.order.index("tp")
            and "alltoall" in (case.switches.dispatcher, twin_of(case).switches.dispatcher)
        ),
        law="collectives run in lock-step",
        mend="toy_models.planted.mends:counts_by_expert_rank",
        example=Case(
            layout=Layout(world=4, ep=2, etp=2, order="ep-tp-dp-cp-pp"),
            model=MoEModel(ffn=4),
            batch=Batch(rows=4, prompt=3),
        ),
    ),
    Known(
        id="outputs-freed-while-sent",
        upstream="NVIDIA/Megatron-LM#4047, commit 260cba7133",
        lives=("0.16.1",),
        # deallocate_output_tensor swaps the storage of a tensor whose isend nobody has waited for: a race.
        covers=lambda case: case.switches.deallocate and case.switches.p2p in ("overlapped", "flushed"),
        law="tensors are left alone while sent",
        mend="toy_models.planted.mends:sent_tensors_outlive_deallocation",
        example=Case(
            layout=Layout(world=2, pp=2, vpp=2),
            model=MoEModel(layers=4),
            batch=Batch(rows=12, prompt=8, response=8),
            switches=Switches(p2p="overlapped", deallocate=True),
        ),
    ),
    Known(
        id="padding-mask-of-later-stages",
        upstream="NVIDIA/Megatron-LM#5563, #5088",
        lives=("0.16.1", "0.19.2"),
        # Only the embedding's branch cuts the mask over TP; balance losses alone look at it.
        covers=lambda case: (
            case.switches.padding_mask != "none"
            and case.layout.tp > 1
            and (case.layout.pp > 1 or case.switches.decoder_input)
            and case.model.balance > 0
        ),
        law="every rank finishes",
        mend="toy_models.planted.mends:padding_mask_scattered_on_every_stage",
        example=Case(
            layout=Layout(world=2, tp=2, etp=2),
            model=MoEModel(heads=2, kv_heads=2, ffn=4, aux_loss=1.0),
            switches=Switches(padding_mask="all_false", decoder_input=True),
            batch=Batch(prompt=3),
        ),
    ),
    Known(
        id="padding-mask-of-expert-biases",
        upstream="NVIDIA/Megatron-LM#6111, mended by #6114",
        lives=("0.16.1", "0.19.2"),
        # [tokens, E] & [tokens]: no such shapes, or, with as many tokens as experts, experts left out and not tokens.
        covers=lambda case: case.model.expert_bias > 0 and case.switches.padding_mask != "none",
        law="every rank finishes",
        mend="toy_models.planted.mends:padding_mask_of_expert_biases",
        example=Case(
            model=MoEModel(score="sigmoid", expert_bias=0.5),
            batch=Batch(prompt=3),
            switches=Switches(padding_mask="all_false"),
        ),
    ),
    Known(
        id="expert-biases-of-other-groups",
        upstream="docs/findings/expert-biases-of-other-groups.md",
        lives=("0.16.1",),
        # The load is summed over parallel_state's TP x CP x DP group: here over other stages, which have other layers.
        covers=lambda case: case.model.expert_bias > 0 and case.switches.groups == "other" and case.layout.pp > 1,
        law="expert biases follow the load",
        mend="toy_models.planted.mends:expert_biases_over_the_given_groups",
        example=Case(
            layout=Layout(world=2, pp=2),
            model=MoEModel(layers=2, experts=4, score="sigmoid", expert_bias=0.5, bias_rate=0.5),
            batch=Batch(prompt=3),
            switches=Switches(groups="other"),
        ),
    ),
    *known_recomputation.KNOWN,
    *known_layers.KNOWN,
)


def version() -> str:
    """The installed megatron-core."""
    return metadata.version("megatron-core")


def unsupported() -> str:
    """What is wrong with the installed megatron-core, in one line; empty where it is supported."""
    if version() in SUPPORTED:
        return ""
    said = f"megatron-core {version()} is not supported (supported: {', '.join(SUPPORTED)})"
    return f"{said}; --any-version goes on all the same"


def living() -> tuple[Known, ...]:
    """The known bugs of the installed megatron-core; of an unsupported one, those of the newest supported."""
    here = version() if version() in SUPPORTED else SUPPORTED[-1]
    return tuple(bug for bug in KNOWN if here in bug.lives)


def mends() -> tuple[str, ...]:
    """What to apply in every rank so that the living known bugs hide nothing."""
    return tuple(dict.fromkeys(bug.mend for bug in living()))


def met(case: Case) -> tuple[str, ...]:
    """The ids of the living known bugs whose region a case lies in."""
    return tuple(bug.id for bug in living() if bug.covers(case))
