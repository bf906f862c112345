"""One case from its values to its verdict: reference, ranks, twin, laws. Owns the pools and nothing of Hypothesis.

A verdict depends on the case alone: what is cached (references, and process groups inside the ranks) is keyed by value.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from fuzz.broken import Broken
from fuzz.case import Case, HarnessFault, Observation, Violation, twin_of
from fuzz.laws import judge, refusal, sharded
from fuzz.laws.compare import DERIVED, doubts, forced_tokens, response_tokens
from fuzz.laws.liveness import cause
from fuzz.ranks import Ranks
from toy_models.batching import padded_width, partition

KEPT_REFERENCES = 64
KEPT_POOLS = 6
RUN_CALL = "fuzz.functions.run:run"
PARTS = ("ranks", "waiting", "twin")  # where the parent's seconds of a case go before the laws, in Verdict.seconds


@dataclass(frozen=True)
class Verdict:
    """What became of a case: how much each law had to check, what was broken, and what could not be judged and why."""

    case: Case
    counts: Mapping[str, int]
    violation: Violation | None
    doubts: Sequence[str]
    ill_conditioned: bool
    facts: Mapping[str, bool]
    seconds: Mapping[str, float]


class _Seen(NamedTuple):
    """What ranks, those of the twin if there is one, and reference saw, and why it says nothing, if so."""

    ranks: list[Observation]
    twin: list[Observation]
    reference: Observation
    why: list[str]
    seconds: Mapping[str, float]


class Trials:
    """The pools of rank processes and the reference's process, warm for one run; `plants` are applied in every rank.

    `start` makes a rank ready: on a GPU where there is one.
    """

    def __init__(self, plants: tuple[str, ...] = (), start: str = "fuzz.drive:start") -> None:
        self.plants, self._start = plants, start
        self._pools: OrderedDict[int, Ranks] = OrderedDict()
        self._truth: Ranks | None = None
        self._references: OrderedDict[tuple, Observation] = OrderedDict()
        self._confirmed: set[str] = set()  # causes of deaths and hangs that were seen to recur

    def judge(self, case: Case, times_patience: float = 1.0) -> Verdict:
        """Run a case, and its twin if it has one, and judge everything that was seen."""
        seen = self._seen(case, times_patience)
        if _starved([*seen.ranks, *seen.twin]):
            return Verdict(case, {}, None, seen.why, False, {}, seen.seconds)
        began, ill = time.perf_counter(), False
        derived = _derived(case, seen.ranks)
        reference = self._moving(case, seen.reference, derived=True) if derived else seen.reference
        counts, violation = judge(case, seen.ranks, reference, seen.twin)
        seconds = {**seen.seconds, "laws": time.perf_counter() - began}
        if violation is not None and not derived and _done(seen.ranks) and _done(seen.twin):
            counts, again = judge(case, seen.ranks, self._moving(case, seen.reference), seen.twin)
            ill, violation = again is None, again
        why = [*doubts(case, seen.reference), *seen.why]
        return Verdict(case, counts, violation, why, ill, _facts(case, seen.ranks, seen.reference), seconds)

    def _seen(self, case: Case, times_patience: float) -> _Seen:
        """The ranks run beside the reference, on the guess, seldom wrong, that it forces no token on them."""
        clock, known = [time.perf_counter()], self._ask_early(case)
        tokens = forced_tokens(case, self._reference(case)) if known else {}
        first = self._run(case, tokens, times_patience)
        clock.append(time.perf_counter())
        reference = self._reference(case)
        clock.append(time.perf_counter())
        right = known or not forced_tokens(case, reference)
        ranks, passing = self._ranks(case, reference, times_patience, first if right else None)
        run = case.twin and _done(ranks)  # where a rank was lost the twin would tell no more
        twin, also_passing = self._ranks(twin_of(case), reference, times_patience) if run else ([], [])
        clock.append(time.perf_counter())
        parts = {name: after - before for name, (before, after) in zip(PARTS, pairwise(clock), strict=True)}
        own = {"reference": 0.0 if known else reference.seconds["reference"]}
        return _Seen(ranks, twin, reference, [*passing, *also_passing], _seconds(ranks) | own | parts)

    def traced(self, case: Case) -> tuple[Observation, list[Observation]]:
        """The first optimizer step with taps on every module: of the reference, and of the ranks on its tokens."""
        truth = self._ask("fuzz.truth_trace:run", case)
        near, responses = forced_tokens(case, truth).get(0, {}), response_tokens(case, truth.tensors["0/tokens"])
        seen = self._pool(case.layout.world).run("fuzz.trace:step", case, near, responses)
        return truth, list(sharded.whole(case, seen))

    def attempt(self, broken: Broken) -> tuple[list[Observation], Callable[[], Violation | None]]:
        """What the ranks saw of a broken configuration, and how to judge what they accepted."""
        case = broken.case
        self._ask_early(case)
        reference = self._reference(case)
        seen = self._pool(case.layout.world).run("fuzz.refuse:attempt", broken, forced_tokens(case, reference))

        def accepted() -> Violation | None:
            try:
                _, violation = judge(case, seen, reference)
                violation = violation and judge(case, seen, self._moving(case, reference))[1]
                return violation and refusal.accepted_and_wrong(broken, violation, seen)
            except Exception as error:
                return refusal.not_comparable(broken, error, seen)

        return seen, accepted

    def call(self, call: Any) -> list[Observation]:
        """What the ranks saw of one call of a function; the first death or hang of a cause is confirmed."""
        seen, _ = self._sure(
            lambda patience: self._pool(call.layout.world).run(RUN_CALL, call, times_patience=patience)
        )
        return seen

    def on_cpu(self) -> "Trials":
        """Pools of the same system on the CPU, whatever this host has."""
        return Trials(self.plants, "fuzz.drive:start_on_cpu")

    def close(self) -> None:
        """End all processes."""
        for pool in [*self._pools.values(), *([self._truth] if self._truth else [])]:
            pool.close()
        self._pools.clear()
        self._truth = None

    def _ranks(
        self, case: Case, reference: Observation, times_patience: float, first: list[Observation] | None = None
    ) -> tuple[list[Observation], list[str]]:
        """What the ranks saw, and why it says nothing. `first`: what they saw already, of the tokens to be forced."""
        tokens = forced_tokens(case, reference)
        seen, once = self._sure(lambda more: self._run(case, tokens, more * times_patience), first)
        return seen, _starved(seen) or (["a rank was lost once, and not when the case ran again"] if once else [])

    def _sure(
        self, run: Callable[[float], list[Observation]], seen: list[Observation] | None = None
    ) -> tuple[list[Observation], bool]:
        """What the ranks saw, and whether a rank was lost that was not when it ran again, with twice the patience.

        The first death or hang of a cause is confirmed, in a fresh pool: one that lost a rank was closed.
        """
        seen = seen or run(1.0)
        lost = _lost(seen)
        if lost is None or lost in self._confirmed:
            return seen, False
        again = run(2.0)
        lost_again = _lost(again)
        self._confirmed |= {lost_again} if lost_again else set()
        return again, lost_again is None

    def _run(self, case: Case, tokens: Mapping[int, Mapping], times_patience: float) -> list[Observation]:
        return self._pool(case.layout.world).run("fuzz.drive:step", case, tokens, times_patience=times_patience)

    def _pool(self, world: int) -> Ranks:
        if world not in self._pools:
            self._make_room()
            self._pools[world] = Ranks(world, start=self._start, plants=self.plants)
        self._pools.move_to_end(world)
        return self._pools[world]

    def _make_room(self) -> None:
        if len(self._pools) >= KEPT_POOLS:
            _, oldest = self._pools.popitem(last=False)
            oldest.close()

    def _ask_early(self, case: Case) -> bool:
        """Let the reference begin while the ranks run; whether it is known already."""
        known = _reference_key(case) in self._references
        if not known:
            self._teller().begin("fuzz.truth:run", case)
        return known

    def _reference(self, case: Case) -> Observation:
        """What `_ask_early` has asked for."""
        key = _reference_key(case)
        if key not in self._references:
            self._references[key] = self._told(case)
        self._references.move_to_end(key)
        while len(self._references) > KEPT_REFERENCES:
            self._references.popitem(last=False)
        return self._references[key]

    def _moving(self, case: Case, reference: Observation, derived: bool = False) -> Observation:
        """The reference with how far each of its tensors moves under a nudge of one unit in the last place; `derived`
        where that alone makes the bounds.
        """
        if not any(name.startswith("moved/") for name in reference.numbers):
            moved = self._ask("fuzz.truth:movement", case)
            reference = replace(reference, numbers={**reference.numbers, **moved.numbers})
            self._references[_reference_key(case)] = reference
        return replace(reference, numbers={**reference.numbers, DERIVED: 1.0}) if derived else reference

    def _ask(self, function: str, case: Case) -> Observation:
        self._teller().begin(function, case)
        return self._told(case)

    def _teller(self) -> Ranks:
        self._truth = self._truth or Ranks(1, start=None, patience=60.0)
        return self._truth

    def _told(self, case: Case) -> Observation:
        [answer] = self._teller().finish()
        if answer.outcome != "done":
            raise HarnessFault(f"the reference {answer.outcome} on {case!r}: {answer.error}")
        return answer


def _lost(ranks: Sequence[Observation]) -> str | None:
    """Why a rank died or hangs; None where none does, or waits for one that has raised."""
    by = {outcome: [rank for rank in ranks if rank.outcome == outcome] for outcome in ("died", "raised", "hung")}
    lost = by["died"] or (by["hung"] if not by["raised"] else [])
    return cause(lost[0]) if lost else None


def _starved(ranks: Sequence[Observation]) -> list[str]:
    return sorted({rank.error.split(";")[0] for rank in ranks if rank.outcome == "starved"})


def _derived(case: Case, ranks: Sequence[Observation]) -> bool:
    """Whether bounds come from the movement of the reference alone: what was measured was float32 on the CPU."""
    return case.precision == "float32" and _done(ranks) and ranks[0].facts.get("backend") == "nccl"


def _done(ranks: Sequence[Observation]) -> bool:
    return all(rank.outcome == "done" for rank in ranks)


def _reference_key(case: Case) -> tuple:
    """What the reference depends on: of the layout the padding, and with balance losses the micro-batches."""
    width = padded_width(case.layout, case.batch)
    key = (case.model, case.batch, case.ppo, case.program, case.precision, case.seed, width)
    if case.model.routes_together:  # on all of the layout
        return (*key, case.layout, case.switches.forward_sp, case.switches.padding_mask == "padding")
    if not case.model.balance:
        return (*key, case.switches.padding_mask == "padding") if case.model.bias_rate else key
    shards = (case.layout.tp, case.layout.cp) if case.switches.padding_mask == "padding" else None
    return (*key, partition(case.layout, case.batch, case.ppo), shards)


def _seconds(ranks: Sequence[Observation]) -> dict[str, float]:
    """How long each stage took on the first rank; `quiet` before the ranks were given up."""
    quiet = max((rank.seconds.get("quiet", 0.0) for rank in ranks), default=0.0)
    return {**ranks[0].seconds, "quiet": quiet}


def _facts(case: Case, ranks: Sequence[Observation], reference: Observation) -> dict[str, bool]:
    """What the summary counts: starved experts and ranks, clipping of policy, values and gradients."""
    counts = [rank.tensors[key] for rank in ranks for key in rank.tensors if key.endswith("/counts")]
    clipped = {key: n for key, n in reference.numbers.items() if key.endswith("clip_fraction")}
    norms = [n for key, n in reference.numbers.items() if key.endswith("_norm")]
    return {
        "starved_experts": any(bool((tokens == 0).any()) for tokens in counts),
        "starved_ranks": any(int(tokens.sum()) == 0 for tokens in counts),
        "policy_clipped": any(n > 0 for key, n in clipped.items() if key.endswith("/clip_fraction")),
        "values_clipped": any(n > 0 for key, n in clipped.items() if key.endswith("/value_clip_fraction")),
        "gradients_clipped": any(norm > case.ppo.max_norm > 0 for norm in norms),
    }
