"""What a reading comes to, for tables and pages: rows of words and numbers. Knows what can meet; writes nothing."""

from collections import defaultdict
from collections.abc import Iterator

from fuzz import meetings
from fuzz.deep.discovery import degrees
from fuzz.deep.reading import Reading
from fuzz.space import all_layouts, worlds


def summary(reading: Reading) -> Iterator[tuple[str, str]]:
    """The head of a report: verdict, cases, rate, time, shards, layouts, pairs and triples, by name."""
    cases, began = sum(reading.kinds.values()), reading.sessions
    yield "verdict", reading.verdict()
    yield "cases", f"{cases}: " + (", ".join(f"{n} {kind}" for kind, n in sorted(reading.kinds.items())) or "none yet")
    yield "became of them", outcomes(reading)
    yield "cases per second", f"{cases / reading.seconds:.2f}" if reading.seconds else "-"
    budget = began[-1][2] if began else 0.0
    yield "time", f"{length(reading.seconds)} of {length(budget)}, in {len(began)} run{'s' * (len(began) != 1)}"
    yield "shards", f"{began[-1][3] if began else 0}, {'running' if reading.running else 'none running'}"
    yield "layouts", ", ".join(f"{seen} of {there} at {world}" for world, seen, there in layouts(reading))
    yield from _met(reading)
    vacuous = [law.replace("_", " ") for law, (fired, _) in reading.laws.items() if not fired]
    yield "laws", f"{len(reading.laws) - len(vacuous)} fired, {len(vacuous)} vacuous: {', '.join(vacuous) or 'none'}"
    yield "faults of the harness", str(reading.faults)


def outcomes(reading: Reading) -> str:
    """Cases by what became of them."""
    number: dict[str, int] = defaultdict(int)
    for (_, outcome), n in reading.outcomes.items():
        number[outcome] += n
    return ", ".join(f"{n} {outcome}" for outcome, n in sorted(number.items(), key=lambda one: -one[1])) or "-"


def layouts(reading: Reading) -> list[tuple[int, int, int]]:
    """World, layouts visited in it, layouts that there are."""
    visited: dict[int, int] = defaultdict(int)
    for cell in reading.cells:
        visited[degrees(cell)["world"]] += 1
    return [(world, visited[world], len(all_layouts(world))) for world in worlds(max_ranks(reading))]


def max_ranks(reading: Reading) -> int:
    """The largest world that was asked for."""
    return int(reading.meta.get("max_ranks", 1))


def _met(reading: Reading) -> Iterator[tuple[str, str]]:
    ranks = max_ranks(reading)
    for kind, possible in (("pair", meetings.pairs(ranks)), ("triple", meetings.threes(ranks))):
        met = reading.seen.get(kind, 0)
        yield f"{kind}s", f"{met} of {len(possible)} ({met / len(possible):.1%})"


def length(seconds: float) -> str:
    """A time as `2h05m`, `3m20s`, `45s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def where(reading: Reading) -> list[tuple[str, int, int, float, float]]:
    """Where the time went: kind of chunk, chunks, cases, seconds, and what was new per minute."""
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0, 0.0])
    for arm, _, seconds, cases, worth, *_ in reading.chunks:
        row = rows[" ".join(arm.split()[:2])]
        for n, value in enumerate((1, cases, seconds, worth)):
            row[n] += value
    found = [(name, int(n), int(cases), s, 60 * worth / s if s else 0.0) for name, (n, cases, s, worth) in rows.items()]
    return sorted(found, key=lambda row: -row[3])
