"""How a bug is planted: functions wrapped, or their source rewritten, where they are used. Knows no bug by itself.

Every helper fails loudly where it does not find what it changes, so that no version change makes a bug a no-op.
"""

import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any


def _source(function: Any) -> str:
    """As in the file; of a function that was rewritten before, as it is now."""
    return getattr(function, "rewritten", None) or textwrap.dedent(inspect.getsource(function))


def rewrite(owner: Any, name: str, *edits: tuple[str, str]) -> None:
    """Replace `owner.name`, a module's function or a class's method, by its source with each old text made new.

    Each old text must occur once. Zero-argument super() works; other free variables do not.
    """
    found = inspect.getattr_static(owner, name)
    function = found.__func__ if isinstance(found, staticmethod) else inspect.unwrap(found)
    source = _source(function)
    for old, new in edits:
        assert source.count(old) == 1, f"{owner.__name__}.{name} has {old!r} {source.count(old)} times, not once"
        source = source.replace(old, new)
    setattr(owner, name, _compiled(source, owner, name, function))


def rewrite_everywhere(owner: Any, name: str, *edits: tuple[str, str]) -> None:
    """As `rewrite`, for a function that other modules of megatron-core have taken by value."""
    original = getattr(owner, name)
    rewrite(owner, name, *edits)
    users = [module for at, module in sys.modules.items() if at.startswith("megatron.core")]
    for module in [module for module in users if getattr(module, name, None) is original]:
        setattr(module, name, getattr(owner, name))


def _compiled(source: str, owner: Any, name: str, function: Any) -> Any:
    above = "\n" * (function.__code__.co_firstlineno - 2)  # tracebacks name the lines of the file
    wrapped = f"{above}def _made(__class__):\n{textwrap.indent(source, '    ')}\n    return {name}\n"
    made: dict[str, Callable] = {}
    exec(compile(wrapped, function.__code__.co_filename, "exec"), function.__globals__, made)
    function = made["_made"](owner)
    function.rewritten = source
    return function


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace `owner.name` by a call of `around(original, *args, **kwargs)`."""
    assert hasattr(owner, name), f"{owner.__name__} has no {name}"
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, staticmethod(wrapped) if _static(owner, name) else wrapped)


def _static(owner: Any, name: str) -> bool:
    return isinstance(inspect.getattr_static(owner, name), staticmethod)


def after_init(owner: type, then: Callable[[Any], None]) -> None:
    """Call `then(instance)` when an instance of `owner` has been made."""

    def around(original: Callable, self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        then(self)

    wrap(owner, "__init__", around)
