"""Broken configurations that released megatron-core does not refuse as it should: which, and which law they break.

As `fuzz.known` for cases; there is nothing to mend here, since nobody needs what is broken. Knows broken
configurations; no torch, no ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fuzz.broken import Broken
from fuzz.case import Case, Violation
from fuzz.known import SUPPORTED, version
from toy_models.spec import Batch, Layout, MoEModel

CHECK, ALIKE, ENDS = "what is refused is refused by a check", "all ranks refuse alike", "every rank ends"
WHY, BEFORE = "a refusal says why", "a refusal comes before the first collective"
RIGHT, READ = "what is accepted is right", "what is accepted can be read"


@dataclass(frozen=True)
class Known:
    """One finding: `lives` are the versions that have it, `covers` whether a configuration meets it, `laws` it breaks.

    The example breaks the first of the laws.
    """

    id: str
    upstream: str
    covers: Callable[[Broken], bool]
    laws: tuple[str, ...]
    example: Broken
    lives: tuple[str, ...] = ("0.16.1",)


def _one_of(*names: str) -> Callable[[Broken], bool]:
    return lambda broken: any(name in names for name, _ in broken.overrides)


def _config_only(broken: Broken) -> bool:
    """A degree that differs from that of the process groups."""
    return any(
        n.startswith("config.") and n.endswith("_parallel_size") and "virt" not in n for n, _ in broken.overrides
    )


def _sharded_by_one(broken: Broken) -> bool:
    flags = [broken.get(f"{owner}.use_distributed_optimizer", False) for owner in ("ddp", "optimizer")]
    return flags[0] != flags[1]


def _no_check(broken: Broken) -> bool:
    """A number or a name that reaches an operator unchecked."""
    degree = any(name.startswith("groups.") and value == 0 for name, value in broken.overrides)
    top_k, axes = broken.get("config.moe_router_topk", 1), {"tp", "cp", "ep", "dp", "pp"}
    order = broken.get("groups.order", "tp").split("-")
    return (
        degree
        or set(order) - axes != set()
        or len(order) > len(set(order))
        or not 0 < top_k <= broken.case.model.experts
        or broken.get("config.moe_layer_freq", 1) == 0
        or broken.get("config.pipeline_model_parallel_layout", None) == ()
        or (broken.case.layout.cp > 1 and broken.get("inputs.width") is not None)
    )


def _impossible_groups(broken: Broken) -> bool:
    """Groups with fewer experts than each must give, or a negative number of groups."""
    groups, limit = broken.get("config.moe_router_num_groups"), broken.get("config.moe_router_group_topk")
    experts, top_k = broken.case.model.experts, broken.case.model.top_k
    return bool(groups and limit) and (limit < 0 or top_k // limit > experts // groups)


def _more_groups_than_experts(broken: Broken) -> bool:
    limit = broken.get("config.moe_router_group_topk")
    return limit is not None and limit > broken.case.model.top_k


def _late(broken: Broken) -> bool:
    """A check that stands in the forward pass."""
    odd = broken.case.layout.tp > 1 and broken.get("inputs.width") is not None
    sinkhorn = broken.get("config.moe_router_load_balancing_type") == "sinkhorn"
    late = _one_of(
        "config.moe_router_score_function", "config.moe_router_fusion", "config.moe_token_drop_policy",
        "config.moe_apply_probs_on_input",
    )  # fmt: skip
    return odd or sinkhorn or late(broken) or broken.get("config.sequence_parallel") is False


def _too_many_layers(broken: Broken) -> bool:
    sizes = [broken.get(f"config.num_layers_in_{end}_pipeline_stage") or 0 for end in ("first", "last")]
    return max(sizes) > broken.case.model.layers


def _broken(case: Case, **overrides: object) -> Broken:
    """Names with two underscores for the dot."""
    return Broken(case=case, overrides=tuple((name.replace("__", ".", 1), value) for name, value in overrides.items()))


ONE, STAGES = Case(), Case(layout=Layout(world=2, pp=2), model=MoEModel(layers=2))
TWO, TP = Case(layout=Layout(world=2), batch=Batch(rows=2)), MoEModel(heads=2, kv_heads=2)
FOUR = Case(model=MoEModel(experts=4, top_k=1))

KNOWN: tuple[Known, ...] = (
    Known(
        id="distributed-optimizer-in-one-config",
        upstream="docs/findings/distributed-optimizer-in-one-config.md; verl#5775, Megatron-Bridge#807",
        covers=_sharded_by_one,
        laws=(RIGHT, CHECK, ALIKE, READ),
        example=_broken(TWO, ddp__use_distributed_optimizer=True),
    ),
    Known(
        id="per-token-loss-without-tokens",
        upstream="docs/findings/per-token-loss-without-tokens.md",
        covers=lambda broken: broken.get("config.calculate_per_token_loss") is True,
        laws=(RIGHT,),
        example=_broken(TWO, config__calculate_per_token_loss=True),
    ),
    Known(
        id="groups-without-a-score",
        upstream="docs/findings/groups-without-a-score.md",
        covers=_more_groups_than_experts,
        laws=(RIGHT,),
        example=_broken(FOUR, config__moe_router_num_groups=4, config__moe_router_group_topk=2),
    ),
    Known(
        id="unknown-balance-loss",
        upstream="docs/findings/refusal-by-silence.md",
        covers=lambda broken: broken.get("config.moe_router_load_balancing_type") == "aux-loss",
        laws=(RIGHT,),
        example=_broken(Case(model=MoEModel(aux_loss=1.0)), config__moe_router_load_balancing_type="aux-loss"),
    ),
    Known(
        id="no-micro-batches",
        upstream="docs/findings/refusal-by-silence.md",
        covers=lambda broken: (broken.get("schedule.num_microbatches") or 0) <= 0 and "num_micro" in broken.names,
        laws=(RIGHT, READ, CHECK, ALIKE, ENDS, BEFORE),  # check_for_nan_in_grad notices, at the end of a step
        example=_broken(ONE, schedule__num_microbatches=0),
    ),
    Known(
        id="degrees-said-twice",
        upstream="docs/findings/refusal-by-silence.md",
        covers=_config_only,
        laws=(RIGHT, READ, CHECK, ALIKE, ENDS, BEFORE),
        example=_broken(Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2)), config__expert_model_parallel_size=1),
    ),
    Known(
        id="more-layers-than-there-are",
        upstream="docs/findings/refusal-by-silence.md; NVIDIA/Megatron-LM#2718 is its neighbour",
        covers=_too_many_layers,
        laws=(READ, RIGHT, ALIKE, CHECK),
        example=_broken(STAGES, config__num_layers_in_first_pipeline_stage=3),
    ),
    Known(
        id="shapes-that-a-pipeline-is-told",
        upstream="docs/findings/refusal-by-silence.md",
        covers=_one_of("schedule.seq_length", "schedule.micro_batch_size", "config.pipeline_dtype"),
        laws=(CHECK, ALIKE, ENDS, RIGHT, READ),
        example=_broken(STAGES, schedule__seq_length=4),
    ),
    Known(
        id="no-check-at-all",
        upstream="docs/findings/refusal-deep-inside.md",
        covers=lambda broken: _no_check(broken) or _impossible_groups(broken),
        laws=(CHECK, ALIKE, BEFORE),  # check_for_nan_in_grad notices, at the end of a step
        example=_broken(ONE, config__moe_router_topk=3),
    ),
    Known(
        id="fused-permutation-import",
        upstream="docs/findings/refusal-deep-inside.md",
        covers=_one_of("config.moe_permute_fusion"),
        laws=(CHECK,),
        example=_broken(ONE, config__moe_permute_fusion=True),
    ),
    Known(
        id="checks-in-the-forward-pass",
        upstream="docs/findings/refusal-in-the-forward-pass.md",
        covers=_late,
        laws=(BEFORE, ALIKE),
        example=_broken(Case(layout=Layout(world=2, tp=2), model=TP), config__sequence_parallel=False),
    ),
    Known(
        id="refusals-without-a-reason",
        upstream="docs/findings/refusal-deep-inside.md",
        covers=_one_of("groups.hierarchical_context_parallel_sizes", "config.num_moe_experts"),
        laws=(WHY,),
        example=_broken(Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2)), config__num_moe_experts=3),
    ),
)


def living() -> tuple[Known, ...]:
    """Those of the installed megatron-core; of an unsupported one, those of the newest supported."""
    here = version() if version() in SUPPORTED else SUPPORTED[-1]
    return tuple(one for one in KNOWN if here in one.lives)


def met(broken: Broken, violation: Violation) -> str:
    """The id of the living finding that a violation is; '' where it is new."""
    return next((one.id for one in living() if violation.law in one.laws and one.covers(broken)), "")
