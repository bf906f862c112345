"""Attention of megatron-core with an infinite window, documented as -1, looks at the future and not at the past.

    pip install torch megatron-core && python window_without_end.py

One process. Scores are all 0, so that each query must weigh the tokens that it may see alike. Also: with any window the
mask of the caller is dropped. Exits 1 while the bug lives, 0 when it has gone, 2 where something else went wrong.
"""

import sys

import torch


def weights(window, mask=None):
    """The attention weights [query, key] of 4 tokens."""
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.utils import attention_mask_func

    softmax = FusedScaleMaskSoftmax(
        input_in_fp16=False, input_in_bf16=False, attn_mask_type=AttnMaskType.causal,
        scaled_masked_softmax_fusion=False, mask_func=attention_mask_func, softmax_in_fp32=True, scale=None,
        window_size=window,
    )  # fmt: skip
    return softmax(torch.zeros(1, 1, 4, 4), mask)[0, 0]


def main():
    ones = torch.ones  # the masks are made with device="cuda"
    torch.ones = lambda *shape, device=None, **kwargs: ones(*shape, **kwargs)
    causal = ones(4, 4).tril() / ones(4, 4).tril().sum(1, keepdim=True)
    wrong = 0
    for window in (None, (2, 0), (-1, 0)):
        seen = weights(window)
        due = ones(4, 4).tril() if window != (2, 0) else ones(4, 4).tril().triu(-2)
        due = due / due.sum(1, keepdim=True)
        first = [round(x, 3) for x in seen[0].tolist()]
        print(f"window_size={window}: weights of the first token: expected [1.0, 0.0, 0.0, 0.0], observed {first}")
        wrong += not torch.allclose(seen, due)
    assert torch.allclose(weights(None), causal)
    return int(wrong > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
