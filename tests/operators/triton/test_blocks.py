"""The choice of block sizes: what fits, how it follows the problem, and when it says dense."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fisedit_compile.operators.triton.blocks import (
    ConvBlocks,
    ConvProblem,
    candidates,
    choose,
    estimate,
    shared_bytes,
)
from fisedit_compile.operators.triton.chips import KNOWN_CHIPS, Chip, chip_of

POSITIONS = 2 * 64 * 64


def problem(density: float, channels: int = 320, positions: int = POSITIONS, **changes: object) -> ConvProblem:
    total = max(1, round(density * positions))
    source = min(positions, round(1.2 * total) + 8)
    return replace(ConvProblem(total, positions, source, channels, channels, 9), **changes)


@pytest.mark.parametrize("chip", KNOWN_CHIPS.values(), ids=str)
def test_candidates_fit_the_chip(chip: Chip) -> None:
    for dtype in (torch.float16, torch.float32):
        asked = problem(0.3, dtype=dtype)
        found = candidates(asked, chip)
        assert len({blocks.rows for blocks in found}) >= 3
        for blocks in found:
            assert shared_bytes(blocks, asked, chip) <= chip.shared_limit
            assert min(blocks.rows, blocks.outputs, blocks.inputs) >= 16
            assert blocks.splits == 1 or 9 * 320 / blocks.inputs / blocks.splits >= 4


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)])
def test_the_choice_follows_the_density(capability: tuple[int, int]) -> None:
    chip = KNOWN_CHIPS[capability]
    few, many = (choose(problem(density), chip) for density in (0.01, 0.6))
    assert few.blocks.rows < many.blocks.rows
    assert few.blocks.splits > many.blocks.splits
    assert few.seconds < many.seconds and few.dense_seconds == pytest.approx(many.dense_seconds)


def test_few_rows_of_many_channels_are_summed_in_parts() -> None:
    """64 rows of 1280 channels: without parts most of the chip would idle."""
    chip = KNOWN_CHIPS[9, 0]
    wanted = ConvProblem(64, 2 * 16 * 16, 128, 1280, 1280, 9)
    choice = choose(wanted, chip)
    assert choice.blocks.splits >= 4
    assert choice.seconds < 0.6 * min(
        estimate(wanted, blocks, chip) for blocks in candidates(wanted, chip) if blocks.splits == 1
    )


@pytest.mark.parametrize("capability", KNOWN_CHIPS)
def test_dense_is_said_where_nothing_is_saved(capability: tuple[int, int]) -> None:
    chip = KNOWN_CHIPS[capability]
    assert choose(problem(1.0, 640), chip).dense
    assert "dense is faster" in str(choose(problem(1.0, 640), chip))
    verdicts = [choose(problem(density, 640), chip).dense for density in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)]
    assert verdicts == sorted(verdicts), "once dense is faster, it stays so"
    if chip.matrix_units:
        assert not verdicts[2] and "sparse: " in str(choose(problem(0.05, 640), chip))


def test_half_precision_without_tensor_cores_is_slow() -> None:
    """Triton has no matrix instructions for capability 7.5, while dense convolutions use them."""
    turing, ampere = KNOWN_CHIPS[7, 5], KNOWN_CHIPS[8, 6]
    ratios = [
        choose(problem(0.05), chip).seconds / choose(problem(0.05), chip).dense_seconds for chip in (turing, ampere)
    ]
    assert ratios[0] > 2 * ratios[1]


def test_bfloat16_needs_a_newer_chip() -> None:
    with pytest.raises(ValueError, match="T4 .*does not compute in torch.bfloat16"):
        choose(problem(0.1, dtype=torch.bfloat16), KNOWN_CHIPS[7, 5])
    assert KNOWN_CHIPS[8, 0].supports(torch.bfloat16) and not KNOWN_CHIPS[8, 0].supports(torch.float64)


def test_narrow_problems_get_narrow_blocks() -> None:
    chip = KNOWN_CHIPS[8, 0]
    few_outputs = replace(problem(0.3), outputs=4)
    assert choose(few_outputs, chip).blocks.outputs == 16
    few_inputs = replace(problem(0.3), inputs=4)
    assert few_inputs.flat and choose(few_inputs, chip).blocks.inputs == 16
    grouped = replace(problem(0.3), groups=32)
    assert choose(grouped, chip).blocks.outputs == 16
    assert choose(replace(problem(0.3), total=5), chip).blocks.rows == 16


def test_compact_masks_read_less() -> None:
    """A scattered mask reads several source rows for each target row; where memory is the limit it takes longer."""
    chip = replace(KNOWN_CHIPS[8, 6], bandwidth=1e10)
    compact, scattered = problem(0.02, source_total=200), problem(0.02, source_total=1400)
    assert compact.compactness > scattered.compactness
    assert choose(compact, chip).seconds < choose(scattered, chip).seconds


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_rows_share_reads_where_reading_is_the_limit(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only of a compact mask, where neighbours read the same positions, and not where the weights are what is read."""
    chip, compact = KNOWN_CHIPS[capability], problem(0.5)
    scattered = replace(compact, source_total=9 * compact.total)
    assert not choose(compact, chip).blocks.share
    monkeypatch.setattr("fisedit_compile.operators.triton.blocks.CACHE_BYTES", 4)
    assert choose(compact, chip).blocks.share and not choose(scattered, chip).blocks.share
    assert not any(blocks.share for blocks in candidates(replace(compact, taps=1), chip))
    assert {blocks.rows for blocks in candidates(compact, chip) if blocks.share} == {64, 128}


def test_more_processors_take_no_longer() -> None:
    chip = KNOWN_CHIPS[8, 0]
    larger = replace(chip, processors=2 * chip.processors)
    for density in (0.02, 0.3):
        assert choose(problem(density), larger).seconds <= choose(problem(density), chip).seconds


def test_it_can_be_read() -> None:
    text = str(choose(problem(0.05), KNOWN_CHIPS[8, 0]))
    assert text.startswith("sparse: ") and " warps" in text and text.endswith("(model)")
    assert str(ConvBlocks(16, 64, 32, 4)) == "16x64x32, sum in 4 parts, 4 warps, 3 steps ahead"
    assert str(ConvBlocks(128, 64, 64, share=True)) == "128x64x64, 8x16 pixels share reads, 4 warps, 3 steps ahead"
    assert str(KNOWN_CHIPS[8, 0]) == "A100 (8.0, 108 processors)"
    assert problem(0.25).density == 0.25 and problem(0.05).bucket().total == 512


def test_other_devices_stand_for_a_small_chip() -> None:
    assert chip_of(torch.device("cpu")).capability == (8, 6)
