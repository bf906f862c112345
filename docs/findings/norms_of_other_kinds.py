"""get_grad_norm_fp32 dies of an empty list for any kind but 2, and works in the gradients' dtype.

A single tensor, documented for clip_grad_by_total_norm_fp32, is not clipped.

    pip install torch megatron-core && python norms_of_other_kinds.py

One process. Exits 1 while one of the bugs lives, 0 when all have gone, 2 where something else went wrong.
"""

import os
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist


def on_this_device(function):
    """megatron-core writes device='cuda': here it is the CPU."""

    def called(*arguments, **kwargs):
        if not torch.cuda.is_available():
            kwargs.pop("device", None)
        return function(*arguments, **kwargs)

    return called


def main():
    warnings.simplefilter("ignore")
    for name in ("tensor", "zeros"):
        setattr(torch, name, on_this_device(getattr(torch, name)))
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = os.path.join(tempfile.mkdtemp(), "store")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    wrong = 0
    for kind in (2, 1, 3, float("inf")):
        try:
            print(f"norm of kind {kind} of no gradient: {get_grad_norm_fp32([], kind, dist.group.WORLD)}")
        except Exception as error:
            wrong += 1
            print(f"norm of kind {kind} of no gradient: {type(error).__name__}: {error}")
    gradient = torch.full((1000,), 1.01, dtype=torch.bfloat16)
    right, found = float(gradient.double().norm()), get_grad_norm_fp32([gradient], 2, dist.group.WORLD)
    print(f"norm of a bfloat16 gradient: expected {right:.4f}, observed {found:.4f}")
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    parameter.grad = torch.full((3, 2), 4.0)
    clip_grad_by_total_norm_fp32(parameter, 1.0, 4.0)
    print(f"gradient 4 of one tensor, clipped from norm 4 to 1: expected 1, observed {float(parameter.grad[0, 0]):g}")
    dist.destroy_process_group()
    return int(wrong > 0 or abs(found / right - 1) > 1e-5 or float(parameter.grad[0, 0]) > 1.001)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
