"""Which block sizes a sparse convolution uses, from a model of its cost.

The model counts rounds of programs over the chip's processors. A step of a program takes as long as its arithmetic,
its reads from the second-level cache, or the wait for memory that too few loads in flight leave open, whichever is
longest. Measured choices (``tuning.py``) take the place of what it says where there are any. Kernels of norms and rows
have fixed rules for theirs, in the ``triton.py`` of their folders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from fisedit_compile.operators.triton.chips import Chip
from fisedit_compile.runtime.plans import TILE

#: The smallest side of a product on tensor cores, and of ``tl.dot``.
LEAST_BLOCK = 16
#: Below this many input channels a group, one step of the sum goes over several taps.
FLAT_INPUTS = 16
#: Rows times output channels of a program in that case: every element it reads has an address of its own.
FLAT_TILE = 32 * 64
#: Seconds: launching a kernel, waiting for memory, filling and draining a program.
LAUNCH, LATENCY, PROGRAM = 4e-6, 0.7e-6, 1.0e-6
#: Bytes a cycle that a processor reads from the second-level cache, and from the first.
CACHE_BYTES, NEAR_BYTES = 64, 128
#: Fewest rows of a program that share what they read: in smaller ones it is the weights that are read.
SHARING_ROWS = 64
#: Share of the peak that the best dense convolution reaches.
DENSE_SHARE = 0.6
#: Tiles of at least so many elements reach such a share of it.
TILE_SHARES = ((128 * 128, 0.5), (64 * 128, 0.45), (64 * 64, 0.4), (32 * 64, 0.35), (0, 0.25))
#: Registers of a processor, and the most that a thread may have.
REGISTERS, THREAD_REGISTERS = 65536, 255


@dataclass(frozen=True)
class ConvProblem:
    """A sparse convolution.

    Attributes:
        total: target rows of all samples, B * N.
        dense_total: target positions of all samples, active or not.
        source_total: distinct source positions that are read, rows and halo of all samples.
        inputs, outputs: channels of all groups together.
        taps: of the kernel.
        groups: as of the convolution.
        dtype: of rows and weights.
        tensor_float: whether float32 is multiplied as TF32.
    """

    total: int
    dense_total: int
    source_total: int
    inputs: int
    outputs: int
    taps: int
    groups: int = 1
    dtype: torch.dtype = torch.float16
    tensor_float: bool = False

    @property
    def density(self) -> float:
        """Active share of the target positions."""
        return self.total / max(1, self.dense_total)

    @property
    def compactness(self) -> float:
        """Target rows for each distinct source position: near 1 for squares, towards 1 / taps for scattered ones."""
        return self.total / max(1, self.source_total)

    @property
    def operations(self) -> float:
        """Multiplications and additions of the sparse convolution."""
        return 2.0 * self.total * self.outputs * self.taps * (self.inputs // self.groups)

    @property
    def flat(self) -> bool:
        """Whether a step of the sum goes over several taps."""
        return self.inputs // self.groups < FLAT_INPUTS

    def bucket(self) -> ConvProblem:
        """The same problem with sizes that depend on the mask rounded up to powers of two."""
        return replace(
            self,
            total=_power_of_two(self.total),
            dense_total=_power_of_two(self.dense_total),
            source_total=_power_of_two(self.source_total),
        )


def make_problem(
    batch: int,
    source_count: int,
    positions: int,
    inputs: int,
    count: int,
    taps: int,
    outputs: int,
    groups: int,
    dtype: torch.dtype,
) -> ConvProblem:
    """A problem from what a sample has: ``source_count`` rows on a map of so many ``positions``, ``count`` targets."""
    # Targets for each source position: 1/4 for stride 2, 4 for a transposed convolution of stride 2.
    dense_total = round(batch * positions * count / max(1, source_count))
    return ConvProblem(
        total=batch * count,
        dense_total=max(batch * count, dense_total),
        source_total=batch * min(positions, source_count + count),
        inputs=inputs,
        outputs=outputs,
        taps=taps,
        groups=groups,
        dtype=dtype,
        tensor_float=tensor_float(),
    )


def tensor_float() -> bool:
    """Whether PyTorch multiplies float32 of convolutions as TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ConvBlocks:
    """Block sizes.

    Attributes:
        rows: target rows of a program.
        outputs: its output channels.
        inputs: what a step of its sum goes over, input channels times taps.
        splits: parts of the sum, each a program of its own.
        warps: of a program.
        ahead: steps whose factors are loaded before they are needed.
        share: a block of channels goes through all taps before the next one, by way of the first-level cache: of rows
            that lie in tiles of pixels each position is read once from further away, not once for each tap.
    """

    rows: int
    outputs: int
    inputs: int
    splits: int = 1
    warps: int = 4
    ahead: int = 3
    share: bool = False

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of a program's rows as a tile of pixels, in the order of plans for GPUs; see
        ``runtime.plans.tile_order``."""
        height = min(TILE, 1 << (self.rows.bit_length() - 1) // 2)
        return height, self.rows // height

    @property
    def stages(self) -> int:
        """Triton's number of pipeline stages. It divides them between loading where to read and reading there."""
        return 2 * self.ahead + 2

    def __str__(self) -> str:
        split = f", sum in {self.splits} parts" if self.splits > 1 else ""
        shared = ", {}x{} pixels share reads".format(*self.pixels) if self.share else ""
        return f"{self.rows}x{self.outputs}x{self.inputs}{shared}{split}, {self.warps} warps, {self.ahead} steps ahead"


@dataclass(frozen=True)
class BlockChoice:
    """What was chosen and why.

    Attributes:
        blocks: sizes for the sparse kernel.
        seconds: its estimated, or measured, time.
        dense_seconds: estimated time of a dense convolution of the whole map.
        source: ``model`` or ``measured``.
    """

    blocks: ConvBlocks
    seconds: float
    dense_seconds: float
    source: str = "model"

    @property
    def dense(self) -> bool:
        """Whether convolving the whole map is estimated to take no longer."""
        return self.seconds >= self.dense_seconds

    def __str__(self) -> str:
        verdict = "dense is faster" if self.dense else "sparse"
        return (
            f"{verdict}: {self.blocks}; {self.seconds * 1e6:.1f} us against {self.dense_seconds * 1e6:.1f} us dense "
            f"({self.source})"
        )


#: Rows, output channels and warps of a program in half precision; small tiles have nothing for more warps to share.
TILES = ((16, 64, 4), (32, 64, 4), (64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8))
#: In float32 without tensor cores the factors themselves fill registers.
FLOAT_TILES = ((16, 32, 4), (16, 64, 4), (32, 64, 4), (64, 64, 4))
SPLITS = (1, 2, 4, 8, 16, 32)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _tiles(problem: ConvProblem, chip: Chip) -> tuple[tuple[int, int, int], ...]:
    """Tiles no larger than the problem needs, and those a chip has registers for."""
    tiles: tuple[tuple[int, int, int], ...] = (
        TILES if problem.dtype != torch.float32 and chip.matrix_units else FLOAT_TILES
    )
    if problem.flat:
        tiles = tuple(tile for tile in tiles if tile[0] * tile[1] <= FLAT_TILE)
    if chip.capability >= (10, 0):
        # With these the assembler of this chip spills nothing; with those of the others it does.
        warps_of = {(32, 64): 8, (128, 64): 4}
        tiles = tuple((rows, outputs, warps_of.get((rows, outputs), warps)) for rows, outputs, warps in tiles)
    width = max(LEAST_BLOCK, _power_of_two(problem.outputs // problem.groups))
    narrowed = dict.fromkeys((rows, min(outputs, width), warps) for rows, outputs, warps in tiles)
    least = max(LEAST_BLOCK, _power_of_two(problem.total))
    return tuple(tile for tile in narrowed if tile[0] <= least)


def _step_inputs(problem: ConvProblem, chip: Chip) -> int:
    """Inputs of a step: 128 bytes of each row, or as many as there are."""
    widest = 64 if problem.dtype != torch.float32 else 32
    if not chip.matrix_units:
        # Products one by one hold whole columns of both factors in registers.
        widest = 16 if problem.dtype != torch.float32 else 32
    available = problem.inputs // problem.groups * (problem.taps if problem.flat else 1)
    if problem.flat:
        widest = LEAST_BLOCK
    return min(widest, max(LEAST_BLOCK, _power_of_two(available)))


def shared_bytes(blocks: ConvBlocks, problem: ConvProblem, chip: Chip) -> int:
    """Shared memory a program is expected to need at most, in bytes."""
    dtype = problem.dtype
    # Matrix instructions from capability 9.0 on read shared memory while the next step is written to it.
    buffers = blocks.ahead + (1 if chip.capability >= (9, 0) else 0) if chip.matrix_units else 1
    # Factors of float32 may be kept as they are multiplied on 7.5: both factors.
    staged = buffers * (blocks.rows + blocks.outputs) * blocks.inputs * (dtype.itemsize if chip.matrix_units else 4)
    # Where to read: an address for each row, or for each element when a step goes over several taps.
    addresses = 8 * blocks.rows * (blocks.inputs if problem.flat else 1)
    return max(staged, blocks.rows * blocks.outputs * 4) + blocks.ahead * addresses


def candidates(problem: ConvProblem, chip: Chip) -> tuple[ConvBlocks, ...]:
    """All block sizes that fit problem and chip."""
    inputs = _step_inputs(problem, chip)
    steps = _steps(problem, inputs)
    found = []
    for rows, outputs, warps in _tiles(problem, chip):
        blocks = ConvBlocks(rows, outputs, inputs, 1, warps, 3 if chip.matrix_units and not problem.flat else 1)
        # Two programs on a processor hide each other's waiting better than one that loads further ahead.
        while blocks.ahead > 2 and shared_bytes(blocks, problem, chip) > chip.shared_limit // 2:
            blocks = replace(blocks, ahead=blocks.ahead - 1)
        if shared_bytes(blocks, problem, chip) > chip.shared_limit:
            continue
        # A part of fewer than four steps is over before its loads arrive.
        split = [replace(blocks, splits=splits) for splits in SPLITS if splits == 1 or steps // splits >= 4]
        found += split
        if rows >= SHARING_ROWS and problem.taps > 1 and not problem.flat:
            found += [replace(one, share=True) for one in split]
    return tuple(found)


def _far_share(problem: ConvProblem, blocks: ConvBlocks, chip: Chip) -> float:
    """Share of its gathered reads that a program makes further away than the first-level cache, when rows share."""
    height, width = blocks.pixels
    around = math.isqrt(problem.taps) - 1
    # What the mask's outline adds, and what the tile's does.
    sources = problem.source_total / max(1, problem.total) * (height + around) * (width + around) / blocks.rows
    held = sources * blocks.rows * blocks.inputs * problem.dtype.itemsize
    resident = _resident(blocks, problem, chip)
    fits = resident * (held + shared_bytes(blocks, problem, chip)) <= chip.shared_total
    return min(1.0, sources / problem.taps) if fits else 1.0


def _steps(problem: ConvProblem, inputs: int) -> int:
    per_group = problem.inputs // problem.groups
    if problem.flat:
        return math.ceil(problem.taps * per_group / inputs)
    return problem.taps * math.ceil(per_group / inputs)


def _tile_share(blocks: ConvBlocks, chip: Chip) -> float:
    """Share of the peak that a processor full of such programs reaches."""
    size = blocks.rows * blocks.outputs
    # Larger tiles use each factor more often, and even the largest one gathers, which a dense convolution does not.
    share = next(share for least, share in TILE_SHARES if size >= least)
    # Products of fewer than 64 rows use the instructions of the chip before, at half the rate.
    return share / 2 if chip.capability >= (9, 0) and blocks.rows < 64 else share


def _resident(blocks: ConvBlocks, problem: ConvProblem, chip: Chip) -> int:
    """Programs a processor holds at a time."""
    threads = 32 * blocks.warps
    registers = min(THREAD_REGISTERS, 64 + 2 * blocks.rows * blocks.outputs / threads)
    by_registers = int(REGISTERS / (registers * threads))
    by_shared = chip.shared_total // shared_bytes(blocks, problem, chip)
    return max(1, min(by_registers, by_shared, 1024 // threads))


def estimate(problem: ConvProblem, blocks: ConvBlocks, chip: Chip) -> float:
    """Seconds that the sparse kernel is expected to take."""
    if problem.total == 0:
        return 0.0
    size = problem.dtype.itemsize
    blocks_m = math.ceil(problem.total / blocks.rows)
    blocks_n = problem.groups * math.ceil(problem.outputs / problem.groups / blocks.outputs)
    programs = blocks_m * blocks_n * blocks.splits
    steps = math.ceil(_steps(problem, blocks.inputs) / blocks.splits)
    dtype = problem.dtype if chip.matrix_units else torch.float32
    peak = chip.flops(dtype, problem.tensor_float) / chip.processors * _tile_share(blocks, chip)
    arithmetic = 2.0 * blocks.rows * blocks.outputs * blocks.inputs / peak
    far = _far_share(problem, blocks, chip) if blocks.share else 1.0
    reading = (blocks.rows * far + blocks.outputs) * blocks.inputs * size / (CACHE_BYTES * chip.clock)
    if blocks.share:
        reading = max(reading, blocks.rows * blocks.inputs * size / (NEAR_BYTES * chip.clock))
    waiting = LATENCY / blocks.ahead
    places = chip.processors * _resident(blocks, problem, chip)
    seconds = 0.0
    for running in [places] * (programs // places) + [programs % places]:
        if running:
            together = math.ceil(running / chip.processors)
            seconds += PROGRAM + steps * max(together * arithmetic, together * reading, waiting)
    weights = problem.taps * (problem.inputs // problem.groups) * problem.outputs * size
    moved = weights + problem.source_total * problem.inputs * size + problem.total * problem.outputs * size
    seconds = LAUNCH + max(seconds, moved / chip.bandwidth)
    if blocks.splits > 1:
        seconds += LAUNCH + 2.0 * blocks.splits * problem.total * problem.outputs * 4 / chip.bandwidth
    return seconds


def estimate_dense(problem: ConvProblem, chip: Chip) -> float:
    """Seconds that a dense convolution is expected to take, with putting rows into the map and taking them out."""
    size = problem.dtype.itemsize
    operations = problem.operations * problem.dense_total / max(1, problem.total)
    moved = (problem.taps * problem.inputs // problem.groups * problem.outputs) * size
    moved += problem.dense_total * (problem.inputs + problem.outputs) * size
    peak = chip.flops(problem.dtype, problem.tensor_float) * DENSE_SHARE
    # The map is copied, rows are written into it; behind the convolution the active ones are gathered.
    around = 2 * problem.dense_total * problem.inputs * size
    return 4 * LAUNCH + max(operations / peak, moved / chip.bandwidth) + around / chip.bandwidth


def choose(problem: ConvProblem, chip: Chip) -> BlockChoice:
    """The candidate of the least estimated time.

    Raises:
        ValueError: the chip does not compute in the problem's dtype.
    """
    if not chip.supports(problem.dtype):
        raise ValueError(f"{chip} does not compute in {problem.dtype}")
    blocks = min(candidates(problem, chip), key=lambda blocks: estimate(problem, blocks, chip))
    return BlockChoice(blocks, estimate(problem, blocks, chip), estimate_dense(problem, chip))
