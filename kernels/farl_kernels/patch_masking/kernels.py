"""Triton kernels of patch masking. Every kernel takes a one-dimensional grid; no kernel uses atomics."""

from __future__ import annotations

import triton
import triton.language as tl

# Units of the block plan: see `block_plan.py`.
UNIFORM_BITS = tl.constexpr(24)
ASPECT_COUNT = tl.constexpr(4096)
ASPECT_SHIFT = tl.constexpr(12)
THRESHOLD_SHIFT = tl.constexpr(40)
TRIES_PER_BLOCK = tl.constexpr(10)
# Bits of an order key in mode "random": 40 random ones over 18 of the patch's index.
ORDER_BITS = tl.constexpr(58)


@triton.jit
def _locate(unit, columns, CHANNELS: tl.constexpr, PATCH: tl.constexpr, GROUP: tl.constexpr):
    """Units are GROUP neighbouring pixels, in the order (patch, channel, row, group): channel, row, and group in a row
    of pixels of the image."""
    groups: tl.constexpr = PATCH // GROUP
    inner = unit % (PATCH * groups)
    channel = unit // (PATCH * groups) % CHANNELS
    patch = unit // (PATCH * groups * CHANNELS)
    return channel, patch // columns * PATCH + inner // groups, patch % columns * groups + inner % groups


@triton.jit
def patchify_bytes_kernel(
    words,
    patches,
    scale_0,
    scale_1,
    scale_2,
    shift_0,
    shift_1,
    shift_2,
    columns,
    units,
    image_stride,
    row_stride,
    PATCH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """uint8 [B, H, W, 3] with dense rows, seen as integers of GROUP bytes: three of them hold GROUP pixels.

    A unit is all channels of GROUP pixels: three loads, no byte is loaded twice, three stores of GROUP numbers.
    """
    tiles = tl.cdiv(units, BLOCK)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    unit = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = unit < units
    _, row, group = _locate(unit, columns, 1, PATCH, GROUP)  # pyrefly: ignore[bad-argument-type]
    source = words + image * image_stride + row.to(tl.int64) * row_stride + group * 3
    first = tl.load(source, mask=inside, other=0)
    second = tl.load(source + 1, mask=inside, other=0)
    third = tl.load(source + 2, mask=inside, other=0)

    area: tl.constexpr = PATCH * PATCH
    start = unit // (area // GROUP) * (3 * area) + unit % (area // GROUP) * GROUP
    pixel = tl.arange(0, GROUP)
    target = patches + image * units * (3 * GROUP) + start[:, None] + pixel[None, :]
    for channel in tl.static_range(3):
        byte = (pixel * 3 + channel)[None, :]
        word = tl.where(byte < GROUP, first[:, None], tl.where(byte < 2 * GROUP, second[:, None], third[:, None]))
        value = ((word >> (byte % GROUP * 8).to(word.dtype)).to(tl.int32) & 255).to(tl.float32)
        if channel == 0:
            value = value * scale_0 + shift_0
        elif channel == 1:
            value = value * scale_1 + shift_1
        else:
            value = value * scale_2 + shift_2
        tl.store(target + channel * area, value.to(patches.dtype.element_ty), mask=inside[:, None])


@triton.jit
def patchify_pixels_kernel(
    pixels,
    patches,
    scale_0,
    scale_1,
    scale_2,
    shift_0,
    shift_1,
    shift_2,
    columns,
    units,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    GROUP: tl.constexpr,
    NORMALISE: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pixels of any strides to patches; with INVERSE patches to pixels. A unit is GROUP pixels of one channel."""
    tiles = tl.cdiv(units, BLOCK)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    unit = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = (unit < units)[:, None]
    channel, row, group = _locate(unit, columns, CHANNELS, PATCH, GROUP)
    pixel = tl.arange(0, GROUP)
    start = channel.to(tl.int64) * channel_stride + row.to(tl.int64) * row_stride
    column = (group * GROUP).to(tl.int64)[:, None] + pixel[None, :]
    source = pixels + image * image_stride + start[:, None] + column * column_stride
    target = patches + image * units * GROUP + (unit * GROUP)[:, None] + pixel[None, :]
    if INVERSE:
        tl.store(source, tl.load(target, mask=inside).to(pixels.dtype.element_ty), mask=inside)
    else:
        value = tl.load(source, mask=inside)
        if NORMALISE:
            scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
            shift = tl.where(channel == 0, shift_0, tl.where(channel == 1, shift_1, shift_2))
            value = value.to(tl.float32) * scale[:, None] + shift[:, None]
        tl.store(target, value.to(patches.dtype.element_ty), mask=inside)


@triton.jit
def _mix64(x):
    """SplitMix64's finaliser, uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _key(sample_ids, views, image, id_stride, view_stride, seed):
    """Generator state of an image, uint64; `seed` is mixed already."""
    sample = tl.load(sample_ids + image * id_stride).to(tl.uint64, bitcast=True)
    view = tl.load(views + image * view_stride).to(tl.uint64, bitcast=True)
    return _mix64(_mix64(sample + seed.to(tl.int64).to(tl.uint64, bitcast=True)) + view)


@triton.jit
def _draw(key, index):
    """Draw `index` (int32) of a generator, uint64."""
    return _mix64(key + (index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)


@triton.jit
def _count_bits(x):
    """Bits set in uint64, int32; the compiler knows the pattern as one instruction."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit(do_not_specialize=["seed"])
def sample_block_masks_block_kernel(
    sample_ids,
    views,
    aspects,
    mask,
    positions,
    seed,
    id_stride,
    view_stride,
    rows,
    columns,
    max_masked,
    min_block,
    TRIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program an image. A row of patches is a word of 64 bits, so a try costs a few operations on ROWS words."""
    image = tl.program_id(0).to(tl.int64)
    key = _key(sample_ids, views, image, id_stride, view_stride, seed)
    row = tl.arange(0, ROWS)
    side = tl.arange(0, max(ROWS, COLUMNS)).to(tl.int64)
    threshold = (side * 2 + 1) * (side * 2 + 1) << THRESHOLD_SHIFT
    one = tl.full((), 1, tl.uint64)
    smallest = tl.full((), min_block, tl.int64)

    words = tl.zeros([ROWS], tl.uint64)
    left = tl.full((), max_masked, tl.int32)
    failures = tl.full((), 0, tl.int32)
    step = tl.full((), 0, tl.int32)
    while (step < TRIES) & (left > 0) & (failures < TRIES_PER_BLOCK):
        shape = _draw(key, 2 * step)
        place = _draw(key, 2 * step + 1)
        area = (smallest << UNIFORM_BITS) + (shape >> 40).to(tl.int64) * (left - smallest)
        aspect = ((shape >> 16) & 0xFFFFFF).to(tl.int32) >> ASPECT_SHIFT
        tall = 4 * area * tl.load(aspects + aspect)
        wide = 4 * area * tl.load(aspects + (ASPECT_COUNT - 1 - aspect))
        # Both sides in one reduction. A side past the grid's is refused, whatever its length.
        sides = tl.sum((tall >= threshold).to(tl.int32) + ((wide >= threshold).to(tl.int32) << 16), axis=0)
        height = sides & 0xFFFF  # pyrefly: ignore[unsupported-operation]
        width = sides >> 16  # pyrefly: ignore[unsupported-operation]
        top = (place >> 40).to(tl.int32) * (rows - height + 1) >> UNIFORM_BITS
        start = ((place >> 16) & 0xFFFFFF).to(tl.int32) * (columns - width + 1) >> UNIFORM_BITS

        # Shifts stay below 64 also for a block that is refused.
        bits = (one << tl.minimum(width, 63).to(tl.uint64)) - 1
        bits = bits << tl.minimum(tl.maximum(start, 0), 63).to(tl.uint64)
        new = tl.where((row >= top) & (row < top + height), bits, 0) & ~words
        added = tl.sum(_count_bits(new), axis=0)
        accepted = (height < rows) & (width < columns) & (added != 0) & (added <= left)
        words = tl.where(accepted, words | new, words)
        left = tl.where(accepted, left - added, left)
        failures = tl.where(accepted, 0, failures + 1)
        step += 1

    column = tl.arange(0, COLUMNS)
    shift = column.to(tl.uint64)[None, :]
    chosen = (words[:, None] >> shift) & 1
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    patch = row[:, None] * columns + column[None, :]
    tl.store(mask + image * rows * columns + patch, chosen.to(tl.int8), mask=inside)
    in_row = _count_bits(words)
    before = (tl.cumsum(in_row, axis=0) - in_row)[:, None] + _count_bits(words[:, None] & ((one << shift) - 1))
    tl.store(positions + image * max_masked + before, patch, mask=inside & (chosen != 0))
    slot = tl.arange(0, SLOTS)
    padding = (slot >= max_masked - left) & (slot < max_masked)
    tl.store(positions + image * max_masked + slot, tl.full([SLOTS], -1, tl.int32), mask=padding)


@triton.jit(do_not_specialize=["seed"])
def sample_block_masks_random_kernel(
    sample_ids,
    views,
    mask,
    positions,
    seed,
    id_stride,
    view_stride,
    patches,
    max_masked,
    PATCHES: tl.constexpr,
):
    """One program an image: bisects for a number with `max_masked` order keys below it. Keys are distinct."""
    image = tl.program_id(0).to(tl.int64)
    key = _key(sample_ids, views, image, id_stride, view_stride, seed)
    patch = tl.arange(0, PATCHES)
    inside = patch < patches
    order = ((_draw(key, patch) >> 24) << 18).to(tl.int64) | patch
    above = tl.full((), 1, tl.int64) << ORDER_BITS
    order = tl.where(inside, order, above)

    below = tl.full((), 0, tl.int64)
    step = above >> 1
    found = tl.full((), patches, tl.int32)
    while found != max_masked:
        middle = below + step
        count = tl.sum((order < middle).to(tl.int32), axis=0)
        enough = count >= max_masked
        below = tl.where(enough, below, middle)
        above = tl.where(enough, middle, above)
        found = tl.where(enough, count, found)
        step = step >> 1

    chosen = order < above
    tl.store(mask + image * patches + patch, chosen.to(tl.int8), mask=inside)
    slot = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(positions + image * max_masked + slot, patch, mask=chosen)


@triton.jit(do_not_specialize=["batch"])
def mask_patches_forward_kernel(
    embeddings,
    mask,
    mask_token,
    class_token,
    position,
    visible,
    output,
    batch,
    tokens,
    channels,
    embeddings_image_stride,
    embeddings_patch_stride,
    choice_image_stride,
    choice_patch_stride,
    MODE: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile is one token of IMAGES images: its position is read once. `choice` strides: of mask, or of visible."""
    blocks = tl.cdiv(channels, BLOCK_C)
    rest = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    token = (rest % tokens).to(tl.int64)
    image = (rest // tokens * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)
    in_batch = image < batch
    in_row = channel < channels
    inside = in_batch[:, None] & in_row[None, :]
    target = output + ((image * tokens + token) * channels)[:, None] + channel[None, :]
    if token == 0:
        first = tl.load(class_token + channel, mask=in_row).to(tl.float32)
        first += tl.load(position + channel, mask=in_row).to(tl.float32)
        rows = tl.broadcast_to(first[None, :], (IMAGES, BLOCK_C)).to(output.dtype.element_ty)
        tl.store(target, rows, mask=inside)
        if MODE == "fork":
            tl.store(target + batch.to(tl.int64) * tokens * channels, rows, mask=inside)
    else:
        choice_offset = image * choice_image_stride + (token - 1) * choice_patch_stride
        source = embeddings + (image * embeddings_image_stride)[:, None] + channel[None, :]
        if MODE == "gather":
            patch = tl.load(visible + choice_offset, mask=in_batch, other=-1).to(tl.int64)
            kept = inside & (patch >= 0)[:, None]
            value = tl.load(source + (patch * embeddings_patch_stride)[:, None], mask=kept, other=0.0).to(tl.float32)
            where = ((patch + 1) * channels)[:, None] + channel[None, :]
            value += tl.load(position + where, mask=kept, other=0.0).to(tl.float32)
            tl.store(target, value.to(output.dtype.element_ty), mask=inside)
        else:
            here = tl.load(position + token * channels + channel, mask=in_row).to(tl.float32)
            source += (token - 1) * embeddings_patch_stride
            if MODE == "plain":
                value = tl.load(source, mask=inside).to(tl.float32) + here[None, :]
                tl.store(target, value.to(output.dtype.element_ty), mask=inside)
            else:
                hidden = (tl.load(mask + choice_offset, mask=in_batch, other=0) != 0)[:, None]
                masked = (here + tl.load(mask_token + channel, mask=in_row).to(tl.float32))[None, :]
                # A masked patch is not read where nothing but the masked sequence is wanted.
                wanted = inside if MODE == "fork" else inside & ~hidden
                value = tl.load(source, mask=wanted, other=0.0).to(tl.float32) + here[None, :]
                if MODE == "fork":
                    tl.store(target, value.to(output.dtype.element_ty), mask=inside)
                    target += batch.to(tl.int64) * tokens * channels
                value = tl.where(hidden, masked, value)
                tl.store(target, value.to(output.dtype.element_ty), mask=inside)


@triton.jit
def mask_patches_rows_kernel(
    visible,
    rows,
    count,
    tokens,
    image_stride,
    slot_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The list of visible patches read backwards: int32 [B, tokens], the row that a token has after "gather", or -1."""
    blocks = tl.cdiv(tokens, BLOCK_T)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    # The class token comes first in both.
    found = tl.where(token == 0, 0, -1)
    first = tl.full((), 0, tl.int32)
    while first < count:
        slot = first + tl.arange(0, BLOCK_K)
        listed = tl.load(visible + image * image_stride + slot * slot_stride, mask=slot < count, other=-1)
        match = tl.where((listed >= 0)[None, :] & (listed[None, :] + 1 == token[:, None]), slot[None, :] + 1, -1)
        found = tl.maximum(found, tl.max(match, axis=1))
        first += BLOCK_K
    tl.store(rows + image * tokens + token, found, mask=token < tokens)


@triton.jit(do_not_specialize=["batch"])
def mask_patches_backward_kernel(
    grad,
    mask,
    rows,
    grad_embeddings,
    position_partial,
    mask_token_partial,
    batch,
    patches,
    channels,
    grad_image_stride,
    grad_token_stride,
    mask_image_stride,
    mask_patch_stride,
    MODE: tl.constexpr,
    STEPS: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program reads one token of STEPS * IMAGES images once: patch gradients, and sums over these images."""
    blocks = tl.cdiv(channels, BLOCK_C)
    rest = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tokens = patches + 1
    token = (rest % tokens).to(tl.int64)
    slab = rest // tokens
    in_row = channel < channels
    position_sum = tl.zeros([IMAGES, BLOCK_C], tl.float32)
    mask_token_sum = tl.zeros([IMAGES, BLOCK_C], tl.float32)
    for step in range(STEPS):
        image = ((slab * STEPS + step) * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)
        in_batch = image < batch
        inside = in_batch[:, None] & in_row[None, :]
        is_patch = image < tl.where(token > 0, batch, 0)
        source = grad + (image * grad_image_stride)[:, None] + channel[None, :]
        if MODE == "gather":
            row = tl.load(rows + image * tokens + token, mask=in_batch, other=-1).to(tl.int64)
            kept = inside & (row >= 0)[:, None]
            whole = tl.load(source + (row * grad_token_stride)[:, None], mask=kept, other=0.0).to(tl.float32)
            kept_part = whole
        else:
            source += token * grad_token_stride
            first = tl.load(source, mask=inside, other=0.0)
            if MODE == "plain":
                whole = first.to(tl.float32)
                kept_part = whole
            else:
                # All loads come before the first use of one, so that they are under way together.
                second = first
                if MODE == "fork":
                    second = tl.load(source + batch.to(tl.int64) * grad_image_stride, mask=inside, other=0.0)
                choice = mask + image * mask_image_stride + (token - 1) * mask_patch_stride
                hidden = (tl.load(choice, mask=is_patch, other=0) != 0)[:, None]
                if MODE == "fork":
                    masked = second.to(tl.float32)
                    whole = first.to(tl.float32) + masked
                    kept_part = first.to(tl.float32) + tl.where(hidden, 0.0, masked)
                else:
                    masked = first.to(tl.float32)
                    whole = masked
                    kept_part = tl.where(hidden, 0.0, masked)
                if mask_token_partial is not None:
                    mask_token_sum += tl.where(hidden, masked, 0.0)
        if position_partial is not None:
            position_sum += whole
        if grad_embeddings is not None:
            target = grad_embeddings + ((image * patches + token - 1) * channels)[:, None] + channel[None, :]
            tl.store(target, kept_part.to(grad_embeddings.dtype.element_ty), mask=is_patch[:, None] & in_row[None, :])
    partial = (slab.to(tl.int64) * tokens + token) * channels + channel
    if position_partial is not None:
        tl.store(position_partial + partial, tl.sum(position_sum, axis=0), mask=in_row)
    if mask_token_partial is not None:
        tl.store(mask_token_partial + partial, tl.sum(mask_token_sum, axis=0), mask=in_row)


@triton.jit(do_not_specialize=["slabs"])
def mask_patches_reduce_kernel(
    position_partial,
    mask_token_partial,
    grad_class_token,
    grad_position,
    grad_mask_token,
    slabs,
    tokens,
    channels,
    position_programs,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of the partial sums [slabs, tokens, channels]: over slabs, and for the mask token over tokens too."""
    program = tl.program_id(0)
    if program < position_programs:
        if position_partial is not None:
            element = program * BLOCK + tl.arange(0, BLOCK)
            inside = element < tokens * channels
            total = tl.zeros([BLOCK], tl.float32)
            slab = tl.full((), 0, tl.int64)
            while slab < slabs:
                total += tl.load(position_partial + slab * tokens * channels + element, mask=inside, other=0.0)
                slab += 1
            if grad_position is not None:
                tl.store(grad_position + element, total.to(grad_position.dtype.element_ty), mask=inside)
            if grad_class_token is not None:
                class_row = total.to(grad_class_token.dtype.element_ty)
                tl.store(grad_class_token + element, class_row, mask=element < channels)
    elif mask_token_partial is not None:
        channel = (program - position_programs) * COLUMNS + tl.arange(0, COLUMNS)
        in_row = channel < channels
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        rows = slabs.to(tl.int64) * tokens
        first = tl.full((), 0, tl.int64)
        while first < rows:
            row = first + tl.arange(0, ROWS)
            where = (row * channels)[:, None] + channel[None, :]
            sums += tl.load(mask_token_partial + where, mask=(row < rows)[:, None] & in_row[None, :], other=0.0)
            first += ROWS
        summed = tl.sum(sums, axis=0)
        tl.store(grad_mask_token + channel, summed.to(grad_mask_token.dtype.element_ty), mask=in_row)
