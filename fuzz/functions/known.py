"""Functions of released megatron-core that do not keep what they promise: which calls, and which law they break.

As `fuzz.known_refusals`: there is nothing to mend. Knows calls; no torch, no ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fuzz.case import Violation
from fuzz.functions.call import Call
from fuzz.known import SUPPORTED, version


@dataclass(frozen=True)
class Known:
    """One finding: `covers` tells whether a call meets it, `laws` are what such calls break, the example the first.

    `fatal`: its calls hang or die, and are made in the example alone.
    """

    id: str
    page: str
    covers: Callable[[Call], bool]
    laws: tuple[str, ...]
    example: Call
    fatal: bool = False
    lives: tuple[str, ...] = ("0.16.1",)


KNOWN: tuple[Known, ...] = ()


def living() -> tuple[Known, ...]:
    """The findings of the installed megatron-core; of an unsupported one, those of the newest supported."""
    here = version() if version() in SUPPORTED else SUPPORTED[-1]
    return tuple(entry for entry in KNOWN if here in entry.lives)


def met(call: Call, violation: Violation) -> str:
    """The id of the living finding that a violation is; '' where it is none."""
    return next((one.id for one in living() if violation.law in one.laws and one.covers(call)), "")


def fatal(call: Call) -> str:
    """The id of the living finding of which a call would hang or die; '' where there is none."""
    return next((one.id for one in living() if one.fatal and one.covers(call)), "")
