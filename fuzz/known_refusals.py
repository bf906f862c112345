"""Broken configurations that released megatron-core does not refuse as it should: which, and which law they break.

Like `fuzz.known`, for what is no Case. Knows broken configurations; no torch, no ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fuzz.broken import Broken
from fuzz.case import Violation


@dataclass(frozen=True)
class Known:
    """One finding: `lives` are the versions that have it, `covers` whether a configuration meets it, `laws` it breaks."""

    id: str
    reference: str
    lives: tuple[str, ...]
    covers: Callable[[Broken], bool]
    laws: tuple[str, ...]
    example: Broken


KNOWN: tuple[Known, ...] = ()


def met(broken: Broken, violation: Violation) -> str:
    """The id of the known finding that a violation is; '' where it is new."""
    return next((one.id for one in KNOWN if violation.law in one.laws and one.covers(broken)), "")
