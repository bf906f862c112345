"""What a case is made of: layout, model, batch, PPO settings, switches. Plain frozen values, stdlib only.

Knows nothing of torch, megatron-core, transformers or the fuzzer. Every value checks itself when it is made
and raises ValueError with all numbers involved; nothing that exists is invalid on its own. What concerns two
values at once (heads against TP, rows against DP) is checked by `check_together`.
"""

from dataclasses import dataclass
from math import prod

FAMILIES = ("qwen3moe", "qwen2moe", "glm4moe", "mixtral")
SHARED = ("qwen2moe", "glm4moe")  # have a shared expert
OWN_HEAD_DIM = ("qwen3moe", "glm4moe")  # heads * head_dim need not be the hidden size
SCORES = ("softmax", "sigmoid")
ROUTER_DTYPES = ("none", "fp32", "fp64")
DISPATCHERS = ("alltoall", "allgather")
RAGGEDNESS = ("equal", "ragged", "one_long")
OPTIMIZERS = ("sgd", "adam")
# How a pipeline is asked for that is not cut evenly: num_layers_in_first/last_pipeline_stage, account_for_embedding (or
# loss, or both) _in_pipeline_split, pipeline_model_parallel_layout.
SPLITS = ("even", "ends", "embedding", "loss", "both", "list")
# batch_p2p_comm, neither, overlap_p2p_comm, overlap_p2p_comm_warmup_flush
PIPES = ("batched", "plain", "overlapped", "flushed")
GROUPS = ("global", "explicit", "other")
MASKS = ("none", "all_false", "padding")
FROZEN = ("none", "router", "experts", "attention", "embedding")
AXES = ("tp", "cp", "ep", "dp", "pp")

# Bounds on what a case file from a stranger may ask for: far above what is drawn, far below what hurts.
MOST = {
    "world": 64, "layers": 64, "experts": 256, "hidden": 1024, "heads": 128, "kv_heads": 128, "head_dim": 256,
    "ffn": 4096, "shared_ffn": 4096, "vocab": 4096, "rows": 1024, "prompt": 1024, "response": 1024,
    "micro_rows": 64, "epochs": 16, "mini_batches": 64, "dense_ffn": 4096, "expert_groups": 256, "group_topk": 256,
}  # fmt: skip

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


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_counts(value: object, **least: int) -> None:
    for name, low in least.items():
        number = getattr(value, name)
        _require(type(number) is int, f"{name}={number!r} must be an int")
        high = MOST.get(name, 2**31)
        _require(low <= number <= high, f"{name}={number} must lie in {low}..{high}")


def _check_reals(value: object, **bounds: tuple[float, float]) -> None:
    for name, (low, high) in bounds.items():
        number = getattr(value, name)
        _require(type(number) in (int, float), f"{name}={number!r} must be a number")
        _require(low <= number <= high, f"{name}={number} must lie in {low}..{high}")


def _check_choice(value: object, **choices: tuple[str, ...]) -> None:
    for name, allowed in choices.items():
        chosen = getattr(value, name)
        _require(chosen in allowed, f"{name}={chosen!r} is unknown; choose one of {', '.join(allowed)}")


def _check_flags(value: object, *names: str) -> None:
    for name in names:
        _require(type(getattr(value, name)) is bool, f"{name}={getattr(value, name)!r} must be True or False")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism: TP·CP·PP·DP = ETP·EP·PP·EDP = world. `vpp` counts virtual stages per pipeline rank.

    Attention and dense weights split over `tp`, expert weights over `etp`, experts over `ep`. `order` names the axes of
    ranks, the fastest first. `stages` has the layers of each of the pp·vpp stages in the order of the model, where they
    are not cut evenly, and `split` by which of megatron's options that is asked for (SPLITS).
    """

    world: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    order: str = "-".join(AXES)
    split: str = "even"
    stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_counts(self, world=1, tp=1, pp=1, vpp=1, cp=1, ep=1, etp=1)
        dense, expert = self.tp * self.cp * self.pp, self.etp * self.ep * self.pp
        _require(
            self.world % dense == 0,
            f"world={self.world} is not a multiple of tp*cp*pp={self.tp}*{self.cp}*{self.pp}={dense}",
        )
        _require(
            self.world % expert == 0,
            f"world={self.world} is not a multiple of etp*ep*pp={self.etp}*{self.ep}*{self.pp}={expert}",
        )
        _require(self.vpp == 1 or self.pp > 1, f"vpp={self.vpp} needs pp > 1, but pp={self.pp}")
        self._check_order()
        self._check_split()

    def _check_order(self) -> None:
        axes = self.order.split("-") if isinstance(self.order, str) else []
        _require(sorted(axes) == sorted(AXES), f"order={self.order!r} must name each of {', '.join(AXES)} once")
        _require(
            axes[-1] == "pp" or self.pp == 1 or self.dp == self.edp,
            f"order={self.order!r} with pp={self.pp} not last needs dp = edp, got dp={self.dp}, edp={self.edp}",
        )

    def _check_split(self) -> None:
        _check_choice(self, split=SPLITS)
        counts, number = self.stages, self.pp * self.vpp
        whole = isinstance(counts, tuple) and all(type(n) is int and 0 <= n <= MOST["layers"] for n in counts)
        _require(whole, f"stages={counts!r} must be a tuple of ints of 0..{MOST['layers']}")
        if self.split == "even":
            return _require(not counts, f"stages={counts} are not cut evenly: split must be one of {SPLITS[1:]}")
        asked = f"split={self.split!r}, stages={counts}"
        _require(
            self.pp > 1 and len(counts) == number, f"{asked}: {number} stages are there, pp*vpp={self.pp}*{self.vpp}"
        )
        _require(_divides(self, counts), f"{asked} is not what that option of megatron gives")

    @property
    def dp(self) -> int:
        """Data-parallel size of the dense weights."""
        return self.world // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel size of the expert weights."""
        return self.world // (self.etp * self.ep * self.pp)


def _divides(layout: Layout, counts: tuple[int, ...]) -> bool:
    """Whether an option of megatron can give these stages: alike but for the ends, or with what counts as a layer."""
    if layout.split == "list":
        return True
    if layout.split == "ends":
        by_rank = [set(counts[rank :: layout.pp]) for rank in range(layout.pp)]
        middle = set().union(*by_rank[1:-1])
        return all(len(one) == 1 for one in by_rank) and len(middle) <= 1 and 0 not in counts
    first, last = layout.split in ("embedding", "both"), layout.split in ("loss", "both")
    return len({counts[0] + first, *counts[1:-1], counts[-1] + last}) == 1


def groupings(experts: int, top_k: int) -> list[tuple[int, int]]:
    """The numbers of groups and of chosen groups in which top_k of so many experts can be chosen; most limiting first.

    A group is judged by its top_k // group_topk best experts, of which there must be at least one and no more than it
    has; the chosen groups must have top_k experts together.
    """
    groups = [g for g in range(2, experts + 1) if experts % g == 0]
    pairs = [(g, k) for g in groups for k in range(1, min(g, top_k) + 1)]
    return [(g, k) for g, k in pairs if top_k // k <= experts // g and top_k <= k * (experts // g)]


@dataclass(frozen=True, kw_only=True)
class MoEModel:
    """One mixture-of-experts decoder; actor, critic, reference and reward model share it and differ in weights.

    `ffn` is the width of one routed expert, `shared_ffn` that of the shared expert (Qwen2-MoE and GLM-4-MoE only, else
    0). The layers in `dense` (indices from 0, ascending) have one plain MLP of width `dense_ffn` in place of experts
    (not in Mixtral). `skew` pulls tokens towards expert 0: 0 is balanced, 4 starves most other experts. `aux_loss` and
    `z_loss` are megatron's moe_aux_loss_coeff and moe_z_loss_coeff; `seq_aux_loss` and `global_aux_loss` are the
    coefficients of those load balancing types, of which several can be asked for at once. `capacity` is
    moe_expert_capacity_factor, 0 for none, with which experts drop the copies of the smallest gates.

    The router, of any family: `score` is moe_router_score_function; `expert_bias` the spread of the biases that are
    loaded, 0 for none, and `bias_rate` how far they move per step; `scaling` moe_router_topk_scaling_factor;
    `expert_groups` and `group_topk` are moe_router_num_groups and moe_router_group_topk, 0 for none.
    """

    family: str = "qwen3moe"
    layers: int = 1
    experts: int = 2
    top_k: int = 1
    norm_topk_prob: bool = False
    hidden: int = 8
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 4
    ffn: int = 2
    shared_ffn: int = 0
    vocab: int = 8
    tied: bool = False
    skew: float = 0.0
    aux_loss: float = 0.0
    z_loss: float = 0.0
    dense: tuple[int, ...] = ()
    dense_ffn: int = 0
    score: str = "softmax"
    expert_bias: float = 0.0
    bias_rate: float = 0.0
    scaling: float = 1.0
    expert_groups: int = 0
    group_topk: int = 0
    seq_aux_loss: float = 0.0
    global_aux_loss: float = 0.0
    capacity: float = 0.0
    pad_to_capacity: bool = False

    def __post_init__(self) -> None:
        _check_choice(self, family=FAMILIES, score=SCORES)
        _check_counts(self, layers=1, experts=2, top_k=1, hidden=2, heads=1, kv_heads=1, head_dim=2, ffn=1)
        _check_counts(self, shared_ffn=0, vocab=4, dense_ffn=0)
        _check_flags(self, "norm_topk_prob", "tied")
        _check_reals(self, skew=(0, 100), aux_loss=(0, 100), z_loss=(0, 100))
        _check_reals(self, capacity=(0, 1000))
        _check_flags(self, "pad_to_capacity")
        _require(
            self.capacity > 0 or not self.pad_to_capacity, f"pad_to_capacity needs capacity={self.capacity} above 0"
        )
        _check_reals(self, seq_aux_loss=(0, 100), global_aux_loss=(0, 100))
        _require(self.top_k <= self.experts, f"top_k={self.top_k} exceeds experts={self.experts}")
        _require(
            self.heads % self.kv_heads == 0,
            f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs")
        _require(
            (self.shared_ffn > 0) == (self.family in SHARED),
            f"shared_ffn={self.shared_ffn} with family={self.family}: only {' and '.join(SHARED)} have a shared "
            "expert, and must",
        )
        _require(
            self.family in OWN_HEAD_DIM or self.hidden == self.heads * self.head_dim,
            f"family={self.family} needs hidden = heads*head_dim, got hidden={self.hidden}, "
            f"heads={self.heads}, head_dim={self.head_dim}",
        )
        # megatron-core refuses top_k=1 with post-softmax: every gate would be 1 and the router without gradient.
        _require(
            not (self.norm_topk_prob and self.top_k == 1),
            "norm_topk_prob=True with top_k=1 makes every gate 1; use norm_topk_prob=False or top_k >= 2",
        )
        _require(
            self.norm_topk_prob or self.family != "mixtral",
            "family=mixtral always normalises its gates: norm_topk_prob must be True and top_k >= 2",
        )
        self._check_dense()
        self._check_router()

    def _check_router(self) -> None:
        _check_reals(self, expert_bias=(0, 100), bias_rate=(0, 100), scaling=(1e-3, 1e3))
        _check_counts(self, expert_groups=0, group_topk=0)
        sigmoid = self.score == "sigmoid"
        _require(
            not sigmoid or self.norm_topk_prob == (self.top_k > 1),
            f"score='sigmoid' normalises the gates of several experts and of no single one: norm_topk_prob="
            f"{self.norm_topk_prob} with top_k={self.top_k}",
        )
        _require(sigmoid or not self.expert_bias, f"expert_bias={self.expert_bias} needs score='sigmoid'")
        said = f"bias_rate={self.bias_rate} needs an expert_bias, but expert_bias={self.expert_bias}"
        _require(not self.bias_rate or self.expert_bias > 0, said)
        self._check_groups()

    def _check_groups(self) -> None:
        groups, limit, said = self.expert_groups, self.group_topk, f"expert_groups={self.expert_groups}"
        _require(groups == 0 or self.experts % groups == 0, f"experts={self.experts} is not a multiple of {said}")
        said = f"{said}, group_topk={limit}, experts={self.experts}, top_k={self.top_k}"
        _require(
            limit == 0 or (groups > 0 and (groups, limit) in groupings(self.experts, self.top_k)),
            f"{said}: each of group_topk groups must give top_k//group_topk experts, at least one, and all top_k",
        )

    @property
    def load_losses(self) -> dict[str, float]:
        """The coefficients of the losses that balance the load of experts, of those that are on, by megatron's name."""
        names = ("aux_loss", "seq_aux_loss", "global_aux_loss")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @property
    def balance(self) -> float:
        """The sum of all coefficients of balance losses, which are taken per micro-batch."""
        return sum(self.load_losses.values()) + self.z_loss

    @property
    def plain_router(self) -> bool:
        """Whether the router is the plain softmax one that all families have had from the start."""
        options = (self.score, self.expert_bias, self.scaling, self.group_topk, self.capacity)
        return options == ("softmax", 0.0, 1.0, 0, 0.0)

    def _check_dense(self) -> None:
        listed = isinstance(self.dense, tuple) and all(type(i) is int and 0 <= i < self.layers for i in self.dense)
        _require(
            listed and list(self.dense) == sorted(set(self.dense)),
            f"dense={self.dense!r} must be ascending indices of layers={self.layers}, from 0",
        )
        _require(len(self.dense) < self.layers, f"dense={self.dense} leaves none of layers={self.layers} with experts")
        _require(
            (self.dense_ffn > 0) == bool(self.dense),
            f"dense_ffn={self.dense_ffn} with dense={self.dense}: dense layers need a width, and only they",
        )
        _require(self.family != "mixtral" or not self.dense, f"family=mixtral has no dense layers, got {self.dense}")

    @property
    def moe(self) -> tuple[int, ...]:
        """The layers with experts."""
        return tuple(layer for layer in range(self.layers) if layer not in self.dense)


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
        _check_counts(self, rows=1, prompt=1, response=1, micro_rows=1)
        _check_choice(self, raggedness=RAGGEDNESS)
        _check_flags(self, "holes", "pad_is_eos")


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Settings of the PPO update; `docs/ppo.md` has every formula. `max_norm` 0 switches clipping off.

    `frozen` names parameters of actor and critic that are not trained.
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

    def __post_init__(self) -> None:
        _check_counts(self, epochs=1, mini_batches=1)
        _check_choice(self, optimizer=OPTIMIZERS, frozen=FROZEN)
        _check_flags(self, "whiten")
        unit, positive = (0.0, 1.0), (1e-12, 1e3)
        _check_reals(self, temperature=(1e-2, 1e2), gamma=unit, lam=unit, kl_coef=(0, 100), clip_eps=positive)
        _check_reals(self, value_clip=positive, entropy_coef=(-100, 100), lr=(0, 100), critic_lr=(0, 100))
        _check_reals(self, weight_decay=(0, 10), momentum=(0, 0.999), beta1=(0, 0.999), beta2=(0, 0.99999))
        _check_reals(self, eps=positive, max_norm=(0, 1e6))


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Options of megatron-core that must not matter, or only to rounding; weights are always loaded.

    `p2p` is how stages talk to each other (PIPES), `deallocate` deallocate_pipeline_outputs, `group` the micro-batches
    that the interleaved schedule takes at a time (microbatch_group_size_per_vp_stage), 0 for as many as stages. Where
    not `forward_sp`, reference and reward model run without sequence parallelism. `decoder_input` hands the embedded
    tokens to the actor and the critic. `padding_mask` is that of GPTModel.forward; one that marks padding matters for
    balance losses. `groups`: megatron takes its process groups from parallel_state; or is handed them; or is handed
    them while parallel_state has those of another layout, with the same TP. `router_dtype` is moe_router_dtype.
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

    def __post_init__(self) -> None:
        _check_choice(self, dispatcher=DISPATCHERS, p2p=PIPES, padding_mask=MASKS, groups=GROUPS)
        _check_choice(self, router_dtype=ROUTER_DTYPES)
        _check_counts(self, group=0)
        _check_flags(self, "perform_initialization", "deallocate", "forward_sp", "decoder_input")


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
        _require(size % degree == 0, f"{name}={size} is not a multiple of {axis}={degree}")
    _require(
        model.kv_heads % layout.tp == 0 or layout.tp % model.kv_heads == 0,
        f"kv_heads={model.kv_heads} is neither a multiple nor a divisor of tp={layout.tp}",
    )
    cut = ppo.mini_batches * layout.dp * batch.micro_rows
    _require(
        batch.rows % cut == 0,
        f"rows={batch.rows} is not a multiple of mini_batches*dp*micro_rows="
        f"{ppo.mini_batches}*{layout.dp}*{batch.micro_rows}={cut}",
    )
    _check_stages(layout, model)
    same = switches.groups != "other" or layout.tp == 1 or layout.order.startswith("tp-")
    _require(same, f"groups='other' needs the same TP groups: tp={layout.tp} first in order={layout.order!r}")
    _check_schedule(layout, switches, batch.rows // cut)
    _check_products({**vars(model), **vars(batch), "width": batch.prompt + batch.response})


def _check_stages(layout: Layout, model: MoEModel) -> None:
    number = layout.pp * layout.vpp
    if layout.stages:
        total, said = sum(layout.stages), f"layers={model.layers} are not the sum of stages={layout.stages}"
        _require(total == model.layers, f"{said}, {total}")
    else:
        _require(model.layers % number == 0, f"layers={model.layers} is not a multiple of pp*vpp={number}")


def _check_schedule(layout: Layout, switches: Switches, micro_batches: int) -> None:
    """What the interleaved schedule of virtual stages asks for, and what it alone can do."""
    pp, group = layout.pp, switches.group or layout.pp
    overlaps = switches.p2p in ("overlapped", "flushed")
    if layout.vpp == 1:
        said = f"p2p={switches.p2p!r}, group={switches.group} need virtual stages, but vpp=1"
        return _require(not overlaps and not switches.group, said)
    said = f"{micro_batches} micro-batches per mini-batch and DP rank, vpp={layout.vpp}, group={group}, pp={pp}"
    _require(pp <= group <= micro_batches, f"{said}: the group must lie between pp and the number of micro-batches")
    rest = micro_batches % group
    _require(rest == 0 or rest >= pp, f"{said}: the last group has {rest}, and must have none or at least pp")


def _check_products(sizes: dict[str, int]) -> None:
    for names in PRODUCTS:
        total, asked = prod(sizes[name] for name in names), "*".join(f"{name}={sizes[name]}" for name in names)
        _require(total <= MOST_NUMBERS, f"{asked} is {total} numbers; at most {MOST_NUMBERS} are allowed")
