"""moe_shared_expert_overlap leaves the clamp and the offset of gated activations out of shared experts.

    pip install torch megatron-core && python overlapped_experts_without_clamp.py

One process: the same shared expert, with the same weights and the same token, on its own and in the pieces that the
token dispatcher calls when it is overlapped. Exits 1 while the bug lives, 0 when it has gone (or is refused), 2 where
something else went wrong.
"""

import contextlib
import sys
import tempfile

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig

ASKED = {"clamped": {"activation_func_clamp_value": 0.5}, "moved": {"glu_linear_offset": 1.0}}


class Stream:
    """A stream on a machine where everything is done when the call returns."""

    def wait_stream(self, *_): ...


def on_a_cpu():
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.Stream = torch.cuda.current_stream = Stream
    torch.cuda.stream = lambda *_: contextlib.nullcontext()


def expert(overlap, **asked):
    """A shared expert with weights of 1."""
    config = TransformerConfig(
        num_layers=1, hidden_size=4, num_attention_heads=1, num_moe_experts=2, add_bias_linear=False,
        moe_shared_expert_intermediate_size=4, moe_shared_expert_overlap=overlap, moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, bias_activation_fusion=False,
        use_cpu_initialization=True, gradient_accumulation_fusion=False, **asked,
    )  # fmt: skip
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    made = SharedExpertMLP(config, parts, gate=False, pg_collection=groups)
    for parameter in made.parameters():
        torch.nn.init.ones_(parameter)
    return made


def in_pieces(made, token):
    """As the token dispatcher calls it."""
    made.pre_forward_comm(token)
    made.linear_fc1_forward_and_act()
    made.linear_fc2_forward()
    made.post_forward_comm()
    return made.get_output()


def main():
    on_a_cpu()
    wrong, token = 0, torch.full((1, 1, 4), 0.5)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        for name, asked in ASKED.items():
            try:
                overlapped = expert(True, **asked)
            except (AssertionError, ValueError) as error:
                print(f"{name}: refused ({error})")
                continue
            due, found = (x[0, 0, 0].item() for x in (expert(False, **asked)(token), in_pieces(overlapped, token)))
            wrong += abs(due - found) > 1e-6
            print(f"{name}: without overlap {due:.4f}, with overlap {found:.4f}")
        dist.destroy_process_group()
    return int(wrong > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
