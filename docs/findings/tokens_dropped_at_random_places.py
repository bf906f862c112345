"""moe_token_drop_policy="position" keeps tokens other than the first ones of an expert.

    pip install torch megatron-core && python tokens_dropped_at_random_places.py

Documented: "tokens at the end of each batch will be dropped". Exits 1 while the bug lives, 0 when it has gone.
"""

import math
import sys

import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

TOP_K, EXPERTS, FACTOR = 2, 4, 0.5
wrong = total = 0
for tokens in (4, 8, 12, 16, 24, 40, 64, 100, 128, 300):
    for seed in range(20):
        logits = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))
        gates, experts = logits.softmax(1).topk(TOP_K)
        probs = torch.zeros(tokens, EXPERTS).scatter(1, experts, gates)
        routed = torch.zeros(tokens, EXPERTS).scatter(1, experts, 1.0).bool()
        _, kept = apply_router_token_dropping(probs, routed, TOP_K, FACTOR, "position")
        capacity = math.ceil(tokens * TOP_K * FACTOR / EXPERTS)
        for expert in range(EXPERTS):
            due = routed[:, expert].nonzero().flatten()[:capacity].tolist()
            found = kept[:, expert].nonzero().flatten().tolist()
            if due != found and not wrong:
                mine = routed[:, expert].nonzero().flatten().tolist()
                print(f"{tokens} tokens, capacity {capacity}: of tokens {mine} for expert {expert}, ", end="")
                print(f"{due} must be kept, {found} was")
            wrong, total = wrong + (due != found), total + 1
print(f"{wrong} of {total} experts kept others than their first tokens")
sys.exit(bool(wrong))
