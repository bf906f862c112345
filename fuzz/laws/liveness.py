"""Laws of liveness: every rank ends the case within its deadline; else nothing more is judged."""

from collections.abc import Sequence

from fuzz.case import Case, Observation, Violation
from fuzz.laws.compare import Finding

WORDS = {
    "raised": "raised an exception",
    "died": "died",
    "hung": "made no progress until the deadline",
}


def _first_to_fail(ranks: Sequence[Observation]) -> Observation | None:
    """The rank to blame: one that died before one that raised before one that waits for them."""
    failed = [rank for rank in ranks if rank.outcome != "done"]
    order = ("died", "raised", "hung")
    return min(failed, key=lambda rank: (order.index(rank.outcome), rank.rank), default=None)


def every_rank_finishes(case: Case, ranks: Sequence[Observation], reference: Observation) -> int:
    """Every case ends within its deadline on every rank, without an exception."""
    blamed = _first_to_fail(ranks)
    if blamed is not None:
        others = ", ".join(f"rank {r.rank} {r.outcome} in {r.stage}" for r in ranks if r is not blamed)
        said = f"rank {blamed.rank} {WORDS[blamed.outcome]} in stage {blamed.stage}; {others or 'no other rank'}"
        finding = Finding(f"rank {blamed.rank}, stage {blamed.stage}", "done on every rank", blamed.error.strip(), said)
        raise Violation(case, "every rank finishes", *finding)
    return len(ranks)
