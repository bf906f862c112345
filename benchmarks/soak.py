"""Generated cases in a row, judged by all laws, unshrunk: `python benchmarks/soak.py [--cases 500] [--seconds 600]`.

Prints every violation and ill-conditioned case, then the summary; exit code 1 where a law was broken or never fired.
"""

import argparse
import sys
import time

from asked import one_or_more
from hypothesis import HealthCheck, given, seed, settings
from rich.console import Console
from rich.progress import track

from fuzz import known, laws, summary
from fuzz.case import Case
from fuzz.strategies import cases
from fuzz.trial import Trials

LEAST = 20  # cases in which every law must have had something to check


def drawn(number: int, start: int, most: int) -> list[Case]:
    """`number` cases of the dev strategies from one seed."""
    found: list[Case] = []

    @seed(start)
    @settings(max_examples=number, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(max_ranks=most))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=one_or_more, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-ranks", type=one_or_more, default=4)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so many")
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    tally: summary.Tally = {}
    trials, broken, run = Trials(plants=known.mends()), 0, 0
    for case in track(drawn(asked.cases, asked.seed, asked.max_ranks), description="cases"):
        if time.monotonic() > until:
            break
        run += 1
        verdict = trials.judge(case)
        summary.count(tally, verdict)
        if verdict.violation is not None:
            broken += 1
            print(verdict.violation)
        elif verdict.ill_conditioned:
            print(f"ill-conditioned: {case!r}")
    trials.close()
    summary.write(tally, Console(width=110))
    rare = ", ".join(law for law in laws.NAMES if tally["fired"].get(law, 0) < LEAST)
    print(f"{broken} of {run} cases broke a law; laws that fired in fewer than {LEAST}: {rare or 'none'}")
    return int(bool(broken or rare))


if __name__ == "__main__":
    sys.exit(main())
