"""What a case is made of: layout, model, batch, PPO settings, switches. Plain frozen values, stdlib only.

Knows nothing of torch, megatron-core, transformers or the fuzzer. Every value checks itself when it is made
and raises ValueError with all numbers involved; nothing that exists is invalid on its own. What concerns two
values at once (heads against TP, rows against DP) is checked by `check_together`. Layouts and models are in modules of
their own, and are imported from here.
"""

from dataclasses import dataclass
from math import prod

from toy_models.checks import MOST as MOST
from toy_models.checks import check_choice, check_counts, check_flags, check_reals, require
from toy_models.layout import AXES as AXES
from toy_models.layout import SPLITS as SPLITS
from toy_models.layout import Layout as Layout
from toy_models.model import ACTIVATIONS as ACTIVATIONS
from toy_models.model import AS_FAMILY as AS_FAMILY
from toy_models.model import DROPS as DROPS
from toy_models.model import FAMILIES as FAMILIES
from toy_models.model import NORMALISED as NORMALISED
from toy_models.model import OWN_HEAD_DIM as OWN_HEAD_DIM
from toy_models.model import SCORES as SCORES
from toy_models.model import SHARED as SHARED
from toy_models.model import SHARED_GATE as SHARED_GATE
from toy_models.model import SINKS as SINKS
from toy_models.model import MoEModel as MoEModel
from toy_models.model import groupings as groupings

ROUTER_DTYPES = ("none", "fp32", "fp64")
DISPATCHERS = ("alltoall", "allgather")
RAGGEDNESS = ("equal", "ragged", "one_long")
OPTIMIZERS = ("sgd", "adam")
# batch_p2p_comm, neither, overlap_p2p_comm, overlap_p2p_comm_warmup_flush
PIPES = ("batched", "plain", "overlapped", "flushed")
GROUPS = ("global", "explicit", "other")
MASKS = ("none", "all_false", "padding")
SELECTIVE = ("core_attn", "layernorm", "mlp", "moe", "shared_experts")  # without CUDA; moe_act needs grouped GEMM
RECOMPUTES = ("none", "uniform", "block", *SELECTIVE, "all")
FROZEN = ("none", "router", "experts", "attention", "embedding")

# Numbers that are each within bounds could still ask for terabytes together: these products are bounded too, `width`
# being prompt + response. 2**24 numbers of float64 are 128 MiB; what is drawn stays far below.
MOST_NUMBERS = 2**24
PRODUCTS = (
    ("layers", "experts", "hidden", "ffn"),
    ("layers", "hidden", "shared_ffn"),
    ("layers", "hidden", "dense_ffn"),
    ("layers", "hidden", "heads", "head_dim"),
    ("rows", "width", "layers", "hidden"),
    ("rows", "width", "experts"),
    ("rows", "width", "vocab"),
    ("rows", "width", "width", "heads"),
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The prompts of one iteration and how they are cut: `rows` over mini-batches, DP ranks and micro-batches.

    `prompt` and `response` are the greatest lengths in tokens; `raggedness` says how rows fall short of them.
    With `holes` some response tokens come from an environment: they are forced and have no loss. The end token
    is vocab-1; the padding token is 0, or the end token where `pad_is_eos`.
    """

    rows: int = 1
    prompt: int = 1
    response: int = 1
    micro_rows: int = 1
    raggedness: str = "equal"
    holes: bool = False
    pad_is_eos: bool = False

    def __post_init__(self) -> None:
        check_counts(self, rows=1, prompt=1, response=1, micro_rows=1)
        check_choice(self, raggedness=RAGGEDNESS)
        check_flags(self, "holes", "pad_is_eos")


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Settings of the PPO update; `docs/ppo.md` has every formula. `max_norm` 0 switches clipping off.

    `frozen` names parameters of actor and critic that are not trained. `embedding_lr` is decoupled_lr, the rate of
    embeddings and the token head, 0 for that of all others; `coupled_decay` asks for Adam's decay in the gradient (not
    decoupled_weight_decay), `qk_decay` for decay of the norms of queries and keys too (apply_wd_to_qk_layernorm).
    """

    epochs: int = 1
    mini_batches: int = 1
    temperature: float = 1.0
    gamma: float = 1.0
    lam: float = 1.0
    kl_coef: float = 0.0
    clip_eps: float = 0.2
    value_clip: float = 0.2
    entropy_coef: float = 0.0
    whiten: bool = False
    optimizer: str = "sgd"
    lr: float = 0.1
    critic_lr: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_norm: float = 0.0
    frozen: str = "none"
    embedding_lr: float = 0.0
    coupled_decay: bool = False
    qk_decay: bool = False

    def __post_init__(self) -> None:
        check_counts(self, epochs=1, mini_batches=1)
        check_choice(self, optimizer=OPTIMIZERS, frozen=FROZEN)
        check_flags(self, "whiten", "coupled_decay", "qk_decay")
        check_reals(self, embedding_lr=(0, 100))
        adam = self.optimizer == "adam" or not self.coupled_decay
        require(adam, f"coupled_decay=True needs optimizer='adam', but optimizer={self.optimizer!r}")
        unit, positive = (0.0, 1.0), (1e-12, 1e3)
        check_reals(self, temperature=(1e-2, 1e2), gamma=unit, lam=unit, kl_coef=(0, 100), clip_eps=positive)
        check_reals(self, value_clip=positive, entropy_coef=(-100, 100), lr=(0, 100), critic_lr=(0, 100))
        check_reals(self, weight_decay=(0, 10), momentum=(0, 0.999), beta1=(0, 0.999), beta2=(0, 0.99999))
        check_reals(self, eps=positive, max_norm=(0, 1e6))


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Options of megatron-core that must not matter, or only to rounding; weights are always loaded.

    `p2p` is how stages talk to each other (PIPES), `deallocate` deallocate_pipeline_outputs, `group` the micro-batches
    that the interleaved schedule takes at a time (microbatch_group_size_per_vp_stage), 0 for as many as stages. Where
    not `forward_sp`, reference and reward model run without sequence parallelism. `decoder_input` hands the embedded
    tokens to the actor and the critic. `padding_mask` is that of GPTModel.forward; one that marks padding matters for
    balance losses. `groups`: megatron takes its process groups from parallel_state; or is handed them; or is handed
    them while parallel_state has those of another layout, with the same TP. `router_dtype` is moe_router_dtype,
    `qk_scaling` apply_query_key_layer_scaling, `fp32_residual` fp32_residual_connection, `deterministic` whether torch
    is asked for deterministic algorithms; `shared_overlap` is moe_shared_expert_overlap.

    How gradients are reduced: `distributed` is use_distributed_optimizer (of Adam only); `overlap_reduce`
    overlap_grad_reduce, `overlap_gather` overlap_param_gather, `align` align_grad_reduce and align_param_gather of
    megatron's training loop; `bucket` bucket_size, 0 for the default; `pad_buckets` pad_buckets_for_high_nccl_busbw;
    `average` average_in_collective; `check_nan` check_for_nan_in_grad; `count_zeros` log_num_zeros_in_grad.

    `recompute` is recompute_method of a full recomputation, or the recompute_modules of a selective one (SELECTIVE, or
    "all" of them); `recompute_layers` recompute_num_layers, 0 where it is selective. `per_token` is
    calculate_per_token_loss: tokens are counted and divided by at the end.
    """

    dispatcher: str = "alltoall"
    perform_initialization: bool = True
    p2p: str = "batched"
    deallocate: bool = False
    group: int = 0
    forward_sp: bool = True
    decoder_input: bool = False
    padding_mask: str = "none"
    groups: str = "global"
    router_dtype: str = "none"
    distributed: bool = False
    overlap_reduce: bool = False
    overlap_gather: bool = False
    align: bool = False
    bucket: int = 0
    pad_buckets: bool = False
    average: bool = False
    check_nan: bool = False
    count_zeros: bool = False
    recompute: str = "none"
    recompute_layers: int = 0
    per_token: bool = False
    qk_scaling: bool = False
    fp32_residual: bool = False
    deterministic: bool = False
    shared_overlap: bool = False

    def __post_init__(self) -> None:
        check_choice(self, dispatcher=DISPATCHERS, p2p=PIPES, padding_mask=MASKS, groups=GROUPS)
        check_choice(self, router_dtype=ROUTER_DTYPES)
        check_counts(self, group=0, bucket=0)
        check_flags(self, "perform_initialization", "deallocate", "forward_sp", "decoder_input")
        check_flags(self, "qk_scaling", "fp32_residual", "deterministic", "shared_overlap")
        self._check_reduction()
        check_choice(self, recompute=RECOMPUTES)
        check_counts(self, recompute_layers=0)
        full = self.recompute in ("uniform", "block")
        said = f"recompute={self.recompute!r}, recompute_layers={self.recompute_layers}"
        require(
            full == (self.recompute_layers > 0), f"{said}: uniform and block need a number of layers, and only they"
        )

    def _check_reduction(self) -> None:
        check_flags(self, "distributed", "overlap_reduce", "overlap_gather", "align", "pad_buckets")
        check_flags(self, "average", "check_nan", "count_zeros", "per_token")
        require(not (self.per_token and self.average), "per_token=True cannot be had with average=True")
        said = f"distributed={self.distributed}, overlap_reduce={self.overlap_reduce}"
        both = self.distributed and self.overlap_reduce
        require(both or not self.overlap_gather, f"overlap_gather=True needs both, but {said}")
        require(self.overlap_reduce or not self.align, f"align=True needs overlap_reduce=True, but {said}")
        require(self.overlap_reduce or not self.bucket, f"bucket={self.bucket} needs overlap_reduce=True, but {said}")
        require(self.distributed or not self.pad_buckets, f"pad_buckets=True needs distributed=True, but {said}")


def check_together(layout: Layout, model: MoEModel, batch: Batch, ppo: PPO, switches: Switches) -> None:
    """Raise ValueError, with every number involved, where the values do not fit one another."""
    splits = {
        "heads": (model.heads, "tp", layout.tp),
        "vocab": (model.vocab, "tp", layout.tp),
        "shared_ffn": (model.shared_ffn, "tp", layout.tp),
        "ffn": (model.ffn, "etp", layout.etp),
        "experts": (model.experts, "ep", layout.ep),
        "dense_ffn": (model.dense_ffn, "tp", layout.tp),
    }
    # linear_qkv is cut equally over TP, through a query group where there are fewer than TP ranks.
    splits["(heads + 2*kv_heads)*head_dim"] = ((model.heads + 2 * model.kv_heads) * model.head_dim, "tp", layout.tp)
    for name, (size, axis, degree) in splits.items():
        require(size % degree == 0, f"{name}={size} is not a multiple of {axis}={degree}")
    require(
        model.kv_heads % layout.tp == 0 or layout.tp % model.kv_heads == 0,
        f"kv_heads={model.kv_heads} is neither a multiple nor a divisor of tp={layout.tp}",
    )
    cut = ppo.mini_batches * layout.dp * batch.micro_rows
    require(
        batch.rows % cut == 0,
        f"rows={batch.rows} is not a multiple of mini_batches*dp*micro_rows="
        f"{ppo.mini_batches}*{layout.dp}*{batch.micro_rows}={cut}",
    )
    _check_stages(layout, model)
    require(not model.biases or layout.etp == 1, f"biases=True needs etp=1, but etp={layout.etp}")
    overlaps = model.shared_ffn > 0 and switches.dispatcher == "alltoall"
    overlaps = overlaps and switches.recompute not in ("shared_experts", "all")
    said = f"dispatcher={switches.dispatcher!r}, shared_ffn={model.shared_ffn}, recompute={switches.recompute!r}"
    said = f"shared_overlap=True needs alltoall, and a shared expert that is not recomputed: {said}"
    require(overlaps or not switches.shared_overlap, said)
    same = switches.groups != "other" or layout.tp == 1 or layout.order.startswith("tp-")
    require(same, f"groups='other' needs the same TP groups: tp={layout.tp} first in order={layout.order!r}")
    _check_schedule(layout, switches, batch.rows // cut)
    balance = model.balance if switches.per_token else 0.0  # whose share of the loss would be another
    require(not balance, f"per_token=True needs no balance losses, but their coefficients sum to {balance}")
    adam = ppo.optimizer == "adam" or not switches.distributed
    require(adam, f"distributed=True needs optimizer='adam', but optimizer={ppo.optimizer!r}")
    _check_products({**vars(model), **vars(batch), "width": batch.prompt + batch.response})


def _check_stages(layout: Layout, model: MoEModel) -> None:
    number = layout.pp * layout.vpp
    if layout.stages:
        total, said = sum(layout.stages), f"layers={model.layers} are not the sum of stages={layout.stages}"
        require(total == model.layers, f"{said}, {total}")
    else:
        require(model.layers % number == 0, f"layers={model.layers} is not a multiple of pp*vpp={number}")


def _check_schedule(layout: Layout, switches: Switches, micro_batches: int) -> None:
    """What the interleaved schedule of virtual stages asks for, and what it alone can do."""
    pp, group = layout.pp, switches.group or layout.pp
    overlaps = switches.p2p in ("overlapped", "flushed")
    if layout.vpp == 1:
        said = f"p2p={switches.p2p!r}, group={switches.group} need virtual stages, but vpp=1"
        return require(not overlaps and not switches.group, said)
    said = f"{micro_batches} micro-batches per mini-batch and DP rank, vpp={layout.vpp}, group={group}, pp={pp}"
    require(pp <= group <= micro_batches, f"{said}: the group must lie between pp and the number of micro-batches")
    rest = micro_batches % group
    require(rest == 0 or rest >= pp, f"{said}: the last group has {rest}, and must have none or at least pp")


def _check_products(sizes: dict[str, int]) -> None:
    for names in PRODUCTS:
        total, asked = prod(sizes[name] for name in names), "*".join(f"{name}={sizes[name]}" for name in names)
        require(total <= MOST_NUMBERS, f"{asked} is {total} numbers; at most {MOST_NUMBERS} are allowed")
