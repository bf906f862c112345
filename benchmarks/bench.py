"""What a generated PPO case costs, beside what its arithmetic costs: `python benchmarks/bench.py [--ranks 1,2,4,8]`.

One run, the same cases (`benchmarks/cases.json`), four ways:
(a) suite: this suite end to end, drawing, reference and laws included;
(b) floor: the same PPO iterations in a tight loop inside ranks that stay up, nothing observed, nothing judged;
(c) spawn: processes spawned per case, the ranks' work alone (`--spawned` cases of the list);
(d) multiproc: PyTorch's MultiProcContinuousTest with the same step function, no reference and no laws.

`--json OUT` writes medians in seconds, `--png OUT` a bar chart. Ratios hold within one run. d/a compares whole runs,
starts included, since neither harness is of use before it has started; a/b and c/a compare medians.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from asked import one_or_more, some_of
from drawn import NUMBER, drawn, listed
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fuzz import forking, known
from fuzz.case import Case, twin_of
from fuzz.forking import PRELOAD
from fuzz.ranks import Ranks
from fuzz.trial import Trials, Verdict
from toy_models.spec import Batch, Layout

WAYS = ("suite", "floor", "spawn", "multiproc")


class Suite(NamedTuple):
    """(a) Seconds of every case, `drawing` in the mean among them, and its verdict; seconds of the whole run with its
    start; memory in GiB.
    """

    seconds: list[float]
    verdicts: list[Verdict]
    drawing: float
    whole: float
    memory: float


def suite(world: int, cases: Sequence[Case]) -> Suite:
    """Draw and judge every case."""
    began = time.perf_counter()
    drawn(world, len(cases))
    per_draw = (time.perf_counter() - began) / len(cases)
    trials, seconds, verdicts = Trials(plants=known.mends()), [], []
    trials.judge(
        Case(layout=Layout(world=world), batch=Batch(rows=world))
    )  # the pools are there: what they cost is in the whole run
    for case in track(cases, description=f"suite, {world} ranks"):
        start = time.perf_counter()
        verdicts.append(trials.judge(case))
        seconds.append(time.perf_counter() - start + per_draw)
        assert verdicts[-1].violation is None, verdicts[-1].violation
    used = memory()
    trials.close()
    return Suite(seconds, verdicts, per_draw, time.perf_counter() - began, used)


def floor(world: int, cases: Sequence[Case]) -> list[float]:
    """(b) Seconds of every case: the slowest rank's, the second time round."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    preload = (*PRELOAD, "benchmarks.floor")
    ranks = Ranks(world, start="benchmarks.floor:start", plants=known.mends(), patience=120.0, preload=preload)
    try:
        for _ in range(2):
            seen = ranks.run("benchmarks.floor:loop", cases)
            assert all(rank.outcome == "done" for rank in seen), [rank.error for rank in seen]
    finally:
        ranks.close()
    return [max(times) for times in zip(*(rank.facts["seconds"] for rank in seen), strict=True)]


def _in_spawned(rank: int, case: Case, folder: str) -> None:
    import torch

    torch.set_num_threads(1)
    from fuzz import drive

    drive.start(rank, case.layout.world, f"{folder}/store", known.mends())
    for each in [case, twin_of(case)] if case.twin else [case]:
        drive.step(lambda stage: None, each)


def spawned(case: Case) -> float:
    """(c) Seconds for the ranks alone, each a freshly spawned process that imports everything."""
    context, began = multiprocessing.get_context("spawn"), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, case, folder) for rank in range(case.layout.world)]
        processes = [context.Process(target=_in_spawned, args=each) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            assert process.exitcode == 0, f"a spawned rank ended with {process.exitcode}"
    return time.perf_counter() - began


def multiproc(world: int) -> tuple[list[float], float]:
    """(d) Seconds of every test, and of the whole run with its start."""
    script = Path(__file__).with_name("multiproc.py")
    done = subprocess.run([sys.executable, script, str(world)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return found["seconds"], found["whole"]


def memory() -> float:
    """PSS in GiB of this process and all that it has started."""
    me = psutil.Process()
    return sum(process.memory_full_info().pss for process in [me, *me.children(recursive=True)]) / 2**30


def _spread(seconds: Sequence[float]) -> str:
    p90 = statistics.quantiles(seconds, n=10)[-1] if len(seconds) > 1 else seconds[0]
    return f"{statistics.median(seconds):.2f} / {p90:.2f}"


def measure(world: int, number: int, fresh: int) -> tuple[list[str], list[str], dict[str, float]]:
    """Rows of the two tables, and the medians."""
    cases = listed(world, number)
    a = suite(world, cases)
    b = floor(world, cases)
    c = [spawned(case) for case in track(cases[:fresh], description=f"spawn, {world} ranks")]
    d, whole_d = multiproc(world)
    medians = dict(zip(WAYS, map(statistics.median, (a.seconds, b, c or [float("nan")], d)), strict=True))
    shares = [medians["suite"] / medians["floor"], medians["spawn"] / medians["suite"], whole_d / a.whole]
    row = [str(world), *map(_spread, (a.seconds, b, c or [float("nan")], d)), *(f"{share:.2f}" for share in shares)]
    return row, [str(world), *_parts(a), f"{a.memory:.2f}"], medians


INSIDE = ("groups", "models", "rollout", "experience", "dispatch", "update")  # of the ranks
STAGES = (*INSIDE, "gather", "waiting", "twin", "laws", "drawing")


def _parts(a: Suite) -> list[str]:
    """Mean milliseconds per case. `gather`: what the ranks take beyond their stages, for calls and packing; `waiting`:
    for the reference, once they are done. What the reference takes beside them comes last.
    """
    number = len(a.verdicts)
    names = (*STAGES, "ranks", "reference")
    means = {name: sum(v.seconds.get(name, 0.0) for v in a.verdicts) / number for name in names}
    inside = sum(means[name] for name in INSIDE)
    means |= {"gather": means["ranks"] - inside, "drawing": a.drawing}
    return [f"{1000 * means[name]:.0f}" for name in (*STAGES, "reference")]


def chart(found: Mapping[int, Mapping[str, float]], file: str) -> None:
    """Bars of the medians, in seconds, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, way in enumerate(WAYS):
        places = [at + 0.2 * (i - 1.5) for at in range(len(found))]
        bars = axes.bar(places, [medians[way] for medians in found.values()], 0.2, label=way)
        axes.bar_label(bars, fmt="{:.2g}", fontsize=8)
    axes.set_xticks(range(len(found)), [f"{world} rank{'s' * (world > 1)}" for world in found])
    axes.set(yscale="log", ylabel="seconds per case, median", title="A generated PPO case, four ways")
    axes.margins(y=0.15)
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=one_or_more, default=NUMBER)
    parser.add_argument("--spawned", type=one_or_more, default=2)
    parser.add_argument("--ranks", type=some_of((1, 2, 4, 8)), default="1,2,4,8")
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--png", metavar="OUT")
    asked = parser.parse_args()
    began = time.perf_counter()
    forking.warm_up()
    trials = Trials(plants=known.mends())
    trials.judge(Case())
    trials.close()
    first, found = time.perf_counter() - began, {}
    ways: Any = Table(
        "ranks", "suite", "floor", "spawn", "multiproc", "a/b", "c/a", "d/a", title="median / p90 seconds"
    )
    parts: Any = Table("ranks", *STAGES, "(reference)", "GiB", title="where the suite's time goes: mean ms per case")
    for world in asked.ranks:
        row, where, found[world] = measure(world, asked.cases, asked.spawned)
        ways.add_row(*row)
        parts.add_row(*where)
    Console(width=140).print(ways, parts, f"first verdict after {first:.1f} s")
    if asked.json:
        Path(asked.json).write_text(json.dumps({"ranks": {str(w): medians for w, medians in found.items()}}, indent=1))
    if asked.png:
        chart(found, asked.png)


if __name__ == "__main__":
    main()
