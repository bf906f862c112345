"""Runs a case inside a rank: process groups, the four models, the program, and what is seen on the way.

Knows the system under test and the platform; knows nothing of Hypothesis, laws or other processes. What it returns
are plain tensors and numbers under the keys of `docs/ppo.md`; nothing is gathered between ranks for observing.
"""

import contextlib
import hashlib
import importlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils

from fuzz import cpu_platform, gpu_platform, group, messages, probe, pulse, recorder
from fuzz.case import Case, Rollout, Update
from fuzz.plants import load
from toy_models import megatron, ppo, precision, sampling
from toy_models.experience import Experience, gather_experience
from toy_models.megatron import Role
from toy_models.releases import ProcessGroupCollection, groups_of_parallel_state
from toy_models.spec import Layout
from toy_models.weights import ROLES

# Process groups of so many layouts stay open; on a GPU each group has memory of the device.
KEPT_LAYOUTS, KEPT_ON_GPU = 64, 6
GROUP_TIMEOUT = timedelta(seconds=120)  # a backstop: the parent's deadline is shorter


def start(rank: int, world: int, store_path: str, plants: tuple[str, ...] = ()) -> None:
    """Called once in a rank process: platform, planted bugs, the default process group."""
    backend = "nccl" if torch.cuda.is_available() else group.BACKEND
    if backend == "nccl":
        gpu_platform.apply(rank, world)
    else:
        cpu_platform.apply()
        group.connect(rank, world, Path(store_path).parent)
    for plant in plants:
        _plant(plant)
    if pulse.own is not None:
        recorder.apply(pulse.own)
    store = dist.FileStore(store_path, world)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=GROUP_TIMEOUT)


def start_on_cpu(rank: int, world: int, store_path: str, plants: tuple[str, ...] = ()) -> None:
    """The same on a host with GPUs as if it had none."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    start(rank, world, store_path, plants)


def _plant(plant: str) -> None:
    """RuntimeError that names the plant where it does not find what it patches, or cannot be loaded."""
    try:
        load(plant)()
    except Exception as error:
        raise RuntimeError(f"{plant} could not be planted: {type(error).__name__}: {error}") from error


# ---- process groups, kept per layout ---------------------------------------------------------------------------

_groups: OrderedDict[Layout, dict[str, Any]] = OrderedDict()  # by layout, less how the layers are cut


def _globals() -> dict[str, Any]:
    """megatron's module-level parallel state: every name in capitals behind an underscore."""
    return {k: v for k, v in vars(parallel_state).items() if k.startswith("_") and k[1:2].isupper()}


_pristine = _globals()


def use_groups(layout: Layout) -> ProcessGroupCollection:
    """Put megatron's parallel state as after a fresh initialize_model_parallel for this layout; its groups."""
    uncut = replace(layout, vpp=1, split="even", stages=())
    vars(parallel_state).update(_groups.get(uncut, _pristine))
    if uncut in _groups:
        _groups.move_to_end(uncut)
    else:
        _make_groups(uncut)
    if layout.vpp > 1:
        parallel_state.set_virtual_pipeline_model_parallel_rank(0)
        parallel_state.set_virtual_pipeline_model_parallel_world_size(layout.vpp)
    parallel_state.destroy_global_memory_buffer()
    parallel_state._set_global_memory_buffer()
    # State that lives in no model object (docs: FACTS 'State outside the model objects').
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
    _forget_logged_losses()
    messages.settled()
    if torch.cuda.is_available():
        gpu_platform.seed_generators()
    return groups_of_parallel_state()


def groups_of(case: Case, seen: "Seen") -> ProcessGroupCollection:
    """The groups of a case's layout, after which parallel_state may be another's (`Switches.groups`)."""
    groups = use_groups(case.layout)
    seen.facts |= {"coordinates": _coordinates(), "groups": _named_groups()}
    if case.switches.groups == "other":
        use_groups(Layout(world=case.layout.world, tp=case.layout.tp))
    return groups


def _forget_logged_losses() -> None:
    """Empty the log of balance losses, whose size is that of the first model: a dict in 0.16, an object in 0.19."""
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("megatron.core.transformer.moe.moe_logging").destroy_moe_metrics_tracker()
        return
    moe_utils.get_moe_layer_wise_logging_tracker().clear()


def _make_groups(layout: Layout) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
        order=layout.order,
    )
    _groups[layout] = _globals()
    if len(_groups) > (KEPT_ON_GPU if torch.cuda.is_available() else KEPT_LAYOUTS):
        _, oldest = _groups.popitem(last=False)
        _close(oldest)


def _close(state: Mapping[str, Any]) -> None:
    flat = [g for v in state.values() for g in (v if isinstance(v, list) else [v])]
    groups = {id(g): g for g in flat if isinstance(g, dist.ProcessGroup) and g is not dist.group.WORLD}
    for each in groups.values():
        dist.destroy_process_group(each)


@contextlib.contextmanager
def groups_apart() -> Iterator[None]:
    """Groups made while open are closed at its end, half-made ones too; those kept are as before."""
    kept = dict(_groups)
    _groups.clear()
    vars(parallel_state).update(_pristine)
    try:
        yield
    finally:
        _close(_globals())
        vars(parallel_state).update(_pristine)
        _groups.clear()
        _groups.update(kept)


# ---- one case --------------------------------------------------------------------------------------------------


class Seen:
    """What this rank has seen so far, and how long each stage took."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.numbers: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self._progress, self._stage = progress, ""

    def alive(self, *_: Any) -> None:
        """A sign of life: without one for seconds a rank is given up."""
        self._progress(self._stage)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._stage = name
        self.alive()
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def pieces(self, prefix: str, role: Role, kind: str) -> None:
        for name, piece in role.pieces(kind).items():
            self.tensors[f"{prefix}/{role.name}/{kind}/{name}"] = piece.clone()

    def owned(self, roles: Mapping[str, Role]) -> None:
        """Of which elements this rank has gradients and states, where a distributed optimizer shares them out."""
        for role in (role for role in roles.values() if role.optimizer and role.switches.distributed):
            self.tensors |= {f"owned/{role.name}/{name}": piece for name, piece in role.pieces("owned").items()}

    def digest(self, key: str, roles: Mapping[str, Role]) -> None:
        self.facts[f"{key}/digest"] = {name: _digests(role) for name, role in roles.items()}


def _digests(role: Role) -> dict[str, str]:
    """A short hash of every parameter and buffer, bit by bit."""
    chunks = enumerate(role.gpts)
    named = [(f"{i}.{name}", x) for i, gpt in chunks for name, x in (*gpt.named_parameters(), *gpt.named_buffers())]
    return {name: hashlib.blake2b(_bits(tensor), digest_size=8).hexdigest() for name, tensor in named}


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def step(progress: Callable[[str], None], case: Case, forced: Mapping[int, Mapping] | None = None) -> dict[str, Any]:
    """Run the program of a case on this rank. `forced`: iteration -> {(row, position): token} to put, not sample."""
    seen = Seen(progress)
    torch.use_deterministic_algorithms(case.switches.deterministic)
    with precision.keep_float64(case.precision == "float64"):
        with seen.stage("groups"):
            groups = groups_of(case, seen)
        with seen.stage("models"):
            roles = {name: megatron.make_role(case, name, groups) for name in ROLES}
            for gpt in [gpt for role in roles.values() for gpt in role.gpts]:  # a lone rank makes no collectives
                gpt.register_forward_pre_hook(seen.alive)
        seen.owned(roles)
        _run(case, roles, forced or {}, seen)
    seen.facts |= {"messages": messages.settled(), "backend": dist.get_backend()}
    seen.facts |= {f"layers/{name}": _layers(role) for name, role in roles.items()}
    return {"tensors": seen.tensors, "numbers": seen.numbers, "facts": seen.facts, "seconds": seen.seconds}


def _run(case: Case, roles: Mapping[str, Role], forced: Mapping[int, Mapping], seen: Seen) -> None:
    iteration, experience = -1, None
    for operation in case.program:
        if isinstance(operation, Rollout):
            iteration += 1
            experience = _experience(case, roles, iteration, forced.get(iteration, {}), seen)
        elif isinstance(operation, Update):
            assert experience is not None
            _update(case, roles, iteration, experience, seen)


def _experience(case: Case, roles: Mapping[str, Role], iteration: int, forced: Mapping, seen: Seen) -> Experience:
    key = str(iteration)
    seen.digest(f"{key}/start", roles)
    with seen.stage("rollout"):
        rollout = sampling.roll_out(case, roles["actor"], iteration, forced)
    with seen.stage("experience"), probe.recording(roles["actor"]) as record:
        experience = gather_experience(case, roles, rollout)
    width = case.batch.prompt + case.batch.response
    seen.tensors[f"{key}/tokens"], seen.tensors[f"{key}/mask"] = rollout.tokens_RW[:, :width], rollout.mask_RT
    for name in ("old_logp", "ref_logp", "values", "scores", "rewards", "advantages", "returns"):
        seen.tensors[f"{key}/{name}"] = getattr(experience, name)
    with seen.stage("dispatch"):
        seen.tensors |= {f"{key}/{name}": tensor for name, tensor in record.tensors().items()}
        _probe(roles["actor"], record, key, seen)
    seen.digest(f"{key}/experienced", roles)
    return experience


def _probe(actor: Role, record: probe.Record, key: str, seen: Seen) -> None:
    for layer in actor.moe_layers():
        tensors, facts = probe.dispatch(actor, layer, record)
        seen.tensors |= {f"{key}/dispatch/{layer}/{name}": tensor for name, tensor in tensors.items()}
        seen.facts[f"{key}/dispatch/{layer}/splits"] = facts


def _update(case: Case, roles: Mapping[str, Role], iteration: int, experience: Experience, seen: Seen) -> None:
    def watch(moment: str, role: Role, step: int, numbers: Mapping[str, Any]) -> None:
        prefix = f"{iteration}/{step}"
        if moment in ("gradients", "weights"):
            return seen.pieces(prefix, role, {"gradients": "grad", "weights": "weight"}[moment])
        for kind in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            seen.pieces(prefix, role, kind)
        for name, bias in role.expert_biases().items():
            seen.tensors[f"{prefix}/{role.name}/expert_bias/{name}"] = bias.clone()
        if role.name == "actor" and role.last:
            seen.tensors[f"{prefix}/logp"] = torch.cat([report["logp"] for report in numbers["reports"]])
        return None

    with seen.stage("update"):
        history = ppo.update(case, roles, experience, watch)
    for step, metrics in enumerate(history):
        seen.numbers |= {f"{iteration}/{step}/{name}": value for name, value in metrics.items()}
    seen.digest(f"{iteration}/updated", roles)


def _coordinates() -> dict[str, int]:
    """Where megatron itself says that this rank sits."""
    return {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "cp": parallel_state.get_context_parallel_rank(),
        "dp": parallel_state.get_data_parallel_rank(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "etp": parallel_state.get_expert_tensor_parallel_rank(),
        "ep": parallel_state.get_expert_model_parallel_rank(),
        "edp": parallel_state.get_expert_data_parallel_rank(),
    }


# Megatron's groups by their kind (`toy_models.coordinates.GROUPS`): how to ask for this rank's own.
GROUPS: Mapping[str, Callable[[], Any]] = {
    "tp": parallel_state.get_tensor_model_parallel_group,
    "cp": parallel_state.get_context_parallel_group,
    "dp": parallel_state.get_data_parallel_group,
    "dp-cp": lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),
    "tp-cp": parallel_state.get_tensor_and_context_parallel_group,
    "tp-dp": parallel_state.get_tensor_and_data_parallel_group,
    "tp-dp-cp": lambda: parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
    "pp": parallel_state.get_pipeline_model_parallel_group,
    "tp-pp": parallel_state.get_model_parallel_group,
    "etp": parallel_state.get_expert_tensor_parallel_group,
    "ep": parallel_state.get_expert_model_parallel_group,
    "etp-ep": parallel_state.get_expert_tensor_and_model_parallel_group,
    "etp-ep-pp": parallel_state.get_expert_tensor_model_pipeline_parallel_group,
    "edp": parallel_state.get_expert_data_parallel_group,
}


def _named_groups() -> dict[str, list[int]]:
    """The ranks of megatron's groups of which this rank is a member, in the group's order."""
    return {kind: dist.get_process_group_ranks(group()) for kind, group in GROUPS.items()}


def _layers(role: Role) -> list[list[tuple[int, bool]]]:
    """Of each virtual stage the layers' own numbers, and whether they have experts."""
    return [[(layer.layer_number, hasattr(layer.mlp, "router")) for layer in gpt.decoder.layers] for gpt in role.gpts]
