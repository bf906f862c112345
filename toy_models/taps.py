"""Keeps what passes a module and the gradient that comes back to it. Knows tensors and names, and no model.

Reference and system are watched with the same taps; nothing is computed here.
"""

from collections.abc import Callable

import torch


class Taps:
    """Outputs by name and pass, [pass]; `gradients` are zero where none has come back. `passed` is told of each."""

    def __init__(self, passed: Callable[[str], None] = lambda _: None) -> None:
        self.values: dict[str, list[torch.Tensor]] = {}
        self.gradients: dict[str, list[torch.Tensor]] = {}
        self.detached: set[str] = set()  # what carries no gradient
        self._passed = passed

    def tap(self, name: str, tensor: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Keep a copy of `tensor`, with the `bias` that is added later, and of its gradient once that is there."""
        values, gradients = self.values.setdefault(name, []), self.gradients.setdefault(name, [])
        at = len(values)
        whole = tensor.detach().clone()  # megatron's global buffer is written again by the next call
        values.append(whole if bias is None else whole + bias.detach())
        gradients.append(torch.zeros_like(values[at]))

        def keep(gradient: torch.Tensor) -> None:
            gradients[at] = gradient.detach().clone()
            self._passed(f"backward {name}")

        if tensor.requires_grad:
            tensor.register_hook(keep)
        else:
            self.detached.add(name)
        self._passed(f"forward {name}")
