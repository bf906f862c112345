"""Attention of megatron-core with a window drops the mask that it is handed.

    pip install torch megatron-core && python window_in_place_of_a_mask.py

One process. Scores are all 0; the mask forbids the first token, which is padding, and what lies ahead. Exits 1 while
the bug lives, 0 when it has gone, 2 where something else went wrong.
"""

import sys

import torch


def weights(window, mask):
    """The attention weights [query, key] of 4 tokens."""
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.utils import attention_mask_func

    softmax = FusedScaleMaskSoftmax(
        input_in_fp16=False, input_in_bf16=False, attn_mask_type=AttnMaskType.padding,
        scaled_masked_softmax_fusion=False, mask_func=attention_mask_func, softmax_in_fp32=True, scale=None,
        window_size=window,
    )  # fmt: skip
    return softmax(torch.zeros(1, 1, 4, 4), mask)[0, 0]


def main():
    ones = torch.ones  # the window's mask is made with device="cuda"
    torch.ones = lambda *shape, device=None, **kwargs: ones(*shape, **kwargs)
    forbidden = ones(4, 4).triu(1).bool()
    forbidden[:, 0] = True
    wrong = 0
    for window in (None, (3, 0)):
        padding = float(weights(window, forbidden[None, None])[3, 0])
        print(f"window_size={window}: weight of the padding for the last token: expected 0, observed {padding:g}")
        wrong += padding > 0
    return int(wrong > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
