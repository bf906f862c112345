"""Runs a broken configuration inside a rank, and tells where megatron refused it, or what came out where it did not.

The case's own step runs (`fuzz.drive`); the overrides are put between the trainer and megatron-core, into the arguments
of the very calls that the trainer makes. Knows the system under test; no Hypothesis, no laws, no other ranks.
"""

import ast
import contextlib
import linecache
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from megatron.core import parallel_state

from fuzz import drive, pulse
from fuzz.broken import Broken
from toy_models import batching, megatron, megatron_config, passes
from toy_models.releases import schedule_of

CALLED = {
    "groups": (parallel_state, "initialize_model_parallel"),
    "config": (megatron_config, "TransformerConfig"),
    "gpt": (megatron, "GPTModel"),
    "ddp": (megatron, "DistributedDataParallelConfig"),
    "optimizer": (megatron, "OptimizerConfig"),
}
OURS = ("/toy_models/", "/fuzz/drive.py", "/fuzz/probe.py")
DTYPES = {"torch.float32": torch.float32, "torch.float64": torch.float64}


def attempt(
    progress: Callable[[str], None], broken: Broken, forced: Mapping[int, Mapping] | None = None
) -> dict[str, Any]:
    """The step of the case under its overrides; the fact `refused` says how it ended where it raised."""
    began: dict[str, int] = {}

    def entered(stage: str) -> None:
        began.setdefault(stage, pulse.own.issued if pulse.own else 0)
        progress(stage)

    with contextlib.ExitStack() as stack:
        if broken.of("groups"):
            stack.enter_context(drive.groups_apart())
        stack.enter_context(_overridden(broken))
        try:
            return drive.step(entered, broken.case, forced)
        except Exception as error:
            phase = list(began)[-1]
            return {"facts": {"refused": refusal_of(error, phase, began[phase])}}


# ---- overrides -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _overridden(broken: Broken) -> Iterator[None]:
    """While open, megatron's functions get what the overrides say in place of what the trainer gives them."""
    fronts: list[tuple[Any, str, Any]] = [
        (module, name, partial(_changed, getattr(module, name), _plain(broken.of(owner))))
        for owner, (module, name) in CALLED.items()
    ]
    schedule, wider = (
        partial(_schedule, schedule_of, _plain(broken.of("schedule"))),
        broken.of("inputs"),
    )
    fronts.append((passes, "schedule_of", schedule))
    if wider:
        fronts += [(owner, "padded_width", lambda *_: wider["width"]) for owner in (batching, megatron)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in fronts]
    try:
        for owner, name, front in fronts:
            setattr(owner, name, front)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _changed(function: Callable, overrides: Mapping[str, Any], /, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **{**kwargs, **overrides})


def _schedule(choose: Callable, overrides: Mapping[str, Any], /, *degrees: int | None) -> Callable:
    return partial(_changed, choose(*degrees), overrides)


def _plain(value: Any) -> Any:
    """Tuples as the lists that megatron wants, names of dtypes as dtypes."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return DTYPES.get(value, value) if isinstance(value, str) else value


# ---- how it was refused ----------------------------------------------------------------------------------------


def refusal_of(error: Exception, phase: str, issued: int) -> dict[str, Any]:
    """Phase, exception, message, place, whether a check raised it, whose, and the calls issued in this phase before."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    inside = [frame for frame in frames if "megatron/core/" in frame.filename]
    place = inside[-1] if inside else last
    return {
        "phase": phase,
        "exception": type(error).__name__,
        "message": str(error).partition("when instantiating")[0].strip(),  # what megatron adds to every message
        "place": f"{_below(place.filename)}:{place.lineno}",
        "function": place.name,
        "line": (place.line or "").strip(),
        "check": "megatron/core/" in last.filename and _is_check(error, last.filename, last.lineno or 0),
        "ours": _ours(last.filename),
        "issued": issued,
        "traceback": "".join(traceback.format_list(frames[-6:])),
    }


def _below(filename: str) -> str:
    for root in ("megatron/core/", "/torch/", "/toy_models/"):
        _, found, below = filename.rpartition(root)
        if found:
            return below if root == "megatron/core/" else found.strip("/") + "/" + below
    return filename.rpartition("/")[2]


def _ours(filename: str) -> bool:
    return any(part in filename for part in OURS)


def _is_check(error: Exception, filename: str, line: int) -> bool:
    """Whether the line belongs to a raise, or to an assert whose condition did not hold."""
    kinds = {kind for first, last, kind in _checks(filename) if first <= line <= last}
    return ast.Raise in kinds or (ast.Assert in kinds and isinstance(error, AssertionError))


@cache
def _checks(filename: str) -> list[tuple[int, int, type]]:
    """First and last line of every raise and assert of a file."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return []
    found = [node for node in ast.walk(tree) if isinstance(node, (ast.Raise, ast.Assert))]
    return [(node.lineno, node.end_lineno or node.lineno, type(node)) for node in found]
