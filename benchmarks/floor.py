"""The floor of a case: the same PPO iteration inside ranks that stay up, nothing observed, nothing judged.

Called in ranks by `benchmarks/bench.py`. Groups are made once per layout and models before the clock starts; what is
timed is rollout, experience and updates alone, of a case and of its twin if it has one.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from fuzz import drive, pulse
from fuzz.case import Case, Rollout, twin_of
from toy_models import megatron, ppo, precision, sampling
from toy_models.experience import gather_experience
from toy_models.weights import ROLES


def start(rank: int, world: int, store_path: str, plants: tuple[str, ...]) -> None:
    """As the suite's ranks, but no collective is recorded."""
    published, pulse.own = pulse.own, None
    drive.start(rank, world, store_path, plants)
    pulse.own = published


def loop(progress: Callable[[str], None], cases: Sequence[Case]) -> dict[str, Any]:
    """Seconds of every case, the slowest way through its own barriers included."""
    return {"facts": {"seconds": [_timed(progress, case) for case in cases]}}


def _timed(progress: Callable[[str], None], case: Case) -> float:
    return sum(_iterations(progress, each) for each in ([case, twin_of(case)] if case.twin else [case]))


def _iterations(progress: Callable[[str], None], case: Case) -> float:
    progress("floor")
    with precision.keep_float64(case.precision == "float64"):
        groups = drive.groups_of(case, drive.Seen(progress))
        roles = {name: megatron.make_role(case, name, groups) for name in ROLES}
        dist.barrier()
        began, iteration, experience = time.perf_counter(), -1, None
        for operation in case.program:
            if isinstance(operation, Rollout):
                iteration += 1
                rollout = sampling.roll_out(case, roles["actor"], iteration, {})
                experience = gather_experience(case, roles, rollout)
            elif experience is not None:
                ppo.update(case, roles, experience, lambda *_: None)
        dist.barrier()
        return time.perf_counter() - began
