"""moe_pad_expert_input_to_capacity fails where the capacity of an expert is above the number of tokens.

    pip install torch megatron-core && python padding_beyond_all_tokens.py

The router's map then has every token for every expert, fewer than the capacity that permute counts on. Exits 1 while
the bug lives, 0 when it has gone.
"""

import sys

import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping, get_capacity, permute

TOKENS, EXPERTS, TOP_K, FACTOR = 4, 2, 2, 2.0
probs = torch.rand(TOKENS, EXPERTS)
routed = torch.ones(TOKENS, EXPERTS).bool()
kept, padded = apply_router_token_dropping(probs, routed, TOP_K, FACTOR, "probs", pad_to_capacity=True)
capacity = get_capacity(TOKENS * TOP_K, EXPERTS, FACTOR)
print(f"{TOKENS} tokens, capacity {capacity}: the map has {padded.sum(0).tolist()} tokens for the experts")
try:
    permute(torch.rand(TOKENS, 3), padded, kept, num_out_tokens=capacity * EXPERTS, drop_and_pad=True)
except RuntimeError as error:
    print(f"permute: {error}")
    sys.exit(1)
