"""Runs the first optimizer step of a case inside a rank with taps on every module of actor and critic.

Hooks read; nothing of the system is replaced while it computes. Returns plain tensors of this rank, nothing gathered.
Every output and gradient is announced as a stage, so that a rank that dies or hangs has said how far it came.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from fuzz import probe
from fuzz.case import Case
from fuzz.drive import Seen, groups_of
from toy_models import megatron, ppo, precision, sampling
from toy_models.experience import Experience, gather_experience
from toy_models.megatron import Role
from toy_models.passes import Rollout
from toy_models.taps import Taps
from toy_models.weights import ROLES

STEP = "0/0"  # iteration 0, optimizer step 0
EXPERIENCE = ("old_logp", "ref_logp", "values", "scores", "rewards", "advantages", "returns")
IN_LAYER = (
    "input_layernorm", "self_attention.linear_qkv", "self_attention.q_layernorm", "self_attention.k_layernorm",
    "self_attention.core_attention", "self_attention", "pre_mlp_layernorm", "mlp.router", "mlp.shared_experts",
    "mlp.linear_fc1", "mlp",
)  # fmt: skip
# They return (output, bias). So does an expert's second matrix, whose bias is multiplied by a gate first.
WITH_BIAS = ("self_attention", "mlp.linear_fc1", "experts.linear_fc1", ".mlp")
Progress = Callable[[str], None]
Forced = Mapping[tuple[int, int], int]  # (row, position) -> token


class _Enough(Exception):
    """The first step of both models is done."""


def step(progress: Progress, case: Case, near: Forced, responses_RT: torch.Tensor) -> dict[str, Any]:
    """Roll out as the system does, but for tokens that rounding might change (`near`); then again with the reference's
    responses, and train actor and critic once on those.

    Keys: `0/tokens`, `0/mask` of the first rollout, the rest of `docs/ppo.md` of the second; `forward/ROLE/MODULE` and
    `backward/ROLE/MODULE`, [rows, positions, features] or [copies, features], of the modules on this rank's stages;
    `copies/ROLE/layers.i`. The facts `ROLE/detached` name modules of which something carries no gradient.
    """
    seen = Seen(progress)
    once = replace(case.switches, recompute="none", recompute_layers=0)  # taps would see what is computed again
    case = replace(case, switches=once)
    with precision.keep_float64(case.precision == "float64"):
        progress("models")
        groups = groups_of(case, seen)
        roles = {name: megatron.make_role(case, name, groups) for name in ROLES}
        seen.owned(roles)
        progress("rollout")
        sampled = sampling.roll_out(case, roles["actor"], 0, near)
        rollout = sampling.roll_out(case, roles["actor"], 0, _all(responses_RT))
        progress("experience")
        experience = gather_experience(case, roles, rollout)
        seen.tensors |= _experienced(case, sampled, experience)
        _update(case, roles, experience, seen, progress)
    return {"tensors": seen.tensors, "numbers": seen.numbers, "facts": seen.facts}


def _all(responses_RT: torch.Tensor) -> Forced:
    return {(row, at): token for row, tokens in enumerate(responses_RT.tolist()) for at, token in enumerate(tokens)}


def _experienced(case: Case, sampled: Rollout, experience: Experience) -> dict[str, torch.Tensor]:
    width = case.batch.prompt + case.batch.response
    found = {"0/tokens": sampled.tokens_RW[:, :width], "0/mask": sampled.mask_RT}
    return found | {f"0/{name}": getattr(experience, name) for name in EXPERIENCE}


def _update(case: Case, roles: Mapping[str, Role], experience: Experience, seen: Seen, progress: Progress) -> None:
    with contextlib.ExitStack() as stack:
        watched = {name: stack.enter_context(_tapped(roles[name], progress)) for name in ("actor", "critic")}
        stack.enter_context(contextlib.suppress(_Enough))
        ppo.update(case, roles, experience, lambda *event: _watch(seen, *event))
    for name, (taps, record) in watched.items():
        progress(f"{name} dispatch, run again with stamps")
        seen.tensors |= _named(roles[name], taps, record, case.batch.micro_rows)
        seen.facts[f"{name}/detached"] = sorted({one.split("/")[0] for one in taps.detached})


def _watch(seen: Seen, moment: str, role: Role, step: int, numbers: Mapping[str, Any]) -> None:
    if moment == "gradients":
        return seen.pieces(STEP, role, "grad")
    if moment == "stepped":
        seen.numbers |= {f"{STEP}/{name}": value for name, value in numbers.items() if name != "reports"}
        if role.last and role.name == "actor":
            seen.tensors[f"{STEP}/logp"] = torch.cat([report["logp"] for report in numbers["reports"]])
        if not role.switches.overlap_gather:
            return None
        role.rest()  # else weights are gathered by the next step only
    seen.pieces(STEP, role, "weight")
    if role.name == "critic":
        raise _Enough
    return None


# ---- taps ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _tapped(role: Role, progress: Progress) -> Iterator[tuple[Taps, probe.Record]]:
    """Taps on all modules of a role, and the record of its routing, while the block runs."""
    taps = Taps(lambda said: progress(f"{role.name} {said.split('/')[0]}"))
    hooks = [_on_output(taps, name, module) for name, module in _modules(role).items()]
    hooks += [_on_dispatched(taps, i, layer.mlp.experts) for i, layer in role.moe_layers().items()]
    overlapped = role.moe_layers() if role.switches.shared_overlap else {}
    try:
        with probe.recording(role) as record, contextlib.ExitStack() as stack:
            for i, layer in overlapped.items():
                stack.enter_context(_of_pieces(taps, f"layers.{i}.mlp.shared_experts", layer.mlp.shared_experts))
            yield taps, record
    finally:
        for hook in hooks:
            hook.remove()


def _modules(role: Role) -> dict[str, torch.nn.Module]:
    """The modules of this rank's stages by name; what each of its experts does is told apart by a number."""
    modules: dict[str, torch.nn.Module] = {}
    if role.gpts[0].pre_process:
        modules["embedding"] = role.gpts[0].embedding
    if role.last:
        modules |= {"final_layernorm": role.last.decoder.final_layernorm, "output_layer": role.last.output_layer}
    for i, layer in role.layers().items():
        there = dict(layer.named_modules())
        modules |= {f"layers.{i}": layer} | {f"layers.{i}.{name}": there[name] for name in IN_LAYER if name in there}
    for i, layer in role.moe_layers().items():
        for j, expert in enumerate(layer.mlp.experts.local_experts):
            modules |= {f"layers.{i}.mlp.experts.{fc}/{j}": getattr(expert, fc) for fc in ("linear_fc1", "linear_fc2")}
    return modules


def _on_output(taps: Taps, name: str, module: torch.nn.Module) -> Any:
    """A module's output, with the bias that it hands on beside it, if any."""

    def hook(_: Any, __: Any, out: Any) -> None:
        output, beside = out if isinstance(out, tuple) else (out, None)
        taps.tap(name, output, beside if name.split("/")[0].endswith(WITH_BIAS) else None)

    return module.register_forward_hook(hook)


@contextlib.contextmanager
def _of_pieces(taps: Taps, name: str, shared: Any) -> Iterator[None]:
    """A tap on an overlapped shared expert, whose forward is never called: the dispatcher calls it piece by piece."""
    get_output = shared.get_output

    def tapped() -> torch.Tensor:
        output = get_output()
        taps.tap(name, output)
        return output

    shared.get_output = tapped
    try:
        yield
    finally:
        del shared.get_output


def _on_dispatched(taps: Taps, layer: int, experts: torch.nn.Module) -> Any:
    """What arrives at the experts of this rank: hidden states, and the probabilities that go with them."""

    def hook(_: Any, inputs: tuple) -> None:
        taps.tap(f"layers.{layer}.mlp.token_dispatcher/hidden", inputs[0])
        taps.tap(f"layers.{layer}.mlp.token_dispatcher/probs", inputs[2])

    return experts.register_forward_pre_hook(hook)


# ---- what was seen, by name ------------------------------------------------------------------------------------


def _named(role: Role, taps: Taps, record: probe.Record, rows: int) -> dict[str, torch.Tensor]:
    found = {}
    for kind, kept in (("forward", taps.values), ("backward", taps.gradients)):
        for name in [name for name in kept if "/" not in name]:
            found[f"{kind}/{role.name}/{name}"] = torch.cat([_by_row(one, rows) for one in kept[name]])
        for i in role.moe_layers():
            copies = _copies(kept, f"layers.{i}.mlp.")
            found |= {f"{kind}/{role.name}/{name}": tensor for name, tensor in copies.items()}
    found |= {f"copies/{role.name}/layers.{i}": _whence(role, i, record) for i in role.moe_layers()}
    return found


def _by_row(one: torch.Tensor, rows: int) -> torch.Tensor:
    """[S, B, ...] of a micro-batch, or the router's [S·B, E], as [B, S, features]."""
    return (one.unflatten(0, (-1, rows)) if one.dim() == 2 else one.flatten(2)).transpose(0, 1)


def _copies(kept: Mapping[str, list[torch.Tensor]], prefix: str) -> dict[str, torch.Tensor]:
    """What happened per copy, [copies, features]: micro-batch after micro-batch, in each expert after expert."""
    pairs = zip(*(kept[f"{prefix}token_dispatcher/{part}"] for part in ("hidden", "probs")), strict=True)
    found = {f"{prefix}token_dispatcher": torch.cat([torch.cat([h, p[:, None]], 1) for h, p in pairs])}
    for fc in ("linear_fc1", "linear_fc2"):
        experts = [kept[name] for name in kept if name.startswith(f"{prefix}experts.{fc}/")]
        found[f"{prefix}experts.{fc}"] = torch.cat([one for micro in zip(*experts, strict=True) for one in micro])
    return found


def _whence(role: Role, layer: int, record: probe.Record) -> torch.Tensor:
    """Where each copy came from, [copies, 4]: micro-batch, rank, index among that rank's tokens, and expert here.

    Asked of the dispatcher itself, which is run again on the recorded routing with stamps in place of hidden states, so
    that no order of copies is taken for granted. A stamp that no token has gives a rank of -1.
    """
    found = []
    for micro, route in enumerate(record.routes[layer]):
        again = probe.Record()
        again.routes = {layer: [route]}
        tensors, _ = probe.dispatch(role, layer, again)
        stamps, counts = tensors["arrived"][:, 0].cpu().round().long() - 1, tensors["counts"].cpu().long()
        tokens, experts = len(tensors["sent"]), torch.arange(len(counts)).repeat_interleave(counts)
        ranks = torch.where(stamps >= 0, stamps // tokens, -1)
        found.append(torch.stack([torch.full_like(stamps, micro), ranks, stamps % tokens, experts], dim=1))
    return torch.cat(found)
