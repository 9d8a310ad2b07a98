from __future__ import annotations

import torch

from farl.tokens import DalleEncoder
from farl.tokens.agreement import agreement_with_fp32


def test_agreement_with_fp32_counts_tokens_and_overflow() -> None:
    # Random weights make near ties of many logits: a trained encoder's agreement is another.
    torch.manual_seed(0)
    encoder = DalleEncoder(8192, hidden=8, blocks_per_group=2, token_image_size=16)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8, generator=generator)
    batches = images.split([40, 24])
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    same, half, brain = agreement_with_fp32(encoder, batches, dtypes).values()
    assert same.cells == half.cells == brain.cells == 64 * 4
    assert (same.share, same.largest_loss, same.overflowed) == (1.0, 0.0, 0)
    rounded = DalleEncoder.from_state_dict(encoder.state_dict(), compute_dtype=torch.bfloat16)
    assert brain.same == sum(int((rounded(images) == encoder(images)).sum()) for images in batches)
    assert 0.5 < brain.share <= half.share and brain.share < 1
    assert 0 < brain.largest_loss < brain.mean_lead
    encoder.get_parameter("blocks.input.w").mul_(1e6)
    half, brain = agreement_with_fp32(encoder, batches[:1], dtypes[1:]).values()
    assert half.overflowed == half.cells and brain.overflowed == 0
