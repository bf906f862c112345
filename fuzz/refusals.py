"""One broken configuration from its values to its verdict: refused as it should be, right all the same, or a finding.

Knows trials, laws and known refusals; no processes, no megatron, no Hypothesis.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fuzz.broken import Broken
from fuzz.case import Observation, Violation
from fuzz.known_refusals import met
from fuzz.laws import refusal
from fuzz.trial import Trials

OUTCOMES = ("refused", "right all the same", "accepted, nothing to judge it by", "known", "could not be judged")


@dataclass(frozen=True)
class Verdict:
    """What became of a broken configuration: one of OUTCOMES or a violation; `known` is the id of the finding."""

    broken: Broken
    counts: Mapping[str, int]
    violation: Violation | None
    outcome: str
    known: str = ""


def judge(trials: Trials, broken: Broken, known: bool = True) -> Verdict:
    """Run a broken configuration and judge it; what is a known finding is no violation, unless `known` is off."""
    ranks, accepted = trials.attempt(broken)
    if any(rank.outcome == "starved" for rank in ranks):
        return Verdict(broken, {}, None, "could not be judged")
    counts, violation = refusal.judge(broken, ranks)
    outcome = "refused" if any(map(refusal.refusal, ranks)) else "accepted, nothing to judge it by"
    if violation is None and outcome != "refused" and not broken.changing:
        counts["what_is_accepted_is_right"], outcome = len(ranks), "right all the same"
        wrong = accepted()
        if wrong is not None and trials.judge(broken.case).violation is not None:
            return Verdict(broken, counts, None, "could not be judged")  # the case itself is not right
        violation = wrong and refusal.accepted_and_wrong(broken, wrong, ranks)
    if violation is not None:
        counts.pop(violation.law.replace(" ", "_"), None)
        if known and (entry := met(broken, violation)):
            return Verdict(broken, counts, None, "known", entry)
    return Verdict(broken, counts, violation, outcome)


def said(ranks: Sequence[Observation]) -> list[str]:
    """How each rank that refused says it, for who reads along."""
    found = [refusal.refusal(rank) for rank in ranks]
    return [f"{one['phase']}: {one['exception']}: {one['message']}" for one in found if one]
