"""attention_output_gate fails where there are fewer query groups than TP ranks.

    pip install torch megatron-core && python gates_of_other_heads.py

Two ranks on the CPU over Gloo, TP=2, two heads in one query group: each rank picks its own query head of the gathered
group and keeps the gates of both. Exits 1 while the bug lives, 0 when it has gone, 2 where something else went wrong.
"""

import contextlib
import os
import sys
import tempfile

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the error without the compiler's own
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
BUG = 10  # exit code of a rank; an exception would give 1


def attended():
    """The shape of what attention gives for three tokens, or what was raised."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, random
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, num_query_groups=1, tensor_model_parallel_size=RANKS,
        attention_output_gate=True, add_bias_linear=False, attention_dropout=0.0, use_cpu_initialization=True,
        gradient_accumulation_fusion=False, masked_softmax_fusion=False,
    )  # fmt: skip
    random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()  # there is no CUDA generator
    parts = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=DotProductAttention, linear_proj=RowParallelLinear
    )
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    attention = SelfAttention(config, parts, 1, AttnMaskType.causal, pg_collection=groups)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).triu(1)
    try:
        return tuple(attention(torch.ones(3, 1, 8), mask)[0].shape)
    except RuntimeError as error:
        if "is invalid for input of size" not in str(error):
            raise
        return str(error)


def run(rank, folder):
    from megatron.core import parallel_state as state

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    torch.cuda.current_device = lambda: "cpu"
    found = attended()
    if rank == 0:
        print(f"shape of three tokens after attention: expected (3, 1, 8), observed {found}", flush=True)
    dist.barrier()
    sys.exit(BUG if found != (3, 1, 8) else 0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as shared:
        ranks = [mp.get_context("spawn").Process(target=run, args=(rank, shared)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
            process.kill()
    codes = {process.exitcode for process in ranks}
    sys.exit(2 if codes - {0, BUG} else int(BUG in codes))
