"""Shards as Ray actors, each in a placement group of its own; the ledger as an actor where the campaign's folder is.

Knows Ray, which is imported when a cluster is asked for. Knows nothing of cases, chunks, Hypothesis.

Ray's own processes: with no address a Ray of this machine alone, bound to 127.0.0.1, without dashboard and usage
report. It ends with this process however that ends, and ranks end with their shard (`fuzz.forking`).
"""

import contextlib
import math
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz.deep.ledger import Ledger, Plan

CPUS_PER_RANK = 0.25  # ranks of tiny models wait for one another most of the time: 4 share a CPU with their parent
OBJECTS = 100 * 2**20  # bytes of Ray's object store: what travels is small
START = 60.0  # seconds for an actor to come up
KNOCK = 5.0  # seconds for a cluster to accept a connection
ANSWER = 60.0  # seconds for an answer of the ledger
FAREWELL = 10.0  # seconds for the ledger to close
PATIENCE = 20.0  # seconds for the ledger of a driver that was killed to be gone
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_COLOR_PREFIX": "0",
}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # the node's address is 127.0.0.1, and its servers bind to it


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one shard asks for: CPUs and GPUs for the ranks of its largest layout."""

    max_ranks: int
    gpus_per_rank: float = 0.0

    def bundle(self) -> dict[str, float]:
        """Resources as Ray counts them: at least half a CPU, for the parent of the ranks; above one, whole GPUs."""
        gpus = self.gpus_per_rank * self.max_ranks
        of_gpus = {"GPU": gpus if gpus <= 1 else math.ceil(gpus)} if gpus else {}
        return {"CPU": max(0.5, CPUS_PER_RANK * self.max_ranks), **of_gpus}


def joined(address: str) -> None:
    """Start Ray on this machine, or join the cluster at `address`. ValueError, in one line, where that fails."""
    os.environ.update(QUIET if address else QUIET | LOOPBACK)
    _knock(address)
    import ray

    how: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    local = {"include_dashboard": False, "object_store_memory": OBJECTS}
    try:
        ray.init(**how, **({"address": address, "runtime_env": _environment()} if address else local))
    except Exception as error:
        where = f"--ray-address {address}: no cluster answers" if address else "Ray does not start here"
        raise ValueError(f"{where} ({type(error).__name__}: {_first_line(error)})") from error


def _knock(address: str) -> None:
    """ValueError where nothing listens at `host:port`: Ray itself would try for many minutes."""
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if not port.isdecimal():
        if address not in ("", "auto"):
            raise ValueError(f"--ray-address {address} must be auto, host:port or ray://host:port")
        return
    try:
        socket.create_connection((host, int(port)), KNOCK).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--ray-address {address}: no cluster answers ({error})") from error


def _environment() -> dict[str, Any]:
    """What workers of a cluster find our modules by: the same place as here, where nodes share it or install us."""
    return {"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def room(needs: Needs) -> int:
    """For how many shards there is room now. Each must fit into one node: its ranks talk over local sockets."""
    import ray

    bundle = needs.bundle()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    whole = sum(min(int(node.get(name, 0) / much) for name, much in bundle.items()) for node in nodes)
    free = ray.available_resources()
    return min(whole, *(int(free.get(name, 0) / much) for name, much in bundle.items()))


def check_room(needs: Needs, shards: int) -> None:
    """ValueError where there is too little; it says what is missing and what is free."""
    import ray

    if (fits := room(needs)) >= shards:
        return
    bundle, free = needs.bundle(), ray.available_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = ", ".join(f"{name} {much * shards:g} in all" for name, much in bundle.items())
    has = ", ".join(f"{name} {free.get(name, 0):g}" for name in bundle)
    largest = ", ".join(f"{name} {max((node.get(name, 0) for node in nodes), default=0):g}" for name in bundle)
    each = ", ".join(f"{name} {much:g}" for name, much in bundle.items())
    raise ValueError(
        f"--shards {shards} of --max-ranks {needs.max_ranks} need {each} each on one node ({wanted}); free are {has} "
        f"on {len(nodes)} node{'s' * (len(nodes) != 1)}, the largest with {largest}: room for {fits}"
    )


class Remote:
    """An actor's methods as plain ones: each waits for its answer, so that what was told is kept when it returns."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        import ray

        method = getattr(self._actor, name)
        return lambda *args, **kwargs: ray.get(method.remote(*args, **kwargs))


class Shard:
    """What is inside a shard's actor. One method at a time: signals are set in the main thread alone."""

    def up(self) -> None:
        """It has found a node."""

    def run(self, number: int, ledger: Any, asked: Any) -> None:
        """Chunk after chunk until there is none."""
        from fuzz.deep import shard

        shard.run(number, Remote(ledger), asked)  # type: ignore[arg-type]


def ledger(folder: Path, plan: Plan) -> Any:
    """The ledger in a process of its own on this node. ValueError as it raises it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    made: Any = ray.remote(Ledger)
    actor = made.options(num_cpus=0, scheduling_strategy=here).remote(folder, plan, PATIENCE)
    try:
        ray.get(actor.left.remote(), timeout=START)
    except ray.exceptions.ActorDiedError as error:
        raise ValueError(_cause(error)) from error
    return actor


def _cause(error: BaseException) -> str:
    """What an actor's constructor said: the last line of the traceback that Ray sends."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if "ValueError: " in line), lines[-1])
    return said.partition("ValueError: ")[2] or said


class Shards:
    """The shards of a campaign: started, looked after, started again where one is lost."""

    def __init__(self, number: int, needs: Needs, ledger: Any, asked: Any) -> None:
        from ray.util.placement_group import placement_group

        self._needs, self._ledger, self._asked = needs, ledger, asked
        self._groups = [placement_group([needs.bundle()], strategy="STRICT_PACK") for _ in range(number)]
        self._actors: dict[int, Any] = {}
        self._runs: dict[Any, int] = {}
        self._up: dict[int, Any] = {}
        for shard in range(number):
            self.start(shard)

    def start(self, shard: int) -> None:
        """A shard, in its placement group: where the node is gone, as soon as Ray has found another."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = self._needs.bundle()
        where = PlacementGroupSchedulingStrategy(self._groups[shard])
        how = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": where}
        made: Any = ray.remote(Shard)
        actor = self._actors[shard] = made.options(**how).remote()
        self._up[shard] = actor.up.remote()
        self._runs[actor.run.remote(shard, self._ledger, self._asked)] = shard

    def running(self) -> int:
        return len(self._runs)

    def ended(self, seconds: float) -> Sequence[tuple[int, str]]:
        """Shards that have ended within `seconds`, and why: nothing where there was no more to do."""
        import ray

        done, _ = ray.wait(list(self._runs), num_returns=len(self._runs), timeout=seconds) if self._runs else ([], [])
        return [(self._runs.pop(one), _why(one)) for one in done]

    def give_up_waiting(self) -> None:
        """No more of those for which no node has been found."""
        import ray

        up, _ = ray.wait(list(self._up.values()), num_returns=len(self._up), timeout=0)
        for run, shard in list(self._runs.items()):
            if self._up[shard] not in up:
                ray.kill(self._actors[shard])
                del self._runs[run]

    def kill(self) -> None:
        """All, now: the keepers end their ranks."""
        import ray

        for actor in self._actors.values():
            with contextlib.suppress(Exception):
                ray.kill(actor)


def _why(run: Any) -> str:
    import ray

    try:
        ray.get(run)
    except (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError, ray.exceptions.NodeDiedError) as error:
        return f"its process has ended: {_first_line(error)}"
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines()
        return lines[-1][:500] if lines else repr(error)
    return ""


def asked(ledger: Any, name: str, *args: Any) -> Any:
    """What the ledger answers. ValueError where it has ended: nothing can be kept then."""
    import ray

    try:
        return ray.get(getattr(ledger, name).remote(*args), timeout=ANSWER)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        said = "the process that writes the campaign has ended or does not answer; what had finished is kept"
        raise ValueError(f"{said} ({_first_line(error)})") from error


def closed(ledger: Any, ended: str) -> None:
    """Close the ledger."""
    import ray

    with contextlib.suppress(Exception):
        ray.get(ledger.close.remote(ended), timeout=FAREWELL)


def left() -> None:
    """Leave Ray, and end it where it is ours."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
