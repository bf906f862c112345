"""A broken configuration as a value: a valid Case and what is changed in megatron's own arguments at the last moment.

`overrides` are pairs of a name and a value. The part before the dot says whose argument it is: `groups`
(initialize_model_parallel), `config` (TransformerConfig), `gpt` (GPTModel), `ddp` (DistributedDataParallelConfig),
`optimizer` (OptimizerConfig), `schedule` (the forward-backward function); `inputs.width` is the padded length of a row.
A tuple stands for a list. Knows the parts of a case; no torch, no ranks, no Hypothesis.
"""

from dataclasses import dataclass
from typing import Any

from fuzz.case import Case
from fuzz.order import size as size_of_case

OWNERS = ("groups", "config", "gpt", "ddp", "optimizer", "schedule", "inputs")
Overrides = tuple[tuple[str, Any], ...]

# Where megatron accepts one of these it does something else by definition: there is no reference to judge it by.
CHANGING = (
    "config.moe_router_topk", "config.moe_router_pre_softmax",
    "config.moe_router_score_function", "config.moe_expert_capacity_factor", "config.num_moe_experts",
    "config.num_attention_heads", "config.num_query_groups", "config.ffn_hidden_size",
    "config.moe_ffn_hidden_size", "config.moe_shared_expert_intermediate_size", "gpt.vocab_size",
    "config.moe_latent_size", "config.fp16", "config.bf16",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class Broken:
    """A case and its overrides; `repr` evaluates back to an equal one. ValueError for an override of nobody."""

    case: Case
    overrides: Overrides

    def __post_init__(self) -> None:
        for name, _ in self.overrides:
            owner, dot, argument = name.partition(".")
            if owner not in OWNERS or not dot or not argument:
                raise ValueError(f"override={name!r} must be the name of an argument of one of {', '.join(OWNERS)}")

    def __repr__(self) -> str:
        return f"Broken(case={self.case!r}, overrides={self.overrides!r})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis prints what was drawn in this form."""
        printer.text(repr(self))

    @property
    def names(self) -> str:
        """What is broken, the same for every case in which it is."""
        return " ".join(name for name, _ in self.overrides)

    @property
    def changing(self) -> bool:
        """Whether accepting it means to do something else than the case says."""
        return any(name in CHANGING for name, _ in self.overrides)

    def get(self, name: str, default: Any = None) -> Any:
        """The value that an argument is given, or `default` where it is left alone."""
        return dict(self.overrides).get(name, default)

    def of(self, owner: str) -> dict[str, Any]:
        """The overrides of one owner, by the name of the argument."""
        parts = ((name.split(".", 1), value) for name, value in self.overrides)
        return {argument: value for (whose, argument), value in parts if whose == owner}


def size(broken: Broken) -> tuple:
    """A tuple that is smaller for the simpler one: the smaller case, then fewer overrides."""
    return *size_of_case(broken.case), len(broken.overrides), repr(broken.overrides)
