"""One call of one public function of megatron-core, by all ranks of a layout: a frozen value of plain data.

Knows layouts; no torch, no megatron-core, no Hypothesis. What the arguments mean is said where the function's promise
stands (`fuzz.functions.mappings` and its neighbours).
"""

from dataclasses import dataclass
from typing import Any

from fuzz.case import short
from toy_models.coordinates import GROUPS, groups
from toy_models.spec import Layout

DTYPES = ("float64", "float32", "bfloat16", "int64", "bool")


@dataclass(frozen=True, kw_only=True, repr=False)
class Call:
    """`function` is "family.name"; `rows` has the first dimension of each rank's tensor; `group` is one of GROUPS.

    Tensors follow from dtype, rows, arguments and seed (`fuzz.functions.inputs`). `repr` leaves out defaults and
    evaluates back to an equal Call. ValueError for a group, dtype or number of rows that cannot be.
    """

    function: str
    layout: Layout = Layout()
    arguments: tuple[tuple[str, Any], ...] = ()
    dtype: str = "float64"
    rows: tuple[int, ...] = (1,)
    contiguous: bool = True
    group: str = "tp"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"group={self.group!r} is unknown; choose one of {', '.join(GROUPS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        if len(self.rows) != self.layout.world or min(self.rows) < 0:
            raise ValueError(f"rows={self.rows} must have world={self.layout.world} numbers of 0 or more")

    __repr__ = short

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis prints what was drawn in this form."""
        printer.text(repr(self))

    def __getitem__(self, name: str) -> Any:
        """The value of an argument."""
        return dict(self.arguments)[name]

    @property
    def world(self) -> int:
        return self.layout.world

    def members(self, rank: int, kind: str = "") -> list[int]:
        """The ranks of the group of a rank, in the group's order; of another kind of group where one is given."""
        return next(found for found in groups(self.layout, kind or self.group) if rank in found)

    def place(self, rank: int, kind: str = "") -> int:
        """Where a rank stands in its group."""
        return self.members(rank, kind).index(rank)


def size(call: Call) -> tuple:
    """A tuple that is smaller for the simpler call."""
    layout = call.layout
    degrees = layout.tp * layout.cp * layout.pp, layout.ep * layout.etp
    return layout.world, degrees, sum(call.rows), not call.contiguous, DTYPES.index(call.dtype), repr(call)
