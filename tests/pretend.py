"""A pytest plugin (`-p tests.pretend`) under which one thing goes wrong: the function that $PRETEND names."""

import os

from fuzz import forking, known, laws
from fuzz.case import Case, HarnessFault
from fuzz.trial import Trials, Verdict


def old_megatron() -> None:
    """An unsupported megatron-core is installed."""
    known.version = lambda: "0.1.0"


def fault() -> None:
    """The harness fails on every case."""

    def judge(self: Trials, case: Case) -> Verdict:
        raise HarnessFault(f"the reference died on {case!r}")

    _judge_by(judge)


def doubts() -> None:
    """Every case of one rank is inconclusive; nothing is run."""

    def judge(self: Trials, case: Case) -> Verdict:
        doubtful = ("a margin below the noise",) if case.layout.world == 1 else ()
        counts = dict.fromkeys(laws.NAMES, case.seed % 2)
        return Verdict(case, counts, None, doubtful, False, {"starved_experts": case.layout.ep - 1}, {})

    _judge_by(judge)


def _judge_by(judge: object) -> None:
    Trials.judge = judge
    forking.warm_up = lambda: None


if name := os.environ.get("PRETEND"):
    {"old_megatron": old_megatron, "fault": fault, "doubts": doubts}[name]()
