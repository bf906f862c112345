"""Megatron-core's all-to-all dispatcher mixes up the counts of other ranks where the rank order has EP before TP.

    pip install torch megatron-core && python experts_before_tensors.py

Four ranks on the CPU over Gloo, EP=2 and ETP=2, no GPU, TransformerEngine or apex: every rank routes another number of
tokens to each of two experts, asks the dispatcher how many it will send and receive, and compares with what its peers
say that they send. Exits 1 while the bug lives, 0 when it has gone, 2 where something else went wrong.
"""

import sys
import tempfile
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 4
BUG = 10  # exit code of a rank; an exception would give 1


def splits(rank):
    """How many copies the dispatcher wants to send to, and to receive from, each rank of its EP group."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        num_moe_experts=2,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=2,
        add_bias_linear=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    dispatcher = MoEAlltoAllTokenDispatcher(1, [groups.ep.rank()], config=config, pg_collection=groups)
    to_second = torch.arange(8) < 2 * rank  # rank r sends 2r of its tokens to expert 1
    dispatcher.preprocess(torch.stack([~to_second, to_second], dim=1))
    return dispatcher.input_splits.tolist(), dispatcher.output_splits.tolist()


def run(rank, folder, order):
    from megatron.core import parallel_state

    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.Stream = torch.cuda.current_stream = mock.MagicMock()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/{order}", RANKS), rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2, expert_tensor_parallel_size=2, order=order)
    sent, received = splits(rank)
    everyone = [None] * RANKS
    dist.all_gather_object(everyone, sent)
    group = parallel_state.get_expert_model_parallel_group()
    due = [everyone[peer][group.rank()] for peer in dist.get_process_group_ranks(group)]
    print(f"order {order}, rank {rank}: expected to receive {due}, observed {received}", flush=True)
    dist.barrier()
    sys.exit(BUG if received != due else 0)


if __name__ == "__main__":
    codes = set()
    with tempfile.TemporaryDirectory() as shared:
        for axes in ("tp-cp-ep-dp-pp", "ep-tp-cp-dp-pp"):
            ranks = [mp.get_context("spawn").Process(target=run, args=(rank, shared, axes)) for rank in range(RANKS)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(300)
            codes |= {process.exitcode for process in ranks}
    sys.exit(2 if codes - {0, BUG} else int(BUG in codes))
