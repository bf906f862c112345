"""Megatron-core chooses groups of experts at random where moe_router_group_topk exceeds moe_router_topk.

    pip install torch megatron-core && python groups_without_a_score.py

One process, no GPU. Four experts in four groups, the best two groups, the best expert of them: that must be the best
expert of all. Exits 1 while the bug lives, 0 when it has gone or is refused, 2 where something else went wrong.
"""

import sys

import torch


def main():
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    limits = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
    try:
        TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=1,
            num_moe_experts=4,
            moe_ffn_hidden_size=8,
            moe_router_topk=1,
            moe_router_pre_softmax=True,
            **limits,
        )
    except (ValueError, AssertionError) as error:
        print(f"refused: {error}")
        return 0
    logits = torch.eye(4) * 5  # token i belongs to expert i
    _, chosen = topk_routing_with_score_function(
        logits, 1, use_pre_softmax=True, num_groups=limits["moe_router_num_groups"], group_topk=2
    )
    experts = chosen.int().argmax(1).tolist()
    print(f"expected experts [0, 1, 2, 3], observed {experts}")
    return int(experts != [0, 1, 2, 3])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
