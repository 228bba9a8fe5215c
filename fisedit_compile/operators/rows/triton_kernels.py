"""Triton kernels that move rows: reading them from maps, and writing them into maps in place."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def gather_kernel(
    source,  # pointer, [B, S, C]
    index,  # pointer, int64 [1 or B, N]
    output,  # pointer, [B, N, C] contiguous
    count,  # N
    channels,  # C
    source_sample,  # elements of source from sample to sample
    source_position,  # elements of source from position to position
    source_channel,  # elements of source from channel to channel
    index_sample,  # elements of index from sample to sample, 0 when all samples share it
    BLOCK_R: tl.constexpr,  # rows of a program
    BLOCK_C: tl.constexpr,  # channels of a program
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    sample = tl.program_id(2).to(tl.int64)
    inside = row < count
    mask = inside[:, None] & (channel < channels)[None, :]
    position = tl.load(index + sample * index_sample + row, mask=inside, other=0)  # [BR] int64
    address = source + sample * source_sample + position[:, None] * source_position
    values = tl.load(address + channel.to(tl.int64)[None, :] * source_channel, mask=mask)  # [BR, BC]
    offset = (sample * count + row)[:, None] * channels + channel[None, :]
    tl.store(output + offset, values, mask=mask)


@triton.jit(do_not_specialize=["count", "source_count", "fill"])
def gather_taps_kernel(
    rows,  # pointer, [B, Ns, C]
    recorded,  # pointer, [B, S, C]
    reads,  # pointer, int32 [1 or B, N * K]: below Ns a row, from Ns on a position of the map, below 0 the fill
    output,  # pointer, [B, N * K, C] contiguous
    fill,  # value of taps outside the map
    count,  # N * K
    source_count,  # Ns
    channels,  # C
    rows_sample,  # elements of rows from sample to sample
    rows_row,  # elements of rows from row to row
    recorded_sample,  # elements of recorded from sample to sample
    recorded_row,  # elements of recorded from position to position
    reads_sample,  # elements of reads from sample to sample, 0 when all samples share them
    BLOCK_R: tl.constexpr,  # taps of a program
    BLOCK_C: tl.constexpr,  # channels of a program
):
    tap = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    sample = tl.program_id(2).to(tl.int64)
    tap_inside, channel_inside = tap < count, channel < channels
    slot = tl.load(reads + sample * reads_sample + tap, mask=tap_inside, other=-1).to(tl.int64)[:, None]  # [BR, 1]
    rows_address = rows + sample * rows_sample + slot * rows_row + channel[None, :]
    recorded_address = recorded + sample * recorded_sample + (slot - source_count) * recorded_row + channel[None, :]
    inside = (slot >= 0) & channel_inside[None, :]  # [BR, BC]
    values = tl.load(rows_address, mask=inside & (slot < source_count), other=0.0)
    # Through float32, which holds all values of the other types.
    old = tl.load(recorded_address, mask=inside & (slot >= source_count), other=0.0).to(tl.float32)
    values = tl.where(slot < source_count, values.to(tl.float32), old)
    values = tl.where(slot >= 0, values, fill).to(output.dtype.element_ty)
    offset = (sample * count + tap)[:, None] * channels + channel[None, :]
    tl.store(output + offset, values, mask=tap_inside[:, None] & channel_inside[None, :])


@triton.jit(do_not_specialize=["count"])
def write_kernel(
    first_target,  # pointer, [B, S, C1]: a map that is changed in place
    first_rows,  # pointer, [B, N, C1]: what is written
    first_old,  # pointer, [B, N, C1] contiguous: gets what was there before, when SAVE
    second_target,  # pointer, [B, S, C2]: another map; the first again when PAIR is off
    second_rows,  # pointer, [B, N, C2]
    second_old,  # pointer, [B, N, C2] contiguous
    index,  # pointer, int64 [1 or B, N], distinct positions in each sample
    valid,  # pointer, bool [1 or B, N]: rows that are written, when MASKED
    count,  # N
    first_channels,  # C1
    second_channels,  # C2
    first_target_sample,  # elements of first_target from sample to sample
    first_target_position,  # elements of first_target from position to position
    first_rows_sample,  # elements of first_rows from sample to sample
    first_rows_row,  # elements of first_rows from row to row
    second_target_sample,  # elements of second_target from sample to sample
    second_target_position,  # elements of second_target from position to position
    second_rows_sample,  # elements of second_rows from sample to sample
    second_rows_row,  # elements of second_rows from row to row
    index_sample,  # elements of index from sample to sample, 0 when all samples share it
    valid_sample,  # elements of valid from sample to sample, 0 when all samples share it
    PAIR: tl.constexpr,  # whether there is a second map
    MASKED: tl.constexpr,  # whether there are padding rows
    SAVE: tl.constexpr,  # whether the values before are wanted
    BLOCK_R: tl.constexpr,  # rows of a program
    BLOCK_C: tl.constexpr,  # channels of a program
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    sample = tl.program_id(2).to(tl.int64)
    inside = row < count
    position = tl.load(index + sample * index_sample + row, mask=inside, other=0)  # [BR] int64
    if MASKED:
        inside = inside & tl.load(valid + sample * valid_sample + row, mask=inside, other=0).to(tl.int1)
    line = sample * count + row  # [BR] int64

    mask = inside[:, None] & (channel < first_channels)[None, :]  # [BR, BC]
    target = first_target + sample * first_target_sample + position[:, None] * first_target_position + channel[None, :]
    if SAVE:
        tl.store(first_old + line[:, None] * first_channels + channel[None, :], tl.load(target, mask=mask), mask=mask)
    source = first_rows + sample * first_rows_sample + row.to(tl.int64)[:, None] * first_rows_row + channel[None, :]
    tl.store(target, tl.load(source, mask=mask), mask=mask)
    if PAIR:
        mask = inside[:, None] & (channel < second_channels)[None, :]
        target = second_target + sample * second_target_sample + position[:, None] * second_target_position
        target += channel[None, :]
        if SAVE:
            before = tl.load(target, mask=mask)
            tl.store(second_old + line[:, None] * second_channels + channel[None, :], before, mask=mask)
        source = second_rows + sample * second_rows_sample + row.to(tl.int64)[:, None] * second_rows_row
        tl.store(target, tl.load(source + channel[None, :], mask=mask), mask=mask)
