"""Case files as a stranger might write them: deterministic random mutations of valid ones. Knows JSON only."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, 4, -1, 0.5, 1.0, -0.0, 1e308, 2**31, 2**63, 10**19, 10**40,
    float("nan"), float("inf"), "", "1", "alltoall", "again", "adam", "a\nb", "\ud800", "x" * 500,
    [], {}, [[]], ["Rollout"], ["Rollout"] * 50,
    {"world": 2}, [None] * 1000,
)  # fmt: skip
MORE = ("{", "}", "[", "]", ",", ":", '"', "0", "-", "e999", "NaN", "\\", "\n", "\x00", "\ufeff", "null", "9" * 30)


def mutated(texts: Sequence[str], number: int) -> Iterator[str]:
    """`number` texts, each one of `texts` after one to three mutations; the same ones every time."""
    random = Random(0)
    for _ in range(number):
        yield mutant(random, random.choice(texts))


def mutant(random: Random, text: str) -> str:
    """A text after one to three mutations."""
    return _of_data(random, text) if random.random() < 0.7 else random.choice(TEXT)(random, text)


def _of_data(random: Random, text: str) -> str:
    data = json.loads(text)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        objects = [data, *(value for value in data.values() if isinstance(value, dict) and value)]
        random.choice(DATA)(random, random.choice(objects))
        data = data or {"schema": 1}
    return json.dumps(data, indent=random.choice((None, 2)))


def _drop(random: Random, data: dict[str, Any]) -> None:
    data.pop(random.choice(list(data)))


def _rename(random: Random, data: dict[str, Any]) -> None:
    name = random.choice(list(data))
    data[random.choice((name.upper(), name + " ", "__class__", "x" * 300, "\n"))] = data.pop(name)


def _replace(random: Random, data: dict[str, Any]) -> None:
    data[random.choice(list(data))] = copy.deepcopy(random.choice(VALUES))


def _swap(random: Random, data: dict[str, Any]) -> None:
    one, other = random.choice(list(data)), random.choice(list(data))
    data[one], data[other] = data[other], data[one]


def _nudge(random: Random, data: dict[str, Any]) -> None:
    """A number a little off: where most valid mutants come from."""
    numbers = [name for name, value in data.items() if type(value) in (int, float)]
    if numbers:
        data[random.choice(numbers)] *= random.choice((2, 0.5, 1.5, -1, 4))


def _truncate(random: Random, text: str) -> str:
    return text[: random.randrange(len(text))]


def _duplicate(random: Random, text: str) -> str:
    lines = text.splitlines(keepends=True)
    place = random.randrange(len(lines))
    return "".join([*lines[:place], lines[place].rstrip("\n,") + ",\n", *lines[place:]])


def _splice(random: Random, text: str) -> str:
    start = random.randrange(len(text))
    return text[:start] + random.choice(MORE) + text[start + random.randrange(4) :]


def _deepen(random: Random, text: str) -> str:
    depth = random.choice((3, 100, 900, 960, 985, 990, 1000, 5000))
    opened, closed = random.choice((("[", "]"), ('{"a": ', "}")))
    field = random.choice(('"seed": ', '"twin": ', '"schema": ', '"program": ', '"hidden": ', '"world": '))
    return text.replace(field, f"{field}{opened * depth}1{closed * depth}, {field}"[: random.choice((None, -10))], 1)


def _lengthen(random: Random, text: str) -> str:
    return text + random.choice((" ", "\n", "0", "[")) * random.choice((10, 1000, 100_000))


DATA: tuple[Callable[[Random, dict[str, Any]], None], ...] = (_drop, _rename, _replace, _replace, _swap, _nudge)
TEXT: tuple[Callable[[Random, str], str], ...] = (_truncate, _duplicate, _splice, _splice, _deepen, _lengthen)
