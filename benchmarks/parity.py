"""How near megatron-core comes to the reference: drawn cases, judged by the laws, every difference they see recorded.

Run with `python benchmarks/parity.py [--cases N] [--max-ranks M]`. Prints, per precision and kind of tensor, the
median and the greatest relative difference as the laws define it (`fuzz/laws/compare.py`), the tightest bound, and the
greatest share of its own bound that a difference used up; above 100 % the law judges again, with the bound that the
movement of the reference under a nudge allows. `docs/tolerances.md` holds one such table.
"""

import argparse
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from asked import one_or_more
from hypothesis import HealthCheck, Phase, given, settings
from rich import box
from rich.console import Console
from rich.table import Table

from fuzz import known
from fuzz.case import Case
from fuzz.laws import advantages, compare, dispatch, forward, updates
from fuzz.strategies import cases
from fuzz.trial import Trials

Recorded = dict[tuple[str, str], list[tuple[float, float]]]  # (kind, clipping) -> (difference, bound) per tensor

KINDS = (
    ("logits", r"\d+/logits"),
    ("log-probs", r"\d+/(old|ref)_logp"),
    ("log-probs of later steps", r"\d+/\d+/logp"),
    ("values, scores", r"\d+/(values|scores)"),
    ("rewards, returns", r"\d+/(rewards|returns)"),
    ("advantages", r"\d+/advantages"),
    ("gradients, step 0", r"0/0/\w+/grad/.*"),
    ("gradients, later steps", r"\d+/\d+/\w+/grad/.*"),
    ("weights", r"\d+/\d+/\w+/weight/.*"),
    ("moments", r"\d+/\d+/\w+/(exp_avg|exp_avg_sq|momentum_buffer)/.*"),
    ("one optimizer step", r"\d+/\d+/\w+/(weight|exp_avg|exp_avg_sq|momentum_buffer)"),
    ("ratio before the first step", r"\d+/\d+/logp - old_logp"),
    ("router probabilities", r".*/probs"),
    ("combine(dispatch(x))", r".*/combined.*"),
)


def kind_of(name: str) -> str:
    """The kind of a tensor that a law compares, from its key."""
    return next((kind for kind, pattern in KINDS if re.fullmatch(pattern, name)), "other")


@contextmanager
def recording(note: Callable[[str, float, float], None]) -> Iterator[None]:
    """While open, `note(name, difference, bound)` hears of every tensor that a law compares; nothing is passed over."""
    original, far = compare.compare, compare._far

    def heard(name: str, rank: int, mine: Any, truth: Any, scale: float, bound: float) -> Any:
        if mine.shape == truth.shape and bound > 0:
            worst = compare.differs(mine, truth, scale, -1.0)
            note(name, worst[0] if worst else 0.0, bound)
        return original(name, rank, mine, truth, scale, bound)

    owners = [m for m in (compare, forward, updates, dispatch, advantages) if hasattr(m, "compare")]
    for owner in owners:
        owner.compare = heard  # type: ignore[attr-defined]
    compare._far = lambda *_: True  # type: ignore[assignment]
    try:
        yield
    finally:
        compare._far = far
        for owner in owners:
            owner.compare = original  # type: ignore[attr-defined]


def measure(trials: Trials, precision: str, number: int, max_ranks: int) -> tuple[Recorded, list[Any]]:
    """Judge `number` drawn cases; what the laws compared, and the verdicts."""
    found: Recorded = defaultdict(list)
    verdicts: list[Any] = []

    def judge(case: Case) -> None:
        clipping = "on" if case.ppo.max_norm else "off"
        with recording(lambda name, gap, bound: found[kind_of(name), clipping].append((gap, bound))):
            verdicts.append(trials.judge(case))

    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    rules = settings(max_examples=number, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    settings(rules, suppress_health_check=quiet)(given(cases(max_ranks=max_ranks, precision=precision))(judge))()
    return found, verdicts


def table(precision: str, found: Recorded, verdicts: list[Any]) -> Table:
    broken = sum(verdict.violation is not None for verdict in verdicts)
    ill = sum(verdict.ill_conditioned for verdict in verdicts)
    title = f"{precision}: {len(verdicts)} cases, {broken} violations, {ill} ill-conditioned"
    columns = ("kind", "clipping", "tensors", "median", "greatest", "bound", "most used")
    shown = Table(*columns, title=title, title_justify="left", box=box.MARKDOWN)
    order = [kind for kind, _ in KINDS] + ["other"]
    for kind, clipping in sorted(found, key=lambda key: (order.index(key[0]), key[1])):
        pairs = found[kind, clipping]
        gaps, used = [gap for gap, _ in pairs], max(gap / bound for gap, bound in pairs)
        numbers = (f"{statistics.median(gaps):.1e}", f"{max(gaps):.1e}", f"{min(b for _, b in pairs):.0e}")
        shown.add_row(kind, clipping, str(len(pairs)), *numbers, f"{used:.0%}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=one_or_more, default=40, help="drawn cases per precision")
    parser.add_argument("--max-ranks", type=one_or_more, default=4)
    asked = parser.parse_args()
    trials, console = Trials(plants=known.mends()), Console(width=110)
    try:
        for precision in ("float64", "float32"):
            found, verdicts = measure(trials, precision, asked.cases, asked.max_ranks)
            console.print(table(precision, found, verdicts))
            for verdict in verdicts:
                if verdict.violation is not None:
                    console.print(str(verdict.violation), soft_wrap=True, markup=False, highlight=False)
    finally:
        trials.close()


if __name__ == "__main__":
    main()
