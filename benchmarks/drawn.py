"""The fixed list of cases that the benchmarks run: `benchmarks/cases.json`, drawn once by the dev profile's strategies.

`python benchmarks/drawn.py` draws it anew: 20 cases for each of 1, 2, 4 and 8 ranks, the smallest left out, which
Hypothesis tries first.
"""

import json
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

from fuzz.case import Case
from fuzz.case_json import from_json, to_json
from fuzz.strategies import cases

FILE = Path(__file__).with_name("cases.json")
WORLDS, NUMBER = (1, 2, 4, 8), 20


def drawn(world: int, number: int) -> list[Case]:
    """The same `number` cases every time."""
    found: list[Case] = []

    @settings(
        max_examples=number + 1, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases(world=world))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found[1:]


def listed(world: int, most: int = NUMBER) -> list[Case]:
    """The first `most` cases of the list for this many ranks."""
    return [from_json(json.dumps(case)) for case in json.loads(FILE.read_text())[str(world)][:most]]


if __name__ == "__main__":
    found = {str(world): [json.loads(to_json(case)) for case in drawn(world, NUMBER)] for world in WORLDS}
    lines = (f'"{world}": [\n' + ",\n".join(map(json.dumps, some)) + "\n]" for world, some in found.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
