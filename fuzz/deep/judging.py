"""The cases of one search on their way: judged within a time box, recorded, claimed, or left to whoever has them.

Knows trials, time boxes, the folders of failures and the ledger's methods; nothing of Hypothesis and of chunks.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fuzz import refusals, summary
from fuzz.broken import size as size_of_broken
from fuzz.case import Case, Violation
from fuzz.deep.campaign import Record
from fuzz.deep.discovery import New, cell, document, identity, met
from fuzz.deep.ledger import Ledger
from fuzz.folders import Folders
from fuzz.functions import judge as functions
from fuzz.functions.call import size as size_of_call
from fuzz.investigate import AROUND, investigate
from fuzz.progress import in_words
from fuzz.timebox import Failure, TimeBox, TimeUp
from fuzz.trial import Trials
from toy_models.spec import Layout

SLOW = 5.0  # seconds from which on a case is kept, though it holds


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a shard judges with: its number, the ledger, trials, a private folder, seconds to shrink a failure."""

    shard: int
    ledger: Ledger
    trials: Trials
    folder: Path
    shrink_seconds: float
    known: bool  # whether known findings are stepped around


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What became of a case, a broken configuration or a call."""

    kind: str
    value: Any
    outcome: str
    violation: Violation | None
    tally: summary.Tally
    new: Iterable[New]


class Judging:
    """One search of a chunk, until `seconds` have gone. `met` is what the shard has met so far, and grows."""

    def __init__(self, bench: Bench, chunk: int, seconds: float, met: set[New]) -> None:
        self._bench, self._chunk, self._met = bench, chunk, met
        self._until = time.monotonic() + seconds
        self._mine: dict[tuple[str, str], int] = {}  # by law and cause, as the time box tells failures apart
        self._others: dict[tuple[str, str], int] = {}  # by law and tensor
        self._folders = Folders(bench.folder)
        self._box: TimeBox | None = None

    def case(self, case: Case) -> None:
        """Judge a case; raises the Violation where it is this shard's to shrink, TimeUp where time is up."""
        self._run(case, self._judged_case)

    def broken(self, broken: Any) -> None:
        """A broken configuration, likewise."""
        self._run(broken, self._judged_broken, size_of_broken, lambda *_: None)

    def call(self, call: Any) -> None:
        """A call of a function, likewise."""
        self._run(call, self._judged_call, size_of_call, lambda *_: None)

    @property
    def met_others(self) -> bool:
        """Whether a case passed though it failed, since another shard has it."""
        return bool(self._others)

    def _run(self, value: Any, judged: Callable[[Any], Seen], *how: Any) -> None:
        self._box = self._box or TimeBox(self._bench.shrink_seconds, self._improved, *how)
        self._box.run(value, lambda value: self._recorded(value, judged))

    # ---- judged and recorded -----------------------------------------------------------------------------------

    def _judged_case(self, case: Any) -> Seen:
        verdict, tally = self._bench.trials.judge(case), summary.Tally()
        summary.count(tally, verdict)
        tally["known cells"] = {cell(case.layout): 1} if tally["known"] else {}
        outcome = "violated" if verdict.violation else "inconclusive" if verdict.doubts else "holds"
        new = met(case, verdict.counts, verdict.facts)
        return Seen(kind="case", value=case, outcome=outcome, violation=verdict.violation, tally=tally, new=new)

    def _judged_broken(self, broken: Any) -> Seen:
        verdict, tally = refusals.judge(self._bench.trials, broken, known=self._bench.known), summary.Tally()
        summary.count_broken(tally, verdict)
        outcome = "violated" if verdict.violation else verdict.outcome
        new = [("behaviour", f"{law} & {verdict.outcome}") for law, number in verdict.counts.items() if number]
        return Seen(kind="broken", value=broken, outcome=outcome, violation=verdict.violation, tally=tally, new=new)

    def _judged_call(self, call: Any) -> Seen:
        verdict, tally = functions.judge(self._bench.trials, call, step_around=self._bench.known), summary.Tally()
        summary.count_call(tally, verdict)
        new = [("behaviour", f"{call.function} & {verdict.outcome}")]
        outcome = "violated" if verdict.violation else verdict.outcome
        return Seen(kind="call", value=call, outcome=outcome, violation=verdict.violation, tally=tally, new=new)

    def _recorded(self, value: Any, judged: Callable[[Any], Seen]) -> Violation | None:
        """The violation, where it is this shard's; the case has finished when the ledger has answered."""
        if (began := time.monotonic()) > self._until:
            raise TimeUp([])
        seen = judged(value)
        seconds = time.monotonic() - began
        failure, mine = self._claimed(seen.violation) if seen.violation else (None, False)
        new = tuple(one for one in dict.fromkeys(seen.new) if one not in self._met)
        self._bench.ledger.record(self._chunk, _record(seen, seconds, failure, new))
        self._met.update(new)
        return seen.violation if mine else None

    def _claimed(self, violation: Violation) -> tuple[int, bool]:
        """The number of a failure, and whether it is ours: asked once in a search, so that verdicts stay as they are.

        While one of ours is shrunk, the first tensor may become another; it stays the same failure.
        """
        loose, key = (violation.law, violation.cause), identity(violation)
        if loose in self._mine:
            return self._mine[loose], True
        if key in self._others:
            return self._others[key], False
        where = in_words(layout_of(violation.case))
        number, mine = self._bench.ledger.claim(*key, self._bench.shard, where, violation.sentence)
        if mine:
            self._mine[loose] = number
        else:
            self._others[key] = number
        return number, mine

    # ---- what is ours ------------------------------------------------------------------------------------------

    def _improved(self, failure: Failure) -> None:
        """The folder is there from the first case on, and has the smallest so far."""
        self._send(failure, self._folders.keep(failure) if isinstance(failure.violation.case, Case) else None)

    def _send(self, failure: Failure, folder: Path | None) -> None:
        violation, number = failure.violation, self._mine[failure.identity]
        if folder:
            name, files = folder.name, {file.name: file.read_bytes() for file in folder.iterdir()}
        else:
            name, files = f"failure-{number}", {"report.md": f"# {violation.law}\n\n```{violation}\n```\n".encode()}
        self._bench.ledger.keep(number, name, files, in_words(layout_of(violation.case)), violation.sentence)

    def investigate(self) -> None:
        """After the search: find out about what is ours, and send its folders."""
        for failure in self._box.failures.values() if self._box else ():
            if isinstance(failure.violation.case, Case):
                left = min(AROUND, self._bench.shrink_seconds / 2, max(0.0, self._until - time.monotonic()))
                folder, report = investigate(failure, self._bench.trials, self._folders, left)
                self._send(replace(failure, violation=report.violation), folder)
        self._bench.ledger.found(sorted(set(self._mine.values())))


def _record(seen: Seen, seconds: float, failure: int | None, new: tuple[New, ...]) -> Record:
    kept = seen.violation or seen.outcome == "inconclusive" or seconds > SLOW
    return Record(
        seconds=seconds,
        kind=seen.kind,
        cell=cell(layout_of(seen.value)),
        outcome=seen.outcome,
        failure=failure,
        document=document(seen.value) if kept else "",
        new=new,
        tally=seen.tally,
    )


def layout_of(value: Any) -> Layout:
    """Of a case, a call, or the case of a broken configuration."""
    return value.layout if hasattr(value, "layout") else value.case.layout
