"""One broken configuration from its values to its verdict: refused as it should be, right all the same, or a finding.

Knows trials, laws and known refusals; no processes, no megatron, no Hypothesis.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fuzz.broken import Broken
from fuzz.case import Violation
from fuzz.known_refusals import met
from fuzz.laws import refusal
from fuzz.trial import Trials

OUTCOMES = REFUSED, RIGHT, ACCEPTED, KNOWN, UNJUDGED = (
    "refused", "right all the same", "accepted, with nothing to judge it by", "known findings", "could not be judged",
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What became of a broken configuration: one of OUTCOMES, a violation if any; `known` is the id of the finding."""

    broken: Broken
    counts: Mapping[str, int]
    violation: Violation | None
    outcome: str
    known: str = ""


def judge(trials: Trials, broken: Broken, known: bool = True) -> Verdict:
    """Run a broken configuration and judge it; what is a known finding is no violation, unless `known` is off."""
    ranks, accepted = trials.attempt(broken)
    if any(rank.outcome == "starved" for rank in ranks):
        return Verdict(broken, {}, None, UNJUDGED)
    counts, violation = refusal.judge(broken, ranks)
    outcome = REFUSED if any(map(refusal.refusal, ranks)) else ACCEPTED
    if violation is None and outcome == ACCEPTED and not broken.changing:
        violation = accepted()
        counts["what_is_accepted_is_right"], outcome = len(ranks), ACCEPTED if violation else RIGHT
        if violation is not None and trials.judge(broken.case).violation is not None:
            return Verdict(broken, counts, None, UNJUDGED)  # the case itself is not right
    if known and violation is not None and (entry := met(broken, violation)):
        return Verdict(broken, counts, None, KNOWN, entry)
    return Verdict(broken, counts, violation, outcome)
