"""A model: its family, its sizes, its router and its balance losses. Stdlib only.

Knows no layout, no batch, no library that could run it. What a family fixes is in `toy_models.families`.
"""

from dataclasses import dataclass

from toy_models.checks import check_choice, check_counts, check_flags, check_reals, require

FAMILIES = ("qwen3moe", "qwen2moe", "glm4moe", "mixtral", "gptoss")
SHARED = ("qwen2moe", "glm4moe")  # have a shared expert
OWN_HEAD_DIM = ("qwen3moe", "glm4moe", "gptoss")  # heads * head_dim need not be the hidden size
QKV_BIAS, QK_NORM, SHARED_GATE = ("qwen2moe", "glm4moe"), ("qwen3moe", "glm4moe"), ("qwen2moe",)  # what has it
NORMALISED = ("mixtral", "gptoss")  # always normalise gates, and have no dense layers
SCORES = ("softmax", "sigmoid")
ACTIVATIONS = ("silu", "gelu", "relu", "squared_relu", "quick_gelu")
AS_FAMILY = ("family", "on", "off")
DROPS = ("probs", "position")
SINKS = ("vanilla", "off-by-one", "learnable")


def groupings(experts: int, top_k: int) -> list[tuple[int, int]]:
    """The numbers of groups and of chosen groups in which top_k of so many experts can be chosen; most limiting first.

    A group is judged by its top_k // group_topk best experts, of which there must be at least one and no more than it
    has; the chosen groups must have top_k experts together.
    """
    groups = [g for g in range(2, experts + 1) if experts % g == 0]
    pairs = [(g, k) for g in groups for k in range(1, min(g, top_k) + 1)]
    return [(g, k) for g, k in pairs if top_k // k <= experts // g and top_k <= k * (experts // g)]


MOST_SKEW = 2.0  # that Sinkhorn's algorithm takes


@dataclass(frozen=True, kw_only=True)
class MoEModel:
    """One mixture-of-experts decoder; actor, critic, reference and reward model share it and differ in weights.

    `ffn` is the width of one routed expert, `shared_ffn` that of the shared expert (Qwen2-MoE and GLM-4-MoE only, else
    0). The layers in `dense` (indices from 0, ascending) have one plain MLP of width `dense_ffn` in place of experts
    (not in Mixtral). `skew` pulls tokens towards expert 0: 0 is balanced, 4 starves most other experts. `aux_loss` and
    `z_loss` are megatron's moe_aux_loss_coeff and moe_z_loss_coeff; `seq_aux_loss` and `global_aux_loss` are the
    coefficients of those load balancing types, of which several can be asked for at once. `capacity` is
    moe_expert_capacity_factor, 0 for none, with which experts drop copies; `drops` moe_token_drop_policy: those of
    the smallest gates, or those that come last. `sinkhorn` is the load balancing type of that name, without losses.

    The router, of any family: `score` is moe_router_score_function; `expert_bias` the spread of the biases that are
    loaded, 0 for none, and `bias_rate` how far they move per step; `scaling` moe_router_topk_scaling_factor;
    `expert_groups` and `group_topk` are moe_router_num_groups and moe_router_group_topk, 0 for none.

    The layers, of any family: `activation` is that of all MLPs, of experts too, `gated` whether it gates (of another
    half of linear_fc1, clamped to `clamp`, 0 for not at all, and moved by `glu_offset`). `qk_norm` is qk_layernorm, as
    the family has it or not; `output_gate` attention_output_gate; `sinks` softmax_type. `biases` is add_bias_linear: of
    all linear layers, experts' and the router's too.
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
    drops: str = "probs"
    sinkhorn: bool = False
    activation: str = "silu"
    gated: bool = True
    clamp: float = 0.0
    glu_offset: float = 0.0
    qk_norm: str = "family"
    output_gate: bool = False
    sinks: str = "vanilla"
    biases: bool = False

    def __post_init__(self) -> None:
        check_choice(self, family=FAMILIES, score=SCORES, drops=DROPS)
        check_counts(self, layers=1, experts=2, top_k=1, hidden=2, heads=1, kv_heads=1, head_dim=2, ffn=1)
        check_counts(self, shared_ffn=0, vocab=4, dense_ffn=0)
        check_flags(self, "norm_topk_prob", "tied")
        check_reals(self, skew=(0, 100), aux_loss=(0, 100), z_loss=(0, 100))
        check_reals(self, capacity=(0, 1000))
        check_flags(self, "pad_to_capacity", "sinkhorn")
        require(
            self.capacity > 0 or not self.pad_to_capacity, f"pad_to_capacity needs capacity={self.capacity} above 0"
        )
        require(
            self.capacity > 0 or self.drops == "probs", f"drops={self.drops!r} needs capacity={self.capacity} above 0"
        )
        check_reals(self, seq_aux_loss=(0, 100), global_aux_loss=(0, 100))
        require(self.top_k <= self.experts, f"top_k={self.top_k} exceeds experts={self.experts}")
        require(
            self.heads % self.kv_heads == 0,
            f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs")
        require(
            (self.shared_ffn > 0) == (self.family in SHARED),
            f"shared_ffn={self.shared_ffn} with family={self.family}: only {' and '.join(SHARED)} have a shared "
            "expert, and must",
        )
        require(
            self.family in OWN_HEAD_DIM or self.hidden == self.heads * self.head_dim,
            f"family={self.family} needs hidden = heads*head_dim, got hidden={self.hidden}, "
            f"heads={self.heads}, head_dim={self.head_dim}",
        )
        # megatron-core refuses top_k=1 with post-softmax: every gate would be 1 and the router without gradient.
        require(
            not (self.norm_topk_prob and self.top_k == 1),
            "norm_topk_prob=True with top_k=1 makes every gate 1; use norm_topk_prob=False or top_k >= 2",
        )
        require(
            self.norm_topk_prob or self.family not in NORMALISED,
            f"family={self.family} always normalises its gates: norm_topk_prob must be True and top_k >= 2",
        )
        self._check_dense()
        self._check_router()
        self._check_layers()

    def _check_layers(self) -> None:
        check_choice(self, activation=ACTIVATIONS, qk_norm=AS_FAMILY, sinks=SINKS)
        check_flags(self, "gated", "output_gate", "biases")
        check_reals(self, clamp=(0, 1e3), glu_offset=(-1e3, 1e3))
        said = f"clamp={self.clamp}, glu_offset={self.glu_offset} need a gated activation, but gated={self.gated}"
        require(self.gated or not (self.clamp or self.glu_offset), said)
        said = f"biases=True with shared_ffn={self.shared_ffn}: megatron-core's shared expert has no biases"
        require(not (self.biases and self.shared_ffn), said)

    def _check_router(self) -> None:
        check_reals(self, expert_bias=(0, 100), bias_rate=(0, 100), scaling=(1e-3, 1e3))
        check_counts(self, expert_groups=0, group_topk=0)
        sigmoid = self.score == "sigmoid"
        require(
            not sigmoid or self.norm_topk_prob == (self.top_k > 1),
            f"score='sigmoid' normalises the gates of several experts and of no single one: norm_topk_prob="
            f"{self.norm_topk_prob} with top_k={self.top_k}",
        )
        require(sigmoid or not self.expert_bias, f"expert_bias={self.expert_bias} needs score='sigmoid'")
        said = f"bias_rate={self.bias_rate} needs an expert_bias, but expert_bias={self.expert_bias}"
        require(not self.bias_rate or self.expert_bias > 0, said)
        self._check_groups()
        options = (self.score, self.norm_topk_prob, self.scaling, self.group_topk, self.capacity, self.load_losses)
        said = f"(score, norm_topk_prob, scaling, group_topk, capacity, balance losses)={options}"
        said = f"sinkhorn=True is a router of its own, without what others have: {said}"
        require(not self.sinkhorn or options == ("softmax", False, 1.0, 0, 0.0, {}), said)
        # Factors are huge where logits lie far apart, and megatron's loop goes on until they move by 1e-4 at most.
        said = f"sinkhorn=True never ends where logits lie far apart: skew={self.skew} must be at most {MOST_SKEW}"
        require(not self.sinkhorn or self.skew <= MOST_SKEW, said)

    def _check_groups(self) -> None:
        groups, limit, said = self.expert_groups, self.group_topk, f"expert_groups={self.expert_groups}"
        require(groups == 0 or self.experts % groups == 0, f"experts={self.experts} is not a multiple of {said}")
        said = f"{said}, group_topk={limit}, experts={self.experts}, top_k={self.top_k}"
        require(
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
        options = (self.score, self.expert_bias, self.scaling, self.group_topk, self.capacity, self.sinkhorn)
        return options == ("softmax", 0.0, 1.0, 0, 0.0, False)

    @property
    def routes_together(self) -> bool:
        """Whether an expert is chosen for a token by what other tokens of the same call want."""
        return self.capacity > 0 or self.sinkhorn

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.biases or self.family in QKV_BIAS

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return self.family in QK_NORM if self.qk_norm == "family" else self.qk_norm == "on"

    @property
    def plain_attention(self) -> bool:
        """Whether attention is what the family has."""
        own = ("learnable", True) if self.family == "gptoss" else ("vanilla", False)
        usual = self.has_qk_norm == (self.family in QK_NORM) and not self.output_gate
        return usual and (self.sinks, self.biases) == own

    @property
    def plain_mlp(self) -> bool:
        """Whether MLPs, experts too, are what the family has: a gated SiLU without biases, but for gpt-oss."""
        options = (self.activation, self.gated, self.clamp, self.glu_offset, self.biases)
        if self.family == "gptoss":
            return self.clamp > 0 and options == ("quick_gelu", True, self.clamp, 1.0, True)
        return options == ("silu", True, 0.0, 0.0, False)

    def _check_dense(self) -> None:
        listed = isinstance(self.dense, tuple) and all(type(i) is int and 0 <= i < self.layers for i in self.dense)
        require(
            listed and list(self.dense) == sorted(set(self.dense)),
            f"dense={self.dense!r} must be ascending indices of layers={self.layers}, from 0",
        )
        require(len(self.dense) < self.layers, f"dense={self.dense} leaves none of layers={self.layers} with experts")
        require(
            (self.dense_ffn > 0) == bool(self.dense),
            f"dense_ffn={self.dense_ffn} with dense={self.dense}: dense layers need a width, and only they",
        )
        said = f"family={self.family} has no dense layers, got {self.dense}"
        require(self.family not in NORMALISED or not self.dense, said)

    @property
    def moe(self) -> tuple[int, ...]:
        """The layers with experts."""
        return tuple(layer for layer in range(self.layers) if layer not in self.dense)
