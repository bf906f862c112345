"""One known bug of megatron-core as a value. Knows cases; no torch, no ranks."""

from collections.abc import Callable
from dataclasses import dataclass

from fuzz.case import Case


@dataclass(frozen=True)
class Known:
    """One bug: `lives` are the supported versions that have it, `covers` tells whether a case meets it."""

    id: str
    upstream: str
    lives: tuple[str, ...]
    covers: Callable[[Case], bool]
    law: str
    mend: str
    example: Case
