"""Looks into the MoE layers of a rank: what the routers saw and chose, and where every token copy travels.

Hooks read; nothing of the system is replaced while it computes what is judged. The token ledger runs the real MoE layer
once more, with the recorded routing, ids in place of hidden states and an echo in place of the experts.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from toy_models.megatron import Role


class Record:
    """The actor's outputs and each router's input and choice, per micro-batch."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []
        self.routes: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """On the last stage logits [R, W/CP, V/TP]; per layer its router's hidden [tokens, H], probs and map [., E]."""
        found = {"logits": torch.cat(self.logits)} if self.logits else {}
        for layer, calls in self.routes.items():
            for i, name in enumerate(("hidden", "probs", "map")):
                found[f"route/{layer}/{name}"] = torch.cat([c[i].reshape(-1, c[i].shape[-1]) for c in calls])
        return found


@contextlib.contextmanager
def recording(actor: Role) -> Iterator[Record]:
    """Record forward passes of the actor while the block runs."""
    record = Record()

    def routed(layer: int) -> Any:
        def hook(_module: Any, inputs: tuple, output: tuple) -> None:
            record.routes.setdefault(layer, []).append((inputs[0].detach().clone(), *(o.detach() for o in output)))

        return hook

    hooks = [layer.mlp.router.register_forward_hook(routed(i)) for i, layer in actor.moe_layers().items()]
    if actor.last:
        hooks.append(actor.last.register_forward_hook(lambda *a: record.logits.append(a[2].detach().clone())))
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


class _Chosen(torch.nn.Module):
    """A router that repeats a recorded choice."""

    def __init__(self, probs: torch.Tensor, routing_map: torch.Tensor) -> None:
        super().__init__()
        self.choice = probs, routing_map

    def forward(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.choice


class _Echo(torch.nn.Module):
    """Experts e(x, p) = p·x/ETP that remember what arrived."""

    def __init__(self, etp: int) -> None:
        super().__init__()
        self.etp = etp

    def forward(self, tokens: torch.Tensor, counts: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.tokens, self.counts, self.probs = tokens.clone(), torch.as_tensor(counts).clone(), probs.clone()
        return tokens * probs[:, None] / self.etp, None


def _stamped(rank: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Hidden states that tell tokens apart: column 0 counts them over all ranks from 1, the others vary with it."""
    tokens = shape[0] * shape[1]
    ids = torch.arange(rank * tokens + 1, (rank + 1) * tokens + 1, dtype=dtype, device=device)
    stamps = torch.stack([ids if c == 0 else torch.sin(ids * (c + 1)) for c in range(shape[2])], dim=-1)
    return stamps.reshape(shape)


def dispatch(actor: Role, layer: int, record: Record) -> tuple[dict[str, torch.Tensor], dict[str, list[int] | None]]:
    """The token ledger of one MoE layer, with the routing of the first recorded micro-batch.

    Returns sent [tokens, H] and map, probs [tokens, E] of this rank; arrived [copies, H] in expert order with counts
    per local expert and copy_probs; combined [tokens, H]; and the split sizes of the all-to-all.
    """
    moe = actor.layers()[layer].mlp
    hidden, probs, routing_map = record.routes[layer][0]
    sent, echo = _stamped(actor.rank, hidden.shape, hidden.dtype, hidden.device), _Echo(actor.layout.etp)
    kept, dispatcher = (moe.router, moe.experts, moe.use_shared_expert), moe.token_dispatcher
    overlapped = dispatcher.shared_experts
    moe.router, moe.experts, moe.use_shared_expert = _Chosen(probs, routing_map), echo, False
    dispatcher.shared_experts = None
    try:
        with torch.no_grad():
            combined, _ = moe(sent.clone())
    finally:
        moe.router, moe.experts, moe.use_shared_expert = kept
        dispatcher.shared_experts = overlapped
    flat = hidden.shape[-1]
    tensors = {"sent": sent.reshape(-1, flat), "combined": combined.reshape(-1, flat), "map": routing_map}
    tensors |= {"probs": probs, "arrived": echo.tokens, "counts": echo.counts, "copy_probs": echo.probs}
    return tensors, _splits(moe.token_dispatcher)


def _splits(dispatcher: Any) -> dict[str, list[int] | None]:
    """How many copies go to and come from each EP rank, as the dispatcher itself says; None where it has no splits."""
    found = {name: getattr(dispatcher, f"{name}_splits", None) for name in ("input", "output")}
    return {name: None if splits is None else [int(n) for n in splits] for name, splits in found.items()}
