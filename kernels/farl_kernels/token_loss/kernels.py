"""Softmax, loss, hit and gradient of rows of logits, the gradient over the logits; and the sums over all rows.

The gradient may be narrower than the logits that it overwrites: element j of a row then lies at or before the bytes of
logit j. All of a block is read by the whole program before any of it is written, hence the barriers.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def token_loss_row_kernel(
    logits,
    gradient,
    bias,
    targets,
    losses,
    hits,
    bias_sums,
    rows,
    vocab,
    logit_stride,
    gradient_stride,
    ignore_index,
    scale,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program takes ROWS rows, one after another, each whole in registers."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_V)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        exists = row < rows
        target = tl.load(targets + row, mask=exists, other=ignore_index)
        counts = target != ignore_index
        read = column < tl.where(counts, vocab, 0)
        x = tl.load(logits + row * logit_stride + column, mask=read, other=float("-inf"))
        if bias is not None:
            x += tl.load(bias + column, mask=read, other=0.0).to(tl.float32)
        largest = tl.max(x, axis=0)
        best = tl.min(tl.where(x == largest, column, BLOCK_V), axis=0)
        # NaN, which shows, where a target is no token.
        known = counts & (target >= 0) & (target < vocab)
        own = tl.load(logits + row * logit_stride + target, mask=known, other=float("nan"))
        if bias is not None:
            own += tl.load(bias + target, mask=known, other=0.0).to(tl.float32)
        # Rows that count nothing were read as -inf, and so become zeros.
        largest = tl.where(counts, largest, 0.0)
        x = tl.exp2((x - largest) * LOG2E)
        normaliser = tl.where(counts, tl.sum(x, axis=0), 1.0)
        loss = tl.log2(normaliser) * LN2 - (own - largest)
        tl.store(losses + row, tl.where(counts, loss, 0.0), mask=exists)
        tl.store(hits + row, (counts & (best == target)).to(tl.int32), mask=exists)
        if gradient is not None:
            spike = tl.where(counts, target, -1).to(tl.int32)
            x = x * (1.0 / normaliser) - (column == spike).to(tl.float32)
            tl.debug_barrier()
            narrow = (x * scale).to(gradient.dtype.element_ty)
            tl.store(gradient + row * gradient_stride + column, narrow, mask=column < tl.where(exists, vocab, 0))
            sums += x
    if bias_sums is not None:
        tl.store(bias_sums + program * vocab + column, sums, mask=column < vocab)


@triton.jit
def token_loss_long_row_kernel(
    logits,
    gradient,
    bias,
    targets,
    losses,
    hits,
    bias_sums,
    rows,
    vocab,
    logit_stride,
    gradient_stride,
    ignore_index,
    scale,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The same for rows that do not fit: read twice, by blocks. The program's `bias_sums` must come as zeros."""
    program = tl.program_id(0).to(tl.int64)
    for i in range(ROWS):
        row = program * ROWS + i
        exists = row < rows
        target = tl.load(targets + row, mask=exists, other=ignore_index)
        counts = target != ignore_index
        known = counts & (target >= 0) & (target < vocab)
        own = tl.load(logits + row * logit_stride + target, mask=known, other=float("nan"))
        if bias is not None:
            own += tl.load(bias + target, mask=known, other=0.0).to(tl.float32)
        # Of each lane of a block; -inf - -inf is kept out of lanes that have met no column yet.
        lane_largest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
        lane_sum = tl.zeros((BLOCK_V,), tl.float32)
        lane_best = tl.full((BLOCK_V,), 0, tl.int32)
        for start in range(0, vocab, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            read = column < tl.where(counts, vocab, 0)
            x = tl.load(logits + row * logit_stride + column, mask=read, other=float("-inf"))
            if bias is not None:
                x += tl.load(bias + column, mask=read, other=0.0).to(tl.float32)
            higher = tl.maximum(lane_largest, x)
            lane_best = tl.where(x > lane_largest, column, lane_best)
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            lane_sum = lane_sum * tl.exp2((lane_largest - shift) * LOG2E) + tl.exp2((x - shift) * LOG2E)
            lane_largest = higher
        largest = tl.max(lane_largest, axis=0)
        best = tl.min(tl.where(lane_largest == largest, lane_best, vocab), axis=0)
        largest = tl.where(counts, largest, 0.0)
        lane_sum *= tl.exp2((lane_largest - largest) * LOG2E)
        normaliser = tl.where(counts, tl.sum(lane_sum, axis=0), 1.0)
        loss = tl.log2(normaliser) * LN2 - (own - largest)
        tl.store(losses + row, tl.where(counts, loss, 0.0), mask=exists)
        tl.store(hits + row, (counts & (best == target)).to(tl.int32), mask=exists)
        if gradient is not None:
            for start in range(0, vocab, BLOCK_V):
                column = start + tl.arange(0, BLOCK_V)
                read = column < tl.where(counts, vocab, 0)
                x = tl.load(logits + row * logit_stride + column, mask=read, other=float("-inf"))
                if bias is not None:
                    x += tl.load(bias + column, mask=read, other=0.0).to(tl.float32)
                x = tl.exp2((x - largest) * LOG2E) * (1.0 / normaliser) - (column == target).to(tl.float32)
                x = tl.where(read, x, 0.0)
                tl.debug_barrier()
                narrow = (x * scale).to(gradient.dtype.element_ty)
                tl.store(gradient + row * gradient_stride + column, narrow, mask=column < tl.where(exists, vocab, 0))
                if bias_sums is not None:
                    at = bias_sums + program * vocab + column
                    tl.store(at, tl.load(at, mask=read, other=0.0) + x, mask=read)


@triton.jit
def token_loss_total_kernel(
    losses, hits, targets, loss, correct, count, rows, ignore_index, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: the three results, from the losses and hits of all rows."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    right = tl.zeros((BLOCK,), tl.int32)
    counted = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, rows, BLOCK):
        row = start + lane
        inside = row < rows
        total += tl.load(losses + row, mask=inside, other=0.0).to(tl.float64)
        right += tl.load(hits + row, mask=inside, other=0)
        counted += (tl.load(targets + row, mask=inside, other=ignore_index) != ignore_index).to(tl.int64)
    summed = tl.sum(total, axis=0)
    number = tl.sum(counted, axis=0)
    if MEAN:
        summed /= tl.maximum(number, 1).to(tl.float64)
    tl.store(loss, summed.to(tl.float32))
    tl.store(correct, tl.sum(right, axis=0).to(tl.float32))
    tl.store(count, number)
