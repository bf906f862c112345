"""What megatron-core gets wrong where it recomputes: chunks that do not divide, lost masks, frozen embeddings, norms.

    pip install torch megatron-core && python recomputation.py

One process, a block of three plain layers. Exits 1 while one of the bugs lives, 0 when all have gone, 2 where something
else went wrong.
"""

import contextlib
import sys
import tempfile

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import random
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

PLAIN = {"num_layers": 3, "hidden_size": 8, "num_attention_heads": 1, "use_cpu_initialization": True}
OFF = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "masked_softmax_fusion": False, "persist_layer_norm": False}
MASK = torch.ones(1, 1, 4, 4, dtype=torch.bool).triu(1)


def on_a_cpu():
    """There is no CUDA device, and no CUDA generator whose state could be kept."""
    torch.cuda.current_device = lambda: "cpu"
    random._get_cuda_rng_state = lambda *_, **__: torch.empty(0, dtype=torch.uint8)
    random._set_cuda_rng_state = lambda *_, **__: None
    random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()


def block(**recompute):
    torch.manual_seed(0)
    return TransformerBlock(TransformerConfig(**PLAIN, **OFF, **recompute), get_gpt_layer_local_spec())


def full(method, layers):
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}


def trained(decoder, **inputs):
    """How many of the block's parameters have a gradient, where what comes in has none; or what was raised."""
    try:
        out = decoder(torch.ones(4, 1, 8), MASK, **inputs)
        out.sum().backward() if out.requires_grad else None
    except (IndexError, NameError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return sum(parameter.grad is not None for parameter in decoder.parameters())


def masks(decoder):
    """Of which layers the padding mask is an argument."""
    found = set()
    for i, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(
            lambda *a, i=i: found.add(i) if a[2].get("padding_mask") is not None else None, with_kwargs=True
        )
    with contextlib.suppress(IndexError):
        decoder(torch.ones(4, 1, 8, requires_grad=True), MASK, padding_mask=torch.zeros(1, 4, dtype=torch.bool))
    return sorted(found)


def main():
    on_a_cpu()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        due, wrong = trained(block()), 0
        for name, asked in {
            "uniform, 1 layer each": full("uniform", 1),
            "uniform, 2 layers each": full("uniform", 2),
            "norms": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
        }.items():
            found = trained(block(**asked))
            wrong += found != due
            print(f"{name}, frozen embeddings: gradients of {due} parameters expected, observed {found}")
        found = masks(block(**full("block", 1)))
        wrong += found != [0, 1, 2]
        print(f"block, 1 of 3 layers: layers [0, 1, 2] must get the padding mask, it gets to {found}")
        dist.destroy_process_group()
    return int(wrong > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
