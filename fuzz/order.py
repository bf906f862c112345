"""Which of two cases is the simpler one: fewest ranks, then layout, experts, top-k, layers, tokens, steps, switches.

The order in which `strategies` draws, so that what Hypothesis shrinks to is the smallest in this order too, as far as
it gets. Knows the parts of a case; no Hypothesis, no ranks.
"""

from dataclasses import fields
from typing import Any

from fuzz.case import Case
from fuzz.space import VALUES, complexity, values_of

SIZES = (
    "world",
    "tp",
    "pp",
    "vpp",
    "cp",
    "ep",
    "etp",
    "experts",
    "top_k",
    "layers",
    "rows",
    "prompt",
    "response",
    "micro_rows",
)
STEPS = ("mini_batches", "epochs")
WIDTHS = ("hidden", "heads", "kv_heads", "head_dim", "ffn", "shared_ffn", "vocab", "dense_ffn")


def size(case: Case) -> tuple:
    """A tuple that is smaller for the simpler case; equal for equal cases only."""
    model, batch, ppo = case.model, case.batch, case.ppo
    degrees = (case.layout.world, *complexity(case.layout), case.layout.vpp)
    sizes = (model.experts, model.top_k, model.layers)
    tokens = (micro_batches(case), batch.micro_rows, batch.prompt, batch.response)
    steps = (len(case.program), ppo.mini_batches, ppo.epochs)
    widths = tuple(getattr(model, name) for name in WIDTHS)
    return (*degrees, *sizes, *tokens, *steps, len(switched(case)), places(case), widths, case.seed, repr(case))


def micro_batches(case: Case) -> int:
    """Micro-batches of one mini-batch on one data-parallel rank."""
    return case.batch.rows // (case.ppo.mini_batches * case.layout.dp * case.batch.micro_rows)


def switched(case: Case) -> list[str]:
    """The settings that differ from their defaults: what is neither size, nor width, nor seed."""
    counted = {*SIZES, *STEPS, *WIDTHS, "program", "seed"}
    return [name for name, (value, default) in _settings(case).items() if name not in counted and value != default]


def places(case: Case) -> tuple[int, ...]:
    """Of every setting how far down its list the value stands; one that is not drawn stands last."""
    bags = {name: values_of(name, case.ppo.optimizer, case.precision) for name in (*VALUES, "eps")}
    values = _settings(case)
    return tuple(bag.index(values[name][0]) if values[name][0] in bag else len(bag) for name, bag in bags.items())


def _settings(case: Case) -> dict[str, tuple[Any, Any]]:
    """Every field with its value and its default."""
    parts = (case.layout, case.model, case.batch, case.ppo, case.switches)
    found = {f.name: (getattr(part, f.name), f.default) for part in parts for f in fields(part)}
    return found | {name: (getattr(case, name), getattr(Case, name)) for name in ("twin", "precision")}
