"""Laws of refusal: what cannot be is refused by a check, alike on all ranks and before they talk, or comes out right.

Pure functions over a broken configuration and what the ranks saw of it (`fuzz.refuse`). The checks of a step may come
after the making of groups and models, whose collectives do not count. Knows no megatron and no processes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fuzz.broken import Broken
from fuzz.case import Observation, Violation, violation_of
from fuzz.laws.compare import Finding
from fuzz.laws.liveness import MADE_ONCE, cause

BEFORE = ("called", "groups", "models")  # stages whose collectives count as before the step
Ranks = Sequence[Observation]


def refusal(rank: Observation) -> Mapping[str, Any] | None:
    """How a rank refused; None where it did not."""
    return rank.facts.get("refused")


def _violation(broken: Broken, law: str, place: str, finding: Finding, ranks: Ranks) -> Violation:
    found = violation_of(f"{law}: {broken.names}: {place}")(broken, law, *finding)  # type: ignore[arg-type]
    found.details = "\n\n".join(filter(None, map(_told, ranks)))
    return found


def _told(rank: Observation) -> str:
    refused = refusal(rank)
    return f"rank {rank.rank}: {_words(rank)}\n{refused['traceback'] if refused else rank.error}"


def _words(rank: Observation) -> str:
    """What became of a rank, in a few words."""
    refused = refusal(rank)
    if refused is None:
        return f"rank {rank.rank} {cause(rank) if rank.outcome in ('died', 'raised', 'hung') else 'went on'}"
    message = " ".join(refused["message"].split())[:200] or "(no message)"
    return f"rank {rank.rank} raised {refused['exception']} in {refused['phase']} at {refused['place']}: {message}"


def _refused(ranks: Ranks) -> list[tuple[Observation, Mapping[str, Any]]]:
    return [(rank, refused) for rank in ranks if (refused := refusal(rank))]


def what_is_accepted_can_be_read(broken: Broken, ranks: Ranks) -> int:
    """What megatron makes of it has the shards and layers of the case, so that the trainer can go on."""
    for rank, refused in _refused(ranks):
        if refused["ours"] and not broken.changing:
            said = "megatron-core accepts it, and what it makes is not what the case says"
            finding = Finding(f"rank {rank.rank}", "a refusal by megatron-core", _words(rank), said)
            raise _violation(broken, "what is accepted can be read", refused["place"], finding, ranks)
    return len(ranks)


def what_is_refused_is_refused_by_a_check(broken: Broken, ranks: Ranks) -> int:
    """An exception comes from a raise or an assert, not from inside an operator."""
    for rank, refused in _refused(ranks):
        if not refused["check"] and not refused["ours"]:
            finding = Finding(
                f"rank {rank.rank}, phase {refused['phase']}",
                "a check that refuses it, or right results",
                _words(rank),
                f"{refused['exception']} deep inside, from {refused['line']!r}; "
                + "; ".join(_words(other) for other in ranks if other is not rank),
            )
            raise _violation(broken, "what is refused is refused by a check", refused["place"], finding, ranks)
    return len(_refused(ranks))


def all_ranks_refuse_alike(broken: Broken, ranks: Ranks) -> int:
    """Either no rank refuses, or all do in the same phase."""
    phases = {refused["phase"] for _, refused in _refused(ranks)}
    if phases and (len(_refused(ranks)) < len(ranks) or len(phases) > 1):
        _, first = _refused(ranks)[0]
        said = "; ".join(map(_words, ranks))
        finding = Finding(
            f"phases {sorted(phases)}", "the same refusal on all ranks", said, "some ranks refuse it only"
        )
        raise _violation(broken, "all ranks refuse alike", first["place"], finding, ranks)
    return len(ranks) if phases else 0


def every_rank_ends(broken: Broken, ranks: Ranks) -> int:
    """No rank hangs or dies."""
    for rank in ranks:
        if rank.outcome in ("died", "raised", "hung"):
            said = "; ".join(map(_words, ranks))
            finding = Finding(f"rank {rank.rank}, stage {rank.stage}", "a refusal, or an end", said, rank.error[:300])
            raise _violation(broken, "every rank ends", cause(rank), finding, ranks)
    return len(ranks)


def a_refusal_says_why(broken: Broken, ranks: Ranks) -> int:
    """The error has a message."""
    for rank, refused in _refused(ranks):
        if not refused["message"]:
            finding = Finding(f"rank {rank.rank}", "a message", _words(rank), f"only {refused['line']!r} says why")
            raise _violation(broken, "a refusal says why", refused["place"], finding, ranks)
    return len(_refused(ranks))


def a_refusal_comes_before_the_first_collective(broken: Broken, ranks: Ranks) -> int:
    """Before it megatron has made no collective of the phase that refuses."""
    for rank, refused in _refused(ranks):
        calls = [] if refused["phase"] in BEFORE else list(rank.calls[refused["issued"] :])
        late = [call for call in calls if call.op not in MADE_ONCE and not call.where.startswith("toy_models/")]
        if late and not refused["ours"]:
            finding = Finding(
                f"rank {rank.rank}, phase {refused['phase']}",
                "a refusal before the first collective of the step",
                _words(rank),
                f"{len(late)} collectives before it, the first {late[0]}",
            )
            law = "a refusal comes before the first collective"
            raise _violation(broken, law, refused["place"], finding, ranks)
    return len(_refused(ranks))


Law = Callable[[Broken, Ranks], int]
LAWS: tuple[Law, ...] = (
    what_is_accepted_can_be_read,
    what_is_refused_is_refused_by_a_check,
    all_ranks_refuse_alike,
    every_rank_ends,
    a_refusal_says_why,
    a_refusal_comes_before_the_first_collective,
)
NAMES = (*(law.__name__ for law in LAWS), "what_is_accepted_is_right")


def accepted_and_wrong(broken: Broken, found: Violation, ranks: Ranks) -> Violation:
    """A law of cases that an accepted configuration breaks."""
    law, said = "what is accepted is right", f"accepted, and then: {found.law}: {found.sentence}"
    finding = Finding(found.witness, f"a refusal, or {found.expected}", found.observed, said)
    violation = _violation(broken, law, found.law, finding, ranks)
    violation.also = found.also
    return violation


def not_comparable(broken: Broken, error: Exception, ranks: Ranks) -> Violation:
    """What came out of an accepted configuration does not even have the shape of what the case must give."""
    said = "megatron-core accepts it, and what comes out is not what the case says"
    finding = Finding("all ranks", "a refusal by megatron-core", str(error)[:200], said)
    return _violation(broken, "what is accepted can be read", type(error).__name__, finding, ranks)


def judge(broken: Broken, ranks: Ranks) -> tuple[dict[str, int], Violation | None]:
    """How much each law had to check, and the first that is broken; without what only the reference can tell."""
    counts: dict[str, int] = {}
    for law in LAWS:
        try:
            counts[law.__name__] = law(broken, ranks)
        except Violation as violation:
            return counts, violation
    return counts, None
