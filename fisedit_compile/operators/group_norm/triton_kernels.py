"""Triton kernels of group norms over rows: sums of changed rows, totals of the mixed map, and the norm itself."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def partials_kernel(
    rows,  # pointer, [B, N, C]
    center,  # pointer, float32 [B, G] contiguous: recorded means
    recorded,  # pointer, float32 [B, S, 2, G]: recorded sums, read when UPDATE
    index,  # pointer, int64 [1 or B, N], read when UPDATE
    valid,  # pointer, bool [1 or B, N], read when UPDATE and MASKED
    partials,  # pointer, float32 [B, N, 2, G] contiguous, written when STORE
    changes,  # pointer, float32 [B, blocks of rows, 2, G] contiguous, written when UPDATE
    count,  # N
    groups,  # G
    width,  # C / G
    rows_sample,  # elements of rows from sample to sample
    rows_row,  # elements of rows from row to row
    recorded_sample,  # elements of recorded from sample to sample
    recorded_position,  # elements of recorded from position to position
    recorded_power,  # elements of recorded from first to second powers
    index_sample,  # elements of index from sample to sample, 0 when all samples share it
    valid_sample,  # elements of valid from sample to sample, 0 when all samples share it
    STORE: tl.constexpr,  # whether the sums of each row are wanted
    UPDATE: tl.constexpr,  # whether what they change of the totals is wanted
    MASKED: tl.constexpr,  # whether there are padding rows
    BLOCK_R: tl.constexpr,  # rows of a program
    BLOCK_G: tl.constexpr,  # groups of a program
    BLOCK_W: tl.constexpr,  # at least C / G
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)  # [BG]
    inner = tl.arange(0, BLOCK_W)  # [BW]
    sample = tl.program_id(2).to(tl.int64)
    row_inside, group_inside = row < count, group < groups
    mask = row_inside[:, None] & group_inside[None, :]  # [BR, BG]
    mean = tl.load(center + sample * groups + group, mask=group_inside, other=0.0)  # [BG]
    channel = group[:, None] * width + inner[None, :]  # [BG, BW]
    address = rows + sample * rows_sample + row.to(tl.int64)[:, None, None] * rows_row + channel[None, :, :]
    inside = mask[:, :, None] & (inner < width)[None, None, :]  # [BR, BG, BW]
    values = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    values = tl.where(inside, values - mean[None, :, None], 0.0)
    first = tl.sum(values, 2)  # [BR, BG]
    second = tl.sum(values * values, 2)
    if STORE:
        target = partials + (sample * count + row)[:, None] * (2 * groups) + group[None, :]
        tl.store(target, first, mask=mask)
        tl.store(target + groups, second, mask=mask)
    if UPDATE:
        position = tl.load(index + sample * index_sample + row, mask=row_inside, other=0)  # [BR] int64
        if MASKED:
            kept = tl.load(valid + sample * valid_sample + row, mask=row_inside, other=0).to(tl.int1)
            mask = mask & kept[:, None]
        old = recorded + sample * recorded_sample + position[:, None] * recorded_position + group[None, :]
        first_change = tl.where(mask, first - tl.load(old, mask=mask, other=0.0), 0.0)
        second_change = tl.where(mask, second - tl.load(old + recorded_power, mask=mask, other=0.0), 0.0)
        block = sample * tl.num_programs(0) + tl.program_id(0)
        target = changes + block * (2 * groups) + group  # [BG]
        tl.store(target, tl.sum(first_change, 0), mask=group_inside)
        tl.store(target + groups, tl.sum(second_change, 0), mask=group_inside)


@triton.jit(do_not_specialize=["blocks"])
def totals_kernel(
    totals,  # pointer, float32 [B, 2, G] contiguous: recorded totals
    changes,  # pointer, float32 [B, blocks, 2, G] contiguous
    output,  # pointer, float32 [B, 2, G] contiguous
    blocks,  # blocks of rows of a sample
    size,  # 2 * G
    BLOCK_B: tl.constexpr,  # blocks added at a time
    BLOCK_S: tl.constexpr,  # at least 2 * G
):
    sample = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_S)  # [BS]
    inside = place < size
    sums = tl.zeros((BLOCK_S,), dtype=tl.float32)
    # Always in this order, so that equal inputs give equal bits.
    for start in range(0, blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)  # [BB]
        address = changes + (sample * blocks + block)[:, None] * size + place[None, :]
        sums += tl.sum(tl.load(address, mask=(block < blocks)[:, None] & inside[None, :], other=0.0), 0)
    sums += tl.load(totals + sample * size + place, mask=inside, other=0.0)
    tl.store(output + sample * size + place, sums, mask=inside)


@triton.jit(do_not_specialize=["count", "elements"])
def apply_kernel(
    rows,  # pointer, [B, N, C]
    center,  # pointer, float32 [B, G] contiguous
    totals,  # pointer, float32 [B, 2, G] contiguous: sums of x - center and its square
    weight,  # pointer, [C], read when SCALED
    bias,  # pointer, [C], read when SHIFTED
    output,  # pointer, [B, N, C] contiguous
    count,  # N
    channels,  # C
    width,  # C / G
    eps,  # added to the variance
    elements,  # positions times channels of a group, as a floating-point number
    rows_sample,  # elements of rows from sample to sample
    rows_row,  # elements of rows from row to row
    SCALED: tl.constexpr,  # whether there is a weight
    SHIFTED: tl.constexpr,  # whether there is a bias
    SILU: tl.constexpr,  # whether SiLU follows
    BLOCK_R: tl.constexpr,  # rows of a program
    BLOCK_C: tl.constexpr,  # channels of a program
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    sample = tl.program_id(2).to(tl.int64)
    channel_inside = channel < channels
    groups = channels // width
    group = channel // width  # [BC]
    own = totals + sample * (2 * groups) + group
    offset = tl.load(own, mask=channel_inside, other=0.0) / elements  # [BC]
    square = tl.load(own + groups, mask=channel_inside, other=0.0) / elements
    variance = tl.maximum(square - offset * offset, 0.0)
    scale = tl.rsqrt(variance + eps)
    mean = tl.load(center + sample * groups + group, mask=channel_inside, other=0.0) + offset
    if SCALED:
        scale = scale * tl.load(weight + channel, mask=channel_inside, other=0.0).to(tl.float32)
    shift = -mean * scale
    if SHIFTED:
        shift += tl.load(bias + channel, mask=channel_inside, other=0.0).to(tl.float32)
    mask = (row < count)[:, None] & channel_inside[None, :]  # [BR, BC]
    address = rows + sample * rows_sample + row.to(tl.int64)[:, None] * rows_row + channel[None, :]
    values = tl.load(address, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if SILU:
        values = values * tl.sigmoid(values)
    target = output + (sample * count + row)[:, None] * channels + channel[None, :]
    tl.store(target, values.to(output.dtype.element_ty), mask=mask)
