"""Megatron-core moves expert biases by the load of parallel_state's ranks, not of the model's own process groups.

    pip install torch megatron-core && python expert_biases_of_other_groups.py

Two processes are the two stages of a model that is handed its process groups, while parallel_state has none of them.
Exits 1 while the bug lives, 0 when it has gone.
"""

import sys
import tempfile
from inspect import signature

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads  # noqa: F401 (the module is loaded by it)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

CONFIG = {
    "num_layers": 2, "hidden_size": 4, "num_attention_heads": 1, "num_moe_experts": 2, "moe_router_topk": 1,
    "moe_ffn_hidden_size": 4, "add_bias_linear": False, "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.5, "moe_token_dispatcher_type": "alltoall",
}  # fmt: skip
LOADS = torch.tensor([[3.0, 1.0], [0.0, 4.0]])  # tokens per expert of each stage


def stage(rank: int, folder: str, answers: "mp.SimpleQueue[list[float]]") -> None:
    torch.cuda.current_device = lambda: "cpu"
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    parallel_state.initialize_model_parallel()  # two data-parallel ranks
    alone = [dist.new_group([r]) for r in range(2)][rank]
    names = ("tp", "cp", "tp_cp", "tp_dp_cp")
    router = TopKRouter(TransformerConfig(**CONFIG), ProcessGroupCollection(**dict.fromkeys(names, alone)))
    router.local_tokens_per_expert.copy_(LOADS[rank])
    update = sys.modules["megatron.core.distributed.finalize_model_grads"]._update_router_expert_bias
    own = {"tp_dp_cp_group": alone} if "tp_dp_cp_group" in signature(update).parameters else {}  # 0.19
    update([router], router.config, **own)
    if rank == 0:
        answers.put(router.expert_bias.tolist())
    dist.destroy_process_group()


if __name__ == "__main__":
    answers = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(stage, (folder, answers), nprocs=2)
    found = answers.get()
    print(f"stage 0, experts with 3 and 1 tokens: expected biases [-0.5, 0.5], observed {found}")
    sys.exit(found != [-0.5, 0.5])
