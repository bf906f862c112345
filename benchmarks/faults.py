"""Injected faults in a row, drawn from a seed: `python benchmarks/faults.py [--faults 200] [--seed 0]`.

Every fault fires in a real case, is judged as if it were the first of its cause (in a fresh pool once more), and a
healthy case follows. `quiet` is the time from the last sign of life of any rank to the first verdict, before it is
confirmed; `back` that from there to a pool that is ready again. Exit code 1 where a verdict is wrong.
"""

import argparse
import random
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from asked import one_or_more
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fuzz import endings, forking, known
from fuzz.case import Case, HarnessFault, Observation
from fuzz.trial import Trials, Verdict
from toy_models.spec import PPO, Batch, Layout, MoEModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests are not installed

from tests.fault_verdicts import DEATHS, UNEXPLAINED, wrong
from tests.faults import INJECT, PLANT, Control, Fault, injected

FOUR = MoEModel(heads=2, kv_heads=2, experts=4)
ROWS = Batch(rows=4, prompt=2, response=2)
CASES = (
    Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2, prompt=2, response=2)),
    Case(layout=Layout(world=2, tp=2, etp=2), model=FOUR),
    Case(layout=Layout(world=2), batch=ROWS, ppo=PPO(mini_batches=2)),
    Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2), twin="again"),
    Case(layout=Layout(world=4, ep=4), model=FOUR, batch=Batch(rows=4)),
    Case(layout=Layout(world=4, tp=2, ep=2, etp=2), model=FOUR, batch=ROWS),
    Case(layout=Layout(world=4, tp=2, ep=4), model=FOUR, batch=ROWS, precision="float32"),
    Case(layout=Layout(world=4, ep=2), model=FOUR, batch=ROWS, twin="other_dispatcher"),
)
STAGES = ("models", "rollout", "experience", "dispatch", "update")
KINDS = (*INJECT, *(f"{kind} once" for kind in DEATHS))
QUIET, LONGEST, BACK = 3.0, 15.0, 2.0  # seconds: median where the record explains it, maximum, maximum


@dataclass(frozen=True)
class Row:
    """What became of one fault; seconds are those of every run that ended a pool, the first verdict's first."""

    kind: str
    wrong: str
    quiet: Sequence[float]
    back: Sequence[float]

    @property
    def explained(self) -> bool:
        return self.kind not in UNEXPLAINED


class Timed(Trials):
    """Trials that measure every run that ends its pool."""

    def __init__(self, plants: tuple[str, ...]) -> None:
        super().__init__(plants)
        self.quiet: list[float] = []
        self.back: list[float] = []
        self._last = self._judged = 0.0
        self._original = endings.observations
        endings.observations = self._observe  # type: ignore[assignment]

    def _observe(self, pool: Any, *args: Any) -> list[Observation]:
        signs = [file for kind in ("pulse", "calls", "reply") for file in pool.folder.glob(f"{kind}-*")]
        self._last = max(file.stat().st_mtime for file in signs)
        seen = self._original(pool, *args)
        self._judged = time.time()  # the clock of files
        return seen

    def _run(self, case: Case, *args: Any) -> list[Observation]:
        seen = super()._run(case, *args)
        pool = self._pools[case.layout.world]
        if pool._pool is None:
            self.quiet.append(self._judged - self._last)
            pool._warm()
            self.back.append(time.time() - self._judged)
        return seen


def drawn(chance: random.Random, healthy: Mapping[Case, Mapping[str, int]]) -> tuple[Case, Fault]:
    """A case and a fault in it: kind, rank and place."""
    case, kind = chance.choice(CASES), chance.choice(KINDS)
    world, steps = case.layout.world, 2 * case.ppo.epochs * case.ppo.mini_batches
    collective = chance.randrange(healthy[case]["collectives_run_in_lock_step"] // world)
    places = [f"collective {collective}", f"step {chance.randrange(steps)}", f"stage {chance.choice(STAGES)}"]
    places += ["end"] * (kind != "loop") + [f"inside {collective}"] * (kind not in ("loop", "mismatch", "missing"))
    once = kind.endswith(" once")
    # A pause ends: in the case itself it would come back in its twin, perhaps in front of another call.
    in_twin = case.twin is not None and not once and (kind == "pause" or chance.random() < 0.5)
    return case, Fault(kind.removesuffix(" once"), chance.randrange(world), chance.choice(places), once, in_twin)


def judged(trials: Timed, control: Control, case: Case, fault: Fault, healthy: Mapping[str, int]) -> str:
    """What is wrong with the verdict, or with that of the healthy case after it."""
    trials._confirmed.clear()
    trials.quiet, trials.back = [], []
    with injected(control, fault):
        said = _verdict(trials, control, case, fault, healthy)
    after = trials.judge(case)
    right = after.violation is None and not after.doubts and after.counts == healthy
    return said or ("" if right else f"the case after it: {after.violation}; doubts: {after.doubts}")


def _verdict(trials: Timed, control: Control, case: Case, fault: Fault, healthy: Mapping[str, int]) -> str:
    try:
        verdict: Verdict = trials.judge(case)
    except HarnessFault as error:
        right = fault.kind == "full disk" and control.fired() and "could not be written" in str(error)
        return "" if right else f"harness fault: {error}"
    return wrong(fault, verdict, control.fired(), healthy)


def measured(trials: Timed, faults: int, seed: int) -> list[Row]:
    """All faults, one after the other in the same trials."""
    control, chance, rows = Control(), random.Random(seed), []
    healthy = {case: trials.judge(case).counts for case in CASES}
    for number in track(range(faults), description="faults"):
        case, fault = drawn(chance, healthy)
        said = judged(trials, control, case, fault, healthy[case])
        if said:
            print(f"fault {number}, {fault!r} in {case!r}: {said}")
        rows.append(Row(f"{fault.kind}{' once' * fault.once}", said, tuple(trials.quiet), tuple(trials.back)))
    control.disarm()
    return rows


def table(rows: Sequence[Row]) -> Table:
    """One row per kind, and the sums."""
    kinds = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.kind):
        kinds[row.kind].append(row)
    columns = ("fault", "number", "right", "quiet s: median", "max", "back s: median", "max")
    shown = Table(*columns, title=f"{len(rows)} injected faults")
    for kind, some in kinds.items():
        shown.add_row(kind, *_numbers(some))
    shown.add_section()
    shown.add_row("that the record explains", *_numbers([row for row in rows if row.explained]))
    shown.add_row("all", *_numbers(rows))
    return shown


def _numbers(rows: Sequence[Row]) -> list[str]:
    quiet, back = [row.quiet[0] for row in rows if row.quiet], [second for row in rows for second in row.back]
    seconds = [f"{pick(s):.2f}" if s else "" for s in (quiet, back) for pick in (median, max)]
    return [str(len(rows)), str(sum(not row.wrong for row in rows)), *seconds]


def bounds(rows: Sequence[Row]) -> str:
    """What was asked for beside what was measured."""
    explained = [row.quiet[0] for row in rows if row.quiet and row.explained]
    quiet, back = [row.quiet[0] for row in rows if row.quiet], [second for row in rows for second in row.back]
    asked = (
        ("median quiet where the record explains it", median(explained or [0.0]), QUIET),
        ("longest quiet", max(quiet, default=0.0), LONGEST),
        ("longest until the pool is back", max(back, default=0.0), BACK),
    )
    return "\n".join(
        f"{name}: {s:.2f} s, at most {most:g} s: {'ok' if s <= most else 'MISSED'}" for name, s, most in asked
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=one_or_more, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    forking.warm_up()
    trials = Timed(plants=(*known.mends(), PLANT))
    rows = measured(trials, asked.faults, asked.seed)
    trials.close()
    Console(width=120).print(table(rows), bounds(rows), highlight=False)
    right = sum(not row.wrong for row in rows)
    print(f"{right} right verdicts of {len(rows)}")
    return int(right < len(rows))


if __name__ == "__main__":
    sys.exit(main())
