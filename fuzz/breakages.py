"""The ways to break a valid case, as a table: of each its values for this case, none where it cannot be broken so.

Plain data and arithmetic on cases (`fuzz.broken` says what an override is). Knows no megatron and no Hypothesis.
"""

from collections.abc import Callable, Iterable

from fuzz.broken import Overrides
from fuzz.case import Case
from fuzz.order import micro_batches
from toy_models.batching import padded_width

Values = Iterable[Overrides]


def _each(name: str, *values: object) -> list[Overrides]:
    """One override, with each of the values."""
    return [((name, value),) for value in values]


def _when(condition: object, values: Values) -> Values:
    return values if condition else ()


# ---- process groups --------------------------------------------------------------------------------------------

DEGREES = ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor")


def _degrees_that_do_not_fit(case: Case) -> Values:
    world = case.layout.world
    sizes = [f"groups.{name}_parallel_size" for name in DEGREES]
    return [((size, value),) for size in sizes for value in (2 * world, world + 1, 0, -1)]


def _degrees_of_config(case: Case) -> Values:
    """Degrees that are not those of the process groups."""
    layout = case.layout
    own = (layout.tp, layout.pp, layout.cp, layout.ep, layout.etp)
    pairs = [(f"config.{name}_parallel_size", degree) for name, degree in zip(DEGREES, own, strict=True)]
    return [((name, 1 if degree > 1 else 2),) for name, degree in pairs]


def _orders(case: Case) -> Values:
    layout = case.layout
    orders = ["tp-cp-ep-dp-zz-pp", "tp-tp-cp-ep-dp-pp", "tp cp ep dp pp"]
    orders += ["tp-cp-ep-dp"] * (layout.pp > 1) + ["tp-cp-ep-pp"] * (layout.dp > 1) + ["cp-ep-dp-pp"] * (layout.tp > 1)
    orders += ["tp-cp-ep-pp-dp", "pp-tp-cp-ep-dp"] * (layout.pp > 1 and layout.dp != layout.edp)
    return _each("groups.order", *orders)


def _other_groups(case: Case) -> Values:
    layout = case.layout
    return [
        *_when(layout.pp == 1, _each("groups.virtual_pipeline_model_parallel_size", 2)),
        *_each("groups.num_distributed_optimizer_instances", layout.dp * layout.cp + 1),
        *_when(layout.cp > 1, _each("groups.hierarchical_context_parallel_sizes", (layout.cp + 1,))),
        *_each("groups.sharp_enabled_group", "dp"),
    ]


# ---- sizes -----------------------------------------------------------------------------------------------------


def _widths_that_do_not_divide(case: Case) -> Values:
    model, tp, etp = case.model, case.layout.tp, case.layout.etp
    return [
        *_when(tp > 1, _each("config.num_attention_heads", model.heads + 1)),
        *_when(tp > 1, _each("config.num_query_groups", tp + 1)),
        *_when(tp > 1 and model.dense, _each("config.ffn_hidden_size", model.dense_ffn + 1)),
        *_when(tp > 1 and model.shared_ffn, _each("config.moe_shared_expert_intermediate_size", model.shared_ffn + 1)),
        *_when(tp > 1, _each("gpt.vocab_size", model.vocab + 1)),
        *_when(etp > 1, _each("config.moe_ffn_hidden_size", model.ffn + 1)),
        *_when(model.shared_ffn, _each("config.moe_shared_expert_intermediate_size", 0, -2)),
    ]


def _lengths(case: Case) -> Values:
    """Rows that sequence parallelism or context parallelism cannot cut, or that are too short for it."""
    tp, cp, width = case.layout.tp, case.layout.cp, padded_width(case.layout, case.batch)
    return _when(tp * cp > 1, _each("inputs.width", width + 1))


def _sequence_parallel(case: Case) -> Values:
    return _each("config.sequence_parallel", case.layout.tp == 1)


# ---- experts ---------------------------------------------------------------------------------------------------


def _experts(case: Case) -> Values:
    return [
        *_when(case.layout.ep > 1, _each("config.num_moe_experts", case.model.experts + 1)),
        *_each("config.num_moe_experts", 0, -1),
    ]


def _top_k(case: Case) -> Values:
    model = case.model
    return [
        *_each("config.moe_router_topk", model.experts + 1, 0, -1),
        *_when(model.top_k == 1, _each("config.moe_router_pre_softmax", False)),
    ]


def _groups_of_experts(case: Case) -> Values:
    experts, top_k = case.model.experts, case.model.top_k
    pairs: list[tuple[int | None, int]] = [(None, 1), (0, 1), (experts + 1, 1), (experts, experts + 1), (experts, -1)]
    pairs += [(experts, top_k + 1)] * (top_k < experts)  # top_k // group_topk is 0: groups without a score
    pairs += [(experts, 1)] * (top_k > 1)  # a group has one expert, and top_k are asked for
    limits = [(("config.moe_router_num_groups", n), ("config.moe_router_group_topk", k)) for n, k in pairs]
    return [*limits, *_each("config.moe_router_num_groups", experts + 1)]


def _routers(case: Case) -> Values:
    loss, coefficient = "config.moe_router_load_balancing_type", "config.moe_aux_loss_coeff"
    return [
        *_each("config.moe_router_enable_expert_bias", True),
        *_each("config.moe_router_score_function", "tanh"),
        *_when(case.model.aux_loss, [((loss, "aux-loss"),)]),
        ((loss, "sinkhorn"), (coefficient, 0.3)),
        ((loss, ("aux_loss", "seq_aux_loss")), (coefficient, 0.3)),
        ((loss, ("aux_loss", "seq_aux_loss")), (coefficient, (0.3,))),
        *_each("config.moe_router_fusion", True),
    ]


def _capacities(case: Case) -> Values:
    factor, loss = "config.moe_expert_capacity_factor", "config.moe_router_load_balancing_type"
    return [
        *_each("config.moe_pad_expert_input_to_capacity", True),
        ((factor, 1.0), (loss, "sinkhorn"), ("config.moe_aux_loss_coeff", 0.0)),
        ((factor, 1.0), ("config.moe_token_drop_policy", "first")),
        ((factor, 0.0),),
        ((factor, -1.0), ("config.moe_pad_expert_input_to_capacity", True)),
    ]


def _dispatchers(case: Case) -> Values:
    name = "config.moe_token_dispatcher_type"
    return [
        *_each(name, "all_to_all", "alltoall_seq", "flex"),
        ((name, "allgather"), ("config.variable_seq_lengths", True)),
        *_when(case.model.shared_ffn, [((name, "allgather"), ("config.moe_shared_expert_overlap", True))]),
        ((name, "alltoall"), ("config.moe_enable_deepep", True)),
        ((name, "alltoall"), ("config.moe_router_padding_for_quantization", True)),
    ]


def _expert_kernels(case: Case) -> Values:
    """What needs TransformerEngine or a library for grouped matrices, or one expert per token."""
    one_each = _each("config.moe_apply_probs_on_input", True)
    return [
        *_each("config.moe_grouped_gemm", True),
        *_each("config.moe_permute_fusion", True),
        *_each("config.moe_latent_size", 4),
        *_when(case.model.top_k > 1, one_each),
    ]


def _layer_kinds(case: Case) -> Values:
    kinds = tuple(int(layer in case.model.moe) for layer in range(case.model.layers))
    return _each("config.moe_layer_freq", (*kinds, 1), kinds[1:], 0, "experts", (2, *kinds[1:]))


# ---- pipelines -------------------------------------------------------------------------------------------------


def _uneven(case: Case) -> Values:
    layers, first, last = case.model.layers, "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
    if case.layout.pp == 1 or case.layout.split != "even":
        return ()
    return [
        *_each(f"config.{first}", layers, layers + 1, 0, -1),
        *_each(f"config.{last}", layers, layers + 1, 0, -1),
        ((f"config.{first}", 1), ("config.account_for_embedding_in_pipeline_split", True)),
        ((f"config.{last}", 1), ("config.account_for_loss_in_pipeline_split", True)),
        *_each("config.account_for_embedding_in_pipeline_split", True),
        *_each("config.virtual_pipeline_model_parallel_size", layers + 1),
        (("config.num_layers", layers + 1), ("config.moe_layer_freq", 1)),
    ]


def _stage_lists(case: Case) -> Values:
    pp, layers = case.layout.pp, case.model.layers
    if pp == 1 or case.layout.split != "even" or case.layout.vpp > 1:
        return ()
    one, rest = ("embedding", *["decoder"] * layers), [("decoder",)] * (pp - 2)
    empty = [()] * (pp - 2)
    lists = [
        (one, *empty, ()),  # no loss
        (one, *rest, ("decoder", "loss")),  # too many layers
        (one[:-1], *empty, ("loss",)),  # too few
        (one, *empty, ("embedding", "loss")),
        (("embedding", *["dekoder"] * layers), *empty, ("loss",)),
        (one, *empty, (), ("loss",)),  # one stage too many
        (),
    ]
    return [*_each("config.pipeline_model_parallel_layout", *lists, "Et|L|L", "E|x"), _both_cuts(case)]


def _both_cuts(case: Case) -> Overrides:
    whole = (("embedding", *["decoder"] * case.model.layers), *[()] * (case.layout.pp - 2), ("loss",))
    return ("config.pipeline_model_parallel_layout", whole), ("config.account_for_loss_in_pipeline_split", True)


def _schedules(case: Case) -> Values:
    """How the interleaved schedule takes its micro-batches, and how stages talk to each other."""
    pp, number = case.layout.pp, micro_batches(case)
    group, overlap, batched = "config.microbatch_group_size_per_vp_stage", "overlap_p2p_comm", "batch_p2p_comm"
    both = ((f"config.{overlap}", True), (f"config.{batched}", True))
    if case.layout.vpp == 1:
        return [*_each("config.overlap_p2p_comm_warmup_flush", True), *_when(pp > 1, _alone(overlap, batched))]
    sizes = [size for size in range(pp, number + 1) if 0 < number % size < pp]
    warm = ((f"config.{overlap}", False), (f"config.{batched}", False), ("config.overlap_p2p_comm_warmup_flush", True))
    batches = (
        (f"config.{batched}", True),
        (f"config.{overlap}", False),
        ("config.overlap_p2p_comm_warmup_flush", False),
    )
    return [*_each(group, pp - 1, number + 1, 0, *sizes), both, warm, *_when(pp == 2, [batches])]


def _alone(overlap: str, batched: str) -> Values:
    return [((f"config.{overlap}", True), (f"config.{batched}", value)) for value in (False, True)]


def _messages(case: Case) -> Values:
    """What the schedule is told of the batch and is not so; between stages it is the shape of a message."""
    other = "torch.float32" if case.precision == "float64" else "torch.float64"
    told = [
        *_each("schedule.seq_length", 2 * padded_width(case.layout, case.batch)),
        *_each("schedule.micro_batch_size", 2 * case.batch.rows),
        *_each("config.pipeline_dtype", None, other),
    ]
    return [*_each("schedule.num_microbatches", 0, -1), *_when(case.layout.pp > 1, told)]


# ---- losses, gradients, optimizer, the rest --------------------------------------------------------------------


def _losses(case: Case) -> Values:
    per_token = ("config.calculate_per_token_loss", True)  # with a loss that does not count its tokens
    return [(per_token,), (per_token, ("ddp.average_in_collective", True))]


def _gradients(case: Case) -> Values:
    return [
        *_each("ddp.use_distributed_optimizer", True),
        *_each("ddp.overlap_param_gather", True),
        *_each("ddp.num_distributed_optimizer_instances", 2),
        *_each("ddp.reuse_grad_buf_for_mxfp8_param_ag", True),
        (("ddp.overlap_grad_reduce", True), ("ddp.bucket_size", 0)),
    ]


def _optimizers(case: Case) -> Values:
    return [
        *_each("optimizer.optimizer", "lion"),
        *_each("optimizer.use_distributed_optimizer", True),
        *_each("optimizer.use_precision_aware_optimizer", True),
        *_each("optimizer.overlap_param_gather", True),
        *_each("optimizer.exp_avg_dtype", "torch.float64"),
    ]


def _recomputing(case: Case) -> Values:
    how, method, layers = (f"config.recompute_{name}" for name in ("granularity", "method", "num_layers"))
    modules = "config.recompute_modules"
    return [
        ((how, "some"),),
        ((how, "full"),),
        ((how, "full"), (method, "any"), (layers, 1)),
        ((how, "full"), (method, "uniform")),
        ((how, "selective"), (layers, 1)),
        ((how, "selective"), (modules, ("attention",))),
        ((how, "selective"), (modules, ("moe_act",))),
        *_when(case.layout.tp > 1, [((how, "selective"), ("config.distribute_saved_activations", True))]),
    ]


def _precisions(case: Case) -> Values:
    return [
        (("config.fp16", True), ("config.bf16", True)),
        *_each("config.fp8_param", True),
        (("config.fp8", "hybrid"), ("config.fp4", "nvfp4")),
        *_each("config.cuda_graph_impl", "some"),
        (("config.cpu_offloading", True), ("config.cpu_offloading_num_layers", case.model.layers)),
        *_each("config.defer_embedding_wgrad_compute", True),
    ]


Breakage = Callable[[Case], Values]
BREAKAGES: tuple[Breakage, ...] = (
    _degrees_that_do_not_fit, _degrees_of_config, _orders, _other_groups, _widths_that_do_not_divide, _lengths,
    _sequence_parallel, _experts, _top_k, _groups_of_experts, _routers, _capacities, _dispatchers, _expert_kernels,
    _layer_kinds, _uneven, _stage_lists, _schedules, _messages, _losses, _gradients, _optimizers, _recomputing,
    _precisions,
)  # fmt: skip


def breakages_of(case: Case, kind: int) -> list[Overrides]:
    """The values of a kind of breakage, or of the next kind in the table that this case has."""
    turned = (*BREAKAGES[kind:], *BREAKAGES[:kind])
    return next(found for breakage in turned if (found := list(breakage(case))))
