"""The values that cross every arrow: Case, Observation, Violation. Frozen, plain, and nothing else.

Knows the parts of a case (`toy_models.spec`); knows no processes, no torch at run time, no Hypothesis. Files are the
business of `fuzz.case_json`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from toy_models.spec import PPO, Batch, Layout, MoEModel, Switches, check_together

if TYPE_CHECKING:
    import torch

    from fuzz.lockstep import Call, Divergence

TWINS = ("again", "other_dispatcher", "plain_switches")
PRECISIONS = ("float64", "float32")
MOST_OPERATIONS = 8


def short(value: Any) -> str:
    """A dataclass as its constructor call without the fields that have their default."""
    if not is_dataclass(value):
        return f"({', '.join(map(short, value))}{',' * (len(value) == 1)})" if isinstance(value, tuple) else repr(value)
    shown = [f for f in fields(value) if getattr(value, f.name) != f.default]
    inside = ", ".join(f"{f.name}={short(getattr(value, f.name))}" for f in shown)
    return f"{type(value).__name__}({inside})"


@dataclass(frozen=True)
class Rollout:
    """Sample responses with today's weights and compute what the update needs."""


@dataclass(frozen=True)
class Update:
    """Train actor and critic on the last rollout: all epochs, all mini-batches."""


Operation = Rollout | Update
DEFAULT_PROGRAM: tuple[Operation, ...] = (Rollout(), Update())


@dataclass(frozen=True, kw_only=True, repr=False)
class Case:
    """One rehearsal, complete: what runs, under which layout, in which precision, from which seed.

    `twin` names one change that must not matter; both runs are judged. `repr` leaves out defaults and evaluates back
    to an equal Case. ValueError, with all numbers involved, where the parts do not fit one another.
    """

    layout: Layout = Layout()
    model: MoEModel = MoEModel()
    batch: Batch = Batch()
    ppo: PPO = PPO()
    switches: Switches = Switches()
    program: tuple[Operation, ...] = DEFAULT_PROGRAM
    twin: str | None = None
    precision: str = "float64"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_parts(self)
        check_together(self.layout, self.model, self.batch, self.ppo, self.switches)
        _check_program(self.program)

    __repr__ = short

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis prints what was drawn in this form."""
        printer.text(repr(self))


def _check_parts(case: Case) -> None:
    parts = {"layout": Layout, "model": MoEModel, "batch": Batch, "ppo": PPO, "switches": Switches}
    for name, kind in parts.items():
        value = getattr(case, name)
        if type(value) is not kind:
            raise ValueError(f"{name}={value!r} must be a {kind.__name__}")
    if case.twin is not None and case.twin not in TWINS:
        raise ValueError(f"twin={case.twin!r} is unknown; choose None or one of {', '.join(TWINS)}")
    if case.precision not in PRECISIONS:
        raise ValueError(f"precision={case.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if type(case.seed) is not int or not 0 <= case.seed < 2**63:
        raise ValueError(f"seed={case.seed!r} must be an int in 0..{2**63 - 1}")


def _check_program(program: Any) -> None:
    known = isinstance(program, tuple) and all(type(step) in (Rollout, Update) for step in program)
    if not known or not 1 <= len(program) <= MOST_OPERATIONS:
        raise ValueError(f"program={program!r} must be a tuple of 1..{MOST_OPERATIONS} of Rollout() and Update()")
    for before, step in zip((None, *program), program, strict=False):
        if type(step) is Update and type(before) is not Rollout:
            raise ValueError(f"program={program!r}: every Update must follow a Rollout")


def twin_of(case: Case) -> Case:
    """The case that must agree with this one; it has no twin of its own."""
    if case.twin == "other_dispatcher":
        other = {"alltoall": "allgather", "allgather": "alltoall"}[case.switches.dispatcher]
        switches = replace(case.switches, dispatcher=other, shared_overlap=False)  # which alltoall alone has
        return replace(case, twin=None, switches=switches)
    if case.twin == "plain_switches":
        plain = replace(case.switches, p2p="plain", deallocate=False, groups="global", decoder_input=False)
        return replace(case, twin=None, switches=_in_sequence(plain))
    return replace(case, twin=None)


def _in_sequence(switches: Switches) -> Switches:
    """Nothing overlaps or is recomputed, but for what changes the order of a sum, and so its last bit.

    Recomputed norms and shared experts are nodes of their own in autograd, before which gradients meet in another
    order. The buckets of a distributed optimizer say who owns what, and so how a norm is summed. An overlapped shared
    expert sends its gradient back before the others do.
    """
    if switches.recompute not in ("layernorm", "shared_experts", "all"):
        switches = replace(switches, recompute="none", recompute_layers=0)
    switches = replace(switches, check_nan=False, deterministic=False)
    if switches.distributed and switches.bucket:
        return replace(switches, overlap_gather=False, align=False)
    return replace(switches, overlap_reduce=False, overlap_gather=False, align=False, bucket=0)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one rank saw, under the keys of `docs/ppo.md`; a hang or a death is an Observation too.

    `outcome` is done, raised, died, hung, or starved (kept from running, by a signal or by other processes); `stage`
    the last stage reached; `calls` its collectives in order, `inside` the index of the one that it was in, or -1,
    `waits` for whom it waited there in vain; `error` says how it ended where not done.
    """

    rank: int
    outcome: str
    stage: str
    tensors: "Mapping[str, torch.Tensor]" = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    calls: "Sequence[Call]" = ()
    inside: int = -1
    waits: "Sequence[Divergence]" = ()
    error: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


class Violation(AssertionError):
    """A broken law, with a witness. `also` names the laws that the same case broke later on; `cause` tells root causes
    of one law apart, where it has several.
    """

    cause = ""

    def __init__(self, case: Case, law: str, witness: str, expected: str, observed: str, sentence: str) -> None:
        super().__init__(law, witness)
        self.case, self.law, self.witness = case, law, witness
        self.expected, self.observed, self.sentence = expected, observed, sentence
        self.also: tuple[str, ...] = ()
        self.details = ""  # several lines that a report has room for, and a terminal has not

    def __str__(self) -> str:
        rows = {
            "law violated": self.law,
            "witness": self.witness,
            "expected": self.expected,
            "observed": self.observed,
            "in words": self.sentence,
            "also violated": "; ".join(self.also),
        }
        lines = [f"  {name:<13} {text}" for name, text in rows.items() if text]
        return "\n".join(["", *lines, f"@example({self.case!r})"])


@cache
def violation_of(cause: str) -> type[Violation]:
    """A kind of Violation of its own for one root cause, so that Hypothesis shrinks and reports each by itself.

    Hypothesis tells failures apart by type and line; deaths of different causes are raised on one line.
    """
    return type("Violation", (Violation,), {"cause": cause, "__module__": __name__})


class HarnessFault(BaseException):
    """A fault of ours, neither a finding nor a pass; a BaseException, so that Hypothesis does not shrink it."""
