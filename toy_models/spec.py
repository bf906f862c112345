"""What a case is made of: layout, model, batch, PPO settings, switches. Plain frozen values, stdlib only.

Knows nothing of torch, megatron-core, transformers or the fuzzer. Every value checks itself when it is made
and raises ValueError with all numbers involved; nothing that exists is invalid on its own. What concerns two
values at once (heads against TP, rows against DP) is checked by `check_together`.
"""

from dataclasses import dataclass
from math import prod

FAMILIES = ("qwen3moe", "qwen2moe", "mixtral")
DISPATCHERS = ("alltoall", "allgather")
RAGGEDNESS = ("equal", "ragged", "one_long")
OPTIMIZERS = ("sgd", "adam")

# Bounds on what a case file from a stranger may ask for: far above what is drawn, far below what hurts.
MOST = {
    "world": 64, "layers": 64, "experts": 256, "hidden": 1024, "heads": 128, "kv_heads": 128, "head_dim": 256,
    "ffn": 4096, "shared_ffn": 4096, "vocab": 4096, "rows": 1024, "prompt": 1024, "response": 1024,
    "micro_rows": 64, "epochs": 16, "mini_batches": 64,
}  # fmt: skip

# Numbers that are each within bounds could still ask for terabytes together: these products are bounded too, `width`
# being prompt + response. 2**24 numbers of float64 are 128 MiB; what is drawn stays far below.
MOST_NUMBERS = 2**24
PRODUCTS = (
    ("layers", "experts", "hidden", "ffn"),
    ("layers", "hidden", "shared_ffn"),
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

    Attention and dense weights split over `tp`, expert weights over `etp`, experts over `ep`.
    """

    world: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1

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

    @property
    def dp(self) -> int:
        """Data-parallel size of the dense weights."""
        return self.world // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel size of the expert weights."""
        return self.world // (self.etp * self.ep * self.pp)


@dataclass(frozen=True, kw_only=True)
class MoEModel:
    """One mixture-of-experts decoder; actor, critic, reference and reward model share it and differ in weights.

    `ffn` is the width of one routed expert, `shared_ffn` that of the shared expert (Qwen2-MoE only, else 0).
    `skew` pulls tokens towards expert 0: 0 is balanced, 4 starves most other experts. `aux_loss` and `z_loss`
    are megatron's moe_aux_loss_coeff and moe_z_loss_coeff.
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

    def __post_init__(self) -> None:
        _check_choice(self, family=FAMILIES)
        _check_counts(self, layers=1, experts=2, top_k=1, hidden=2, heads=1, kv_heads=1, head_dim=2, ffn=1)
        _check_counts(self, shared_ffn=0, vocab=4)
        _check_flags(self, "norm_topk_prob", "tied")
        _check_reals(self, skew=(0, 100), aux_loss=(0, 100), z_loss=(0, 100))
        _require(self.top_k <= self.experts, f"top_k={self.top_k} exceeds experts={self.experts}")
        _require(
            self.heads % self.kv_heads == 0,
            f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs")
        shared = self.family == "qwen2moe"
        _require(
            (self.shared_ffn > 0) == shared,
            f"shared_ffn={self.shared_ffn} with family={self.family}: only qwen2moe has a shared expert, and must",
        )
        _require(
            self.family == "qwen3moe" or self.hidden == self.heads * self.head_dim,
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
    """Settings of the PPO update; `docs/ppo.md` has every formula. `max_norm` 0 switches clipping off."""

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

    def __post_init__(self) -> None:
        _check_counts(self, epochs=1, mini_batches=1)
        _check_choice(self, optimizer=OPTIMIZERS)
        _check_flags(self, "whiten")
        unit, positive = (0.0, 1.0), (1e-12, 1e3)
        _check_reals(self, temperature=(1e-2, 1e2), gamma=unit, lam=unit, kl_coef=(0, 100), clip_eps=positive)
        _check_reals(self, value_clip=positive, entropy_coef=(-100, 100), lr=(0, 100), critic_lr=(0, 100))
        _check_reals(self, weight_decay=(0, 10), momentum=(0, 0.999), beta1=(0, 0.999), beta2=(0, 0.99999))
        _check_reals(self, eps=positive, max_norm=(0, 1e6))


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Options of megatron-core that must not matter, or only to rounding; weights are always loaded."""

    dispatcher: str = "alltoall"
    perform_initialization: bool = True

    def __post_init__(self) -> None:
        _check_choice(self, dispatcher=DISPATCHERS)
        _check_flags(self, "perform_initialization")


def check_together(layout: Layout, model: MoEModel, batch: Batch, ppo: PPO) -> None:
    """Raise ValueError, with every number involved, where the values do not fit one another."""
    splits = {
        "heads": (model.heads, "tp", layout.tp),
        "kv_heads": (model.kv_heads, "tp", layout.tp),
        "vocab": (model.vocab, "tp", layout.tp),
        "shared_ffn": (model.shared_ffn, "tp", layout.tp),
        "ffn": (model.ffn, "etp", layout.etp),
        "experts": (model.experts, "ep", layout.ep),
        "layers": (model.layers, "pp*vpp", layout.pp * layout.vpp),
    }
    for name, (size, axis, degree) in splits.items():
        _require(size % degree == 0, f"{name}={size} is not a multiple of {axis}={degree}")
    cut = ppo.mini_batches * layout.dp * batch.micro_rows
    _require(
        batch.rows % cut == 0,
        f"rows={batch.rows} is not a multiple of mini_batches*dp*micro_rows="
        f"{ppo.mini_batches}*{layout.dp}*{batch.micro_rows}={cut}",
    )
    _check_products({**vars(model), **vars(batch), "width": batch.prompt + batch.response})


def _check_products(sizes: dict[str, int]) -> None:
    for names in PRODUCTS:
        total, asked = prod(sizes[name] for name in names), "*".join(f"{name}={sizes[name]}" for name in names)
        _require(total <= MOST_NUMBERS, f"{asked} is {total} numbers; at most {MOST_NUMBERS} are allowed")
