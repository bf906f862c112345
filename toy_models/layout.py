"""A layout: degrees of parallelism, the order of ranks, and how the layers of a pipeline are cut. Stdlib only.

Knows no model: whether the layers are as many is for `toy_models.spec` to check.
"""

from dataclasses import dataclass

from toy_models.checks import MOST, check_choice, check_counts, require

# How a pipeline is asked for that is not cut evenly: num_layers_in_first/last_pipeline_stage, account_for_embedding (or
# loss, or both) _in_pipeline_split, pipeline_model_parallel_layout.
SPLITS = ("even", "ends", "embedding", "loss", "both", "list")
AXES = ("tp", "cp", "ep", "dp", "pp")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism: TP·CP·PP·DP = ETP·EP·PP·EDP = world. `vpp` counts virtual stages per pipeline rank.

    Attention and dense weights split over `tp`, expert weights over `etp`, experts over `ep`. `order` names the axes of
    ranks, the fastest first. `stages` has the layers of each of the pp·vpp stages in the order of the model, where they
    are not cut evenly, and `split` by which of megatron's options that is asked for (SPLITS).
    """

    world: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    order: str = "-".join(AXES)
    split: str = "even"
    stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_counts(self, world=1, tp=1, pp=1, vpp=1, cp=1, ep=1, etp=1)
        dense, expert = self.tp * self.cp * self.pp, self.etp * self.ep * self.pp
        require(
            self.world % dense == 0,
            f"world={self.world} is not a multiple of tp*cp*pp={self.tp}*{self.cp}*{self.pp}={dense}",
        )
        require(
            self.world % expert == 0,
            f"world={self.world} is not a multiple of etp*ep*pp={self.etp}*{self.ep}*{self.pp}={expert}",
        )
        require(self.vpp == 1 or self.pp > 1, f"vpp={self.vpp} needs pp > 1, but pp={self.pp}")
        self._check_order()
        self._check_split()

    def _check_order(self) -> None:
        axes = self.order.split("-") if isinstance(self.order, str) else []
        require(sorted(axes) == sorted(AXES), f"order={self.order!r} must name each of {', '.join(AXES)} once")
        require(
            axes[-1] == "pp" or self.pp == 1 or self.dp == self.edp,
            f"order={self.order!r} with pp={self.pp} not last needs dp = edp, got dp={self.dp}, edp={self.edp}",
        )

    def _check_split(self) -> None:
        check_choice(self, split=SPLITS)
        counts, number = self.stages, self.pp * self.vpp
        whole = isinstance(counts, tuple) and all(type(n) is int and 0 <= n <= MOST["layers"] for n in counts)
        require(whole, f"stages={counts!r} must be a tuple of ints of 0..{MOST['layers']}")
        if self.split == "even":
            return require(not counts, f"stages={counts} are not cut evenly: split must be one of {SPLITS[1:]}")
        asked = f"split={self.split!r}, stages={counts}"
        require(
            self.pp > 1 and len(counts) == number, f"{asked}: {number} stages are there, pp*vpp={self.pp}*{self.vpp}"
        )
        require(_divides(self, counts), f"{asked} is not what that option of megatron gives")

    @property
    def dp(self) -> int:
        """Data-parallel size of the dense weights."""
        return self.world // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel size of the expert weights."""
        return self.world // (self.etp * self.ep * self.pp)


def _divides(layout: Layout, counts: tuple[int, ...]) -> bool:
    """Whether an option of megatron can give these stages: alike but for the ends, or with what counts as a layer."""
    if layout.split == "list":
        return True
    if layout.split == "ends":
        by_rank = [set(counts[rank :: layout.pp]) for rank in range(layout.pp)]
        middle = set().union(*by_rank[1:-1])
        return all(len(one) == 1 for one in by_rank) and len(middle) <= 1 and 0 not in counts
    first, last = layout.split in ("embedding", "both"), layout.split in ("loss", "both")
    return len({counts[0] + first, *counts[1:-1], counts[-1] + last}) == 1
