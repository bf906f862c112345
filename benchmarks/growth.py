"""How the time of a case grows: `python benchmarks/growth.py [--png growth.png] [--json growth.json] [--repeat 5]`.

One dimension grows, all else stays: ranks (data parallel, and expert parallel), tokens of the response, rows, layers,
experts, mini-batches. Printed are medians in seconds and the slope, d log(seconds) / d log(size) between the last two
sizes: 1 is what work that is proportional gives, 2 what is quadratic; attention and rollouts (which run the whole
prefix again for each token) are quadratic in tokens by their arithmetic. Beyond two ranks on two cores, ranks share.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping

from asked import one_or_more
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fuzz import forking, known
from fuzz.case import Case
from fuzz.trial import Trials
from toy_models.spec import PPO, Batch, Layout, MoEModel

EP2 = Layout(world=2, ep=2)
GROWN: Mapping[str, tuple[tuple[int, ...], Callable[[int], Case]]] = {
    "ranks, data parallel": (
        (1, 2, 4, 8, 16),
        lambda n: Case(layout=Layout(world=n), batch=Batch(rows=n, prompt=3, response=3)),
    ),
    "ranks, expert parallel": (
        (1, 2, 4, 8, 16),
        lambda n: Case(
            layout=Layout(world=n, ep=n), model=MoEModel(experts=16), batch=Batch(rows=n, prompt=3, response=3)
        ),
    ),
    "response tokens": (
        (2, 4, 8, 16, 32),
        lambda n: Case(layout=EP2, batch=Batch(rows=2, prompt=2, response=n)),
    ),
    "rows": (
        (2, 4, 8, 16, 32),
        lambda n: Case(layout=EP2, batch=Batch(rows=n, prompt=3, response=3, micro_rows=n // 2)),
    ),
    "layers": (
        (1, 2, 4, 8, 16),
        lambda n: Case(layout=EP2, model=MoEModel(layers=n), batch=Batch(rows=2, prompt=3, response=3)),
    ),
    "experts": (
        (2, 4, 8, 16, 32),
        lambda n: Case(layout=EP2, model=MoEModel(experts=n), batch=Batch(rows=2, prompt=3, response=3)),
    ),
    "mini-batches": (
        (1, 2, 4, 8, 16),
        lambda n: Case(
            layout=EP2, batch=Batch(rows=32, prompt=3, response=3, micro_rows=1), ppo=PPO(mini_batches=n)
        ),
    ),
}  # fmt: skip


def measured(trials: Trials, case: Case, repeat: int) -> float:
    """The median of several runs in warm pools, each with a seed of its own, so that no reference is known."""
    seconds = []
    for seed in range(repeat + 1):
        began = time.perf_counter()
        verdict = trials.judge(Case(**{**vars(case), "seed": seed}))
        seconds.append(time.perf_counter() - began)
        assert verdict.violation is None, verdict.violation
    return statistics.median(seconds[1:])


def slope(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """Of the last two sizes on logarithmic axes."""
    return math.log(seconds[-1] / seconds[-2]) / math.log(sizes[-1] / sizes[-2])


def plot(found: Mapping[str, list[float]], file: str) -> None:
    """Seconds against size, both logarithmic; a grey line is proportional growth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    for place, (name, seconds) in enumerate(found.items(), 1):
        axes, sizes = figure.add_subplot(2, 4, place), GROWN[name][0]
        axes.loglog(sizes, [seconds[-1] * n / sizes[-1] for n in sizes], color="0.8", label="proportional")
        axes.loglog(sizes, seconds, "o-", label=f"slope {slope(sizes, seconds):.2f} at the end")
        axes.set(title=name, ylabel="seconds per case")
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.minorticks_off()
        axes.set_ylim(0.5 * min(seconds), 2 * max(seconds))
        axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
        axes.set_ylim(0.5 * min(seconds), 2 * max(seconds))
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=one_or_more, default=5)
    parser.add_argument("--png", metavar="OUT")
    parser.add_argument("--json", metavar="OUT")
    asked = parser.parse_args()
    forking.warm_up()
    trials, found = Trials(plants=known.mends()), {}
    for name, (sizes, case) in track(GROWN.items(), description="growth"):
        found[name] = [measured(trials, case(size), asked.repeat) for size in sizes]
    trials.close()
    table: Table = Table("what grows", "sizes", "median seconds", "slope")
    for name, seconds in found.items():
        sizes = GROWN[name][0]
        told = " ".join(f"{x:.2f}" for x in seconds)
        table.add_row(name, " ".join(map(str, sizes)), told, f"{slope(sizes, seconds):.2f}")
    Console(width=110).print(table)
    if asked.png:
        plot(found, asked.png)
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump({name: dict(zip(GROWN[name][0], seconds, strict=True)) for name, seconds in found.items()}, file)


if __name__ == "__main__":
    main()
