"""`python -m fuzz replay`: case files judged again, one line each. Starts ranks only where there is a case to run.

Knows case files, trials, known bugs and the names of the laws. Options and their spelling are `fuzz.__main__`'s.
"""

import difflib
import importlib
import json
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.console import Console
from rich.text import Text

from fuzz import forking, known, memory
from fuzz.case import Case, HarnessFault, Violation
from fuzz.case_files import Found, find

if TYPE_CHECKING:
    from fuzz.trial import Trials, Verdict

MOST_SHOWN = 160  # characters of one number or message on a line
STOPPING = ("VIOLATED", "INVALID")
ILL = "ill-conditioned: under a nudge of one unit in the last place the reference itself moves by more than the bound"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for; `law` is one of `fuzz.laws.NAMES`, or empty for all."""

    law: str = ""
    no_known: bool = False
    keep_going: bool = False
    plants: tuple[str, ...] = ()
    json: bool = False
    verbose: bool = False


@dataclass(frozen=True)
class Replayed:
    """What became of one case file; only what its outcome has is filled in."""

    outcome: str
    path: str = ""
    law: str = ""
    witness: str = ""
    expected: str = ""
    observed: str = ""
    sentence: str = ""
    why: str = ""
    seconds: float = 0.0

    def line(self) -> str:
        """`path: OUTCOME what`, on one line whatever a file or an exception says."""
        numbers = [f"{name} {flat(value)}" for name, value in self._numbers().items() if value]
        told = "; ".join(filter(None, (self.law, flat(self.witness), ", ".join(numbers), flat(self.why))))
        return f"{printable(self.path)}: {self.outcome} {told}".rstrip()

    def below(self) -> str:
        """The same numbers in full, below the line."""
        rows = self._numbers() | {"in words": self.sentence}
        text = "\n".join(f"{name:<9} {value.strip()}" for name, value in rows.items() if value)
        return "".join(f"    {line}\n" for line in text.splitlines())

    def _numbers(self) -> dict[str, str]:
        return {"expected": self.expected, "observed": self.observed}


def printable(text: str) -> str:
    """The text with escapes for what breaks a line or speaks to the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def flat(text: str, most: int = MOST_SHOWN) -> str:
    """One printable line: of several the last, which in a traceback has the reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    shown = printable(lines[-1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def exit_code(done: Sequence[Replayed]) -> int:
    """2 where anything was invalid or inconclusive, else 1 where a law was broken, else 0."""
    outcomes = {one.outcome for one in done}
    return 2 if outcomes & {"INVALID", "INCONCLUSIVE"} else 1 if "VIOLATED" in outcomes else 0


# ---- laws by name ----------------------------------------------------------------------------------------------


def _words(law: str) -> str:
    return re.sub(r"[\s_-]+", " ", law).strip().lower()


def _is(sentence: str, law: str) -> bool:
    """Whether a sentence is the name of that law in words."""
    return _words(law) == _words(sentence)


def law_named(asked: str) -> str:
    """The name of the law that is asked for by name or sentence; ValueError with the closest where there is none."""
    from fuzz.laws import NAMES

    found = next((name for name in NAMES if _is(asked, name)), None)
    if found is None:
        names = [name.replace("_", " ") for name in NAMES]
        close = difflib.get_close_matches(_words(asked), names, n=3, cutoff=0.0)
        raise ValueError(f"no law is called {flat(asked)!r}; the closest are: {'; '.join(close)}")
    return found


# ---- what a verdict means --------------------------------------------------------------------------------------


def outcome_of(verdict: "Verdict", law: str) -> Replayed:
    """What a verdict says about one law, or about all where `law` is empty."""
    broken = verdict.violation
    if broken is not None and (not law or _is(broken.law, law)):
        return _violated(broken)
    if broken is not None and any(_is(later, law) for later in broken.also):
        return Replayed("VIOLATED", law=_words(law), witness=f"after {broken.law} ({broken.witness})")
    if broken is not None and not _was_judged(verdict, law):
        return Replayed("INCONCLUSIVE", law=_words(law), why=f"not judged: {broken.law} is broken, {broken.witness}")
    if verdict.doubts or verdict.ill_conditioned:
        return Replayed("INCONCLUSIVE", why="; ".join(verdict.doubts) or ILL)
    vacuous = bool(law) and not verdict.counts.get(law)
    return Replayed("HOLDS", law=_words(law), why="(vacuous): this case gives the law nothing to check" * vacuous)


def _was_judged(verdict: "Verdict", law: str) -> bool:
    """Whether the law was asked at all; one that compares twins needs none where there is no twin."""
    from fuzz.laws import TWIN_LAWS

    return law in verdict.counts or (not verdict.case.twin and law in {twin.__name__ for twin in TWIN_LAWS})


def _violated(broken: Violation) -> Replayed:
    numbers = broken.expected, broken.observed, broken.sentence
    also = f"also violated: {', '.join(broken.also)}" if broken.also else ""
    return Replayed("VIOLATED", "", broken.law, broken.witness, *numbers, why=also)


def _breaks(verdict: "Verdict", law: str) -> bool:
    broken = verdict.violation
    return broken is not None and law in (broken.law, *broken.also)


# ---- judging ---------------------------------------------------------------------------------------------------


@dataclass
class Replay:
    """Judges case files; owns the pools, which start with the first case that is one."""

    asked: Asked
    _trials: dict[tuple[str, ...], "Trials"] = field(default_factory=dict)

    def of(self, found: Found) -> Replayed:
        """What becomes of one case file. HarnessFault where that cannot be said for a reason of ours."""
        began = time.monotonic()
        try:
            result = self._judged(found.case())
        except ValueError as error:
            result = Replayed("INVALID", why=str(error))
        if result.outcome == "HOLDS" and not result.why and found.is_known_failure:
            result = replace(result, outcome="FIXED")
        return replace(result, path=str(found.path), seconds=round(time.monotonic() - began, 3))

    def close(self) -> None:
        """End all processes."""
        for trials in self._trials.values():
            trials.close()

    def _judged(self, case: Case) -> Replayed:
        if (asked := memory.needed(case)) > (free := psutil.virtual_memory().available):
            said = f"may take {memory.shown(asked)} of memory, and {memory.shown(free)} are free here"
            return Replayed("INCONCLUSIVE", why=said)
        if self.asked.no_known:
            return outcome_of(self._judge(case, ()), self.asked.law)
        result = outcome_of(self._judge(case, known.mends()), self.asked.law)
        return self._on_stock(case, result) if result.outcome == "HOLDS" and known.met(case) else result

    def _on_stock(self, case: Case, mended: Replayed) -> Replayed:
        """KNOWN where the case holds with the mends only, and breaks on stock what a known bug is known to break."""
        verdict = self._judge(case, ())
        bugs = [bug for bug in known.living() if bug.covers(case) and _breaks(verdict, bug.law)]
        seen = outcome_of(verdict, self.asked.law)
        if seen.outcome != "VIOLATED":
            return mended
        return replace(seen, outcome="KNOWN", law=", ".join(b.id for b in bugs), why=bugs[0].upstream) if bugs else seen

    def _judge(self, case: Case, mends: tuple[str, ...]) -> "Verdict":
        if mends not in self._trials:
            if not self._trials:
                start()
            from fuzz.trial import Trials

            self._trials[mends] = Trials(plants=(*mends, *self.asked.plants))
        return self._trials[mends].judge(case)


def start() -> None:
    """Begin the fork server and import what judges, undisturbed by Ctrl-C, which is heeded at the end.

    The fork server ignores it once it has imported, and so must from its first moment; torch's import aborts on it.
    """
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a new process inherits
    try:
        forking.warm_up()  # before torch is imported here, since it imports the same at the same time
        signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
        importlib.import_module("fuzz.trial")
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def run(paths: Sequence[Path], asked: Asked) -> int:
    """Replay what the paths mean and print it; the exit code."""
    files = [found for path in paths for found in find(path)]
    replay, done, code = Replay(asked), list[Replayed](), 0
    try:
        for one in _until_stopped(replay, files):
            done.append(one)
            _print(one, asked)
    except HarnessFault as fault:
        code = _fault(fault, asked.verbose)
    finally:  # Ctrl-C too: what was judged is said, and the pools are closed
        replay.close()
        if asked.json:
            print(json.dumps([asdict(one) for one in done], indent=2), flush=True)
        print(_closing(done, len(files), asked.keep_going), end="", file=sys.stderr)
    return code or exit_code(done)


def _until_stopped(replay: Replay, files: Sequence[Found]) -> Iterator[Replayed]:
    console = Console(stderr=True)
    for number, found in enumerate(files, 1):
        # The spinner must be gone before a line is printed: it takes over stdout too.
        with console.status(Text(f"replaying {printable(str(found.path))} ({number} of {len(files)})")):
            one = replay.of(found)
        yield one
        if one.outcome in STOPPING and not replay.asked.keep_going:
            return


def _print(one: Replayed, asked: Asked) -> None:
    if not asked.json:
        print(one.line(), flush=True)
        if asked.verbose:
            print(one.below(), end="", flush=True)


def _fault(fault: HarnessFault, verbose: bool) -> int:
    """One line: what was being done, and the reason, which is the last line of what came with it."""
    first, *rest = str(fault).strip().splitlines()
    reason = flat(rest[-1]) if rest else ""
    said = str(fault) if verbose else f"{flat(first)} {reason}" if reason not in first else flat(first)
    print(f"harness fault: {said}", file=sys.stderr)
    return 2


def _closing(done: Sequence[Replayed], files: int, keep_going: bool) -> str:
    """How many there were of what, and how many were not tried; nothing where there was one."""
    if files == 1:
        return ""
    counted = Counter(one.outcome for one in done)
    listed = ", ".join(f"{number} {outcome}" for outcome, number in counted.items()) or "none judged"
    left = f", {files - len(done)} not tried" if files > len(done) else ""
    stopped = left and done and done[-1].outcome in STOPPING and not keep_going
    return f"{files} case files: {listed}{left}{'; --keep-going goes on' if stopped else ''}\n"
