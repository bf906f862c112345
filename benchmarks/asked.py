"""Numbers on the command lines of the benchmarks."""

import argparse
import contextlib
from collections.abc import Callable, Sequence


def one_or_more(text: str) -> int:
    """An integer from 1 on; argparse says what is wrong with any other, in one line, and ends with exit code 2."""
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"{text} must be an integer, 1 or more")


def some_of(known: Sequence[int]) -> Callable[[str], list[int]]:
    """Reads a list such as `1,2,4`, each one of `known`."""

    def read(text: str) -> list[int]:
        with contextlib.suppress(ValueError):
            if set(numbers := [int(part) for part in text.split(",")]) <= set(known):
                return numbers
        raise argparse.ArgumentTypeError(f"{text} must be some of {','.join(map(str, known))}")

    return read
