"""Index plans: their invariants, and every stencil kind against the dense operator on a mixed map."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fisedit_compile.errors import GraphError
from fisedit_compile.operators.triton.blocks import ConvBlocks
from fisedit_compile.runtime.masks import reduce_mask
from fisedit_compile.runtime.plans import bucket, build_plan, tile_order
from fisedit_compile.runtime.spec import Domain, PlanInput, Stencil
from support.sparse_maps import Case, masks, take, window

CHANNELS = 4
NUMBERS = st.integers(1, 3)
# A stencil, the dense operator on NCHW, and the same from the stencil's taps [B, N, K, C].
Drawn = tuple[Stencil, Callable[[Tensor], Tensor], Callable[[Tensor, Case], Tensor]]


def window_of(draw: st.DrawFn, source: Domain) -> Drawn:
    """Kernel, stride, padding and dilation that leave at least one output."""
    values: dict[str, int] = {}
    target = []
    for axis, name, size in (("y", "height", source.height), ("x", "width", source.width)):
        dilation, stride = draw(st.integers(1, 2)), draw(NUMBERS)
        padding = draw(st.integers(0, 2))
        kernel = draw(st.integers(1, max(1, min(4, (size + 2 * padding - 1) // dilation + 1))))
        values |= {f"kernel_{name}": kernel, f"stride_{axis}": stride}
        values |= {f"padding_{axis}": padding, f"dilation_{axis}": dilation}
        target.append((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    weight = torch.randn(3, CHANNELS, values["kernel_height"], values["kernel_width"], dtype=torch.float64)
    pairs = [(values[f"{name}_y"], values[f"{name}_x"]) for name in ("stride", "padding", "dilation")]

    def dense(map: Tensor) -> Tensor:
        return functional.conv2d(map, weight, None, *pairs)

    def sparse(taps: Tensor, case: Case) -> Tensor:
        return torch.einsum("bnkc,ock->bno", taps, weight.flatten(2))

    return Stencil.of("window", source, Domain(*target), **values), dense, sparse


def transposed(draw: st.DrawFn, source: Domain) -> Drawn:
    values: dict[str, int] = {}
    target, extra = [], []
    for axis, name, size in (("y", "height", source.height), ("x", "width", source.width)):
        dilation, stride = draw(st.integers(1, 2)), draw(NUMBERS)
        kernel, padding = draw(st.integers(1, 4)), draw(st.integers(0, 1))
        output_padding = draw(st.integers(0, max(stride, dilation) - 1))
        length = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1
        if length < 1:
            padding, length = 0, length + 2 * padding
        values |= {f"kernel_{name}": kernel, f"stride_{axis}": stride}
        values |= {f"padding_{axis}": padding, f"dilation_{axis}": dilation}
        target.append(length)
        extra.append(output_padding)
    weight = torch.randn(CHANNELS, 3, values["kernel_height"], values["kernel_width"], dtype=torch.float64)
    stride, padding, dilation = ((values[f"{n}_y"], values[f"{n}_x"]) for n in ("stride", "padding", "dilation"))

    def dense(map: Tensor) -> Tensor:
        return functional.conv_transpose2d(map, weight, None, stride, padding, tuple(extra), 1, dilation)

    def sparse(taps: Tensor, case: Case) -> Tensor:
        return torch.einsum("bnkc,cok->bno", taps, weight.flatten(2))

    return Stencil.of("transposed", source, Domain(*target), **values), dense, sparse


def _resized(draw: st.DrawFn, source: Domain) -> tuple[Domain, list[float], dict]:
    """A target, scale factors for the stencil, and the matching arguments of ``interpolate``."""
    if draw(st.booleans()):
        factors = [draw(st.sampled_from([0.5, 1.0, 1.3, 1.9, 2.0, 2.4, 3.0])) for _ in range(2)]
        sizes = [int(size * factor) for size, factor in zip((source.height, source.width), factors, strict=True)]
        if min(sizes) >= 1:
            return Domain(*sizes), factors, {"scale_factor": factors}
    target = Domain(draw(st.integers(1, 14)), draw(st.integers(1, 14)))
    return target, [0.0, 0.0], {"size": (target.height, target.width)}


def _one_tap(taps: Tensor, case: Case) -> Tensor:
    return taps[:, :, 0]


def _nearest(draw: st.DrawFn, source: Domain, kind: str, mode: str) -> Drawn:
    target, factors, arguments = _resized(draw, source)

    def dense(map: Tensor) -> Tensor:
        # float32: the rounding of coordinates depends on the dtype.
        return functional.interpolate(map.float(), mode=mode, **arguments).double()

    return Stencil.of(kind, source, target, scale_y=factors[0], scale_x=factors[1]), dense, _one_tap


def nearest(draw: st.DrawFn, source: Domain) -> Drawn:
    return _nearest(draw, source, "nearest", "nearest")


def nearest_exact(draw: st.DrawFn, source: Domain) -> Drawn:
    return _nearest(draw, source, "nearest_exact", "nearest-exact")


def bilinear(draw: st.DrawFn, source: Domain) -> Drawn:
    target, factors, arguments = _resized(draw, source)
    corners = draw(st.booleans())

    def dense(map: Tensor) -> Tensor:
        return functional.interpolate(map, mode="bilinear", align_corners=corners, **arguments)

    def sparse(taps: Tensor, case: Case) -> Tensor:
        weights = case.taps("weights")
        assert weights.dtype == torch.float32
        return (taps * weights[..., None]).sum(2)

    scales = {"scale_y": factors[0], "scale_x": factors[1]}
    return Stencil.of("bilinear", source, target, align_corners=corners, **scales), dense, sparse


def pad(draw: st.DrawFn, source: Domain) -> Drawn:
    mode = draw(st.sampled_from(["constant", "reflect", "replicate", "circular"]))
    sides = []
    for size in (source.width, source.height):
        limit = {"reflect": size - 1, "circular": size}.get(mode, 4)
        lowest = -(size - 1) // 2 if mode == "constant" else 0
        sides += [draw(st.integers(lowest, min(limit, 4))) for _ in range(2)]
    left, right, top, bottom = sides
    target = Domain(source.height + top + bottom, source.width + left + right)

    def dense(map: Tensor) -> Tensor:
        return functional.pad(map, sides, mode)

    parameters = {"left": left, "right": right, "top": top, "bottom": bottom, "mode": mode}
    return Stencil.of("pad", source, target, **parameters), dense, _one_tap


def pixel_shuffle(draw: st.DrawFn, source: Domain) -> Drawn:
    def dense(map: Tensor) -> Tensor:
        return functional.pixel_shuffle(map, 2)

    def sparse(taps: Tensor, case: Case) -> Tensor:
        subposition = case.taps("subposition")
        channels = subposition.expand(taps.shape[0], -1)[:, :, None]  # one output channel: CHANNELS == 2 * 2
        return taps[:, :, 0].gather(2, channels)

    target = Domain(source.height * 2, source.width * 2)
    return Stencil.of("pixel_shuffle", source, target, factor=2), dense, sparse


def pixel_unshuffle(draw: st.DrawFn, source: Domain) -> Drawn:
    factor = draw(st.sampled_from([f for f in (1, 2, 3) if source.height % f == 0 and source.width % f == 0]))

    def dense(map: Tensor) -> Tensor:
        return functional.pixel_unshuffle(map, factor)

    def sparse(taps: Tensor, case: Case) -> Tensor:
        return taps.transpose(2, 3).flatten(2)

    target = Domain(source.height // factor, source.width // factor)
    return Stencil.of("pixel_unshuffle", source, target, factor=factor), dense, sparse


KINDS = [window_of, transposed, nearest, nearest_exact, bilinear, pad, pixel_shuffle, pixel_unshuffle]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_stencil_equals_dense(kind: Callable, data: st.DataObject) -> None:
    torch.manual_seed(0)
    source = Domain(data.draw(st.integers(1, 9), label="height"), data.draw(st.integers(1, 9), label="width"))
    stencil, dense, sparse = kind(data.draw, source)
    batch = data.draw(st.integers(1, 3), label="batch")
    mask = data.draw(masks(max(source, stencil.target, key=lambda domain: domain.size), batch))
    case = Case.build(mask, stencil, batch, CHANNELS)
    outside = torch.zeros(batch, 1, CHANNELS, dtype=torch.float64)
    table = take(torch.cat([case.rows, take(case.recorded, case.taps("halo")), outside], 1), case.taps("table"))
    result = sparse(table, case)
    assert result.isfinite().all(), "a padding row was read, or was left without values"
    expected = dense(case.dense_mixed())
    assert expected.shape[2:] == (stencil.target.height, stencil.target.width)
    # Padding rows are computed as if active, so they are compared as well.
    torch.testing.assert_close(result.double(), case.target_rows(expected), atol=1e-5, rtol=1e-5)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_domain_invariants(data: st.DataObject) -> None:
    domain = Domain(data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)))
    batch = data.draw(st.integers(1, 3))
    mask = data.draw(masks(domain, batch))
    coarse = Domain(max(1, domain.height // 2), max(1, domain.width // 2))
    plan = build_plan(mask, [domain, coarse], [], "cpu")
    for each in (domain, coarse):
        active = reduce_mask(mask, each).flatten(1)
        index, valid = plan.tensor(PlanInput("index", each)), plan.tensor(PlanInput("valid", each))
        assert index.shape[0] in (1, mask.shape[0]) and index.is_contiguous() and index.dtype == torch.int64
        assert plan.count(each) == index.shape[1] == min(each.size, max(2, int(active.sum(1).max())))
        assert plan.density(each) == pytest.approx(active.float().mean().item())
        if valid is None:
            valid = torch.ones_like(index, dtype=torch.bool)
        else:
            assert not valid.all()
        for sample, (positions, flags) in enumerate(zip(index, valid, strict=True)):
            assert positions.unique().numel() == positions.numel()
            assert positions[flags].tolist() == active[sample].nonzero().flatten().tolist()
            assert not active[sample][positions[~flags]].any()


def test_buckets_hold_their_counts_and_waste_little() -> None:
    sizes = [bucket(count) for count in range(5000)]
    assert all(size >= count for count, size in enumerate(sizes))
    assert all(size <= max(count * 9 / 8, count + 15) for count, size in enumerate(sizes) if count)
    assert all(bucket(size) == size and size % 16 == 0 for size in sizes)
    assert len(set(sizes)) == 16 + 4 * 8 + 2  # to 256; to 4096; beyond


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_bucketed_plans_are_padded_ones(data: st.DataObject) -> None:
    """The same rows and taps as without buckets, in order of tiles, then padding; positions stay distinct."""
    domain = Domain(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    mask = data.draw(masks(domain, 2))
    stencil = window(domain)
    plain, padded = (build_plan(mask, [], [stencil], "cpu", bucketed) for bucketed in (False, True))
    index, valid = (padded.tensor(PlanInput(kind, domain)) for kind in ("index", "valid"))
    halo, table = (padded.tensor(PlanInput(kind, stencil)) for kind in ("halo", "table"))
    assert index.shape[1] == min(domain.size, bucket(plain.count(domain)))
    assert halo.shape[1] == bucket(halo.shape[1])
    plain_index, plain_halo = plain.tensor(PlanInput("index", domain)), plain.tensor(PlanInput("halo", stencil))
    rank = tile_order(domain).argsort()
    for sample in range(index.shape[0]):
        assert index[sample].unique().numel() == index.shape[1]
        active = int(mask.expand(2, -1, -1)[sample].sum())
        assert valid is None or int(valid[sample].sum()) == active
        assert sorted(index[sample, :active].tolist()) == plain_index[sample, :active].tolist()
        assert rank[index[sample, :active]].diff().gt(0).all()
        taps = [
            _positions(each.tensor(PlanInput("table", stencil))[sample, :active], own_index[sample], own_halo[sample])
            for each, own_index, own_halo in ((plain, plain_index, plain_halo), (padded, index, halo))
        ]
        # Padding rows of the source stand for recorded values as halo positions do.
        assert torch.equal(taps[0][index[sample, :active].argsort().argsort()], taps[1])


@pytest.mark.parametrize(("rows", "height", "width"), [(4, 2, 2), (16, 4, 4), (32, 4, 8), (64, 8, 8), (128, 8, 16)])
def test_rows_in_order_of_tiles_are_tiles(rows: int, height: int, width: int) -> None:
    """What one program of a kernel takes lies together, in both directions."""
    domain = Domain(16, 48)
    order = tile_order(domain)
    assert order.sort().values.tolist() == list(range(domain.size))
    for block in order.view(-1, rows):
        row, column = block // domain.width, block % domain.width
        assert int(row.max() - row.min()) == height - 1 and int(column.max() - column.min()) == width - 1
    assert ConvBlocks(rows, 64, 64).pixels == (height, width)


def test_maps_that_are_no_multiple_of_a_tile_are_ordered_too() -> None:
    for domain in (Domain(1, 1), Domain(5, 3), Domain(9, 17), Domain(1, 40)):
        order = tile_order(domain)
        assert order.sort().values.tolist() == list(range(domain.size))
        tiles = (order // domain.width // 8) * 100 + order % domain.width // 8
        assert tiles.diff().ge(0).all()


def _positions(table: Tensor, index: Tensor, halo: Tensor) -> Tensor:
    """The position of the map that each tap reads; -1 outside."""
    return torch.cat([index, halo, torch.tensor([-1])])[table]


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_halo_is_what_is_needed(data: st.DataObject) -> None:
    """The halo holds each inactive position that is read, once; it never holds an active one."""
    domain = Domain(data.draw(st.integers(2, 7)), data.draw(st.integers(2, 7)))
    mask = data.draw(masks(domain, 2))
    stencil = window(domain)
    plan = build_plan(mask, [], [stencil], "cpu")
    index = plan.tensor(PlanInput("index", domain))
    halo, table = plan.tensor(PlanInput("halo", stencil)), plan.tensor(PlanInput("table", stencil))
    assert halo.shape[1] >= 2
    active = mask.flatten(1)
    for sample in range(index.shape[0]):
        grown = torch.zeros(1, domain.size)
        grown[0, index[sample]] = 1.0
        grown = functional.max_pool2d(grown.view(1, domain.height, domain.width), 3, 1, 1).flatten() > 0
        expected = (grown & ~active[sample]).nonzero().flatten().tolist()
        assert halo[sample, : len(expected)].tolist() == expected
        used = table[sample].unique()
        used = used[(used >= index.shape[1]) & (used < index.shape[1] + halo.shape[1])] - index.shape[1]
        assert used.tolist() == list(range(len(expected)))


def test_inside_counts_taps_in_the_map() -> None:
    stencil = window(Domain(3, 3))
    plan = build_plan(torch.ones(1, 3, 3, dtype=torch.bool), [], [stencil], "cpu")
    assert plan.tensor(PlanInput("inside", stencil)).tolist() == [[4, 6, 4, 6, 9, 6, 4, 6, 4]]


def test_equal_masks_share_one_plan() -> None:
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    mask[0, 1:3, 2] = True
    plan = build_plan(mask.repeat(3, 1, 1), [Domain(5, 5)], [], "cpu")
    assert plan.tensor(PlanInput("index", Domain(5, 5))).tolist() == [[7, 12]]
    assert plan.tensor(PlanInput("valid", Domain(5, 5))) is None


def test_empty_mask_is_all_padding() -> None:
    stencil = window(Domain(4, 3))
    plan = build_plan(torch.zeros(1, 4, 3, dtype=torch.bool), [], [stencil], "cpu")
    assert plan.tensor(PlanInput("valid", Domain(4, 3))).tolist() == [[False, False]]
    assert plan.density(Domain(4, 3)) == 0.0


def test_unknown_requests_are_errors() -> None:
    domain = Domain(3, 3)
    plan = build_plan(torch.ones(1, 3, 3, dtype=torch.bool), [domain], [], "cpu")
    with pytest.raises(GraphError, match="no halo"):
        plan.tensor(PlanInput("halo", window(domain)))
    with pytest.raises(GraphError, match="no domain 7x2; it has 3x3"):
        plan.count(Domain(7, 2))
    with pytest.raises(GraphError, match="kinds are"):
        build_plan(torch.ones(1, 3, 3, dtype=torch.bool), [], [Stencil.of("hexagon", domain, domain)], "cpu")
    wrong = Stencil.of("pad", domain, domain, left=1, right=1, top=1, bottom=1, mode="constant")
    with pytest.raises(GraphError, match="5 positions"):
        build_plan(torch.ones(1, 3, 3, dtype=torch.bool), [], [wrong], "cpu")


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize(("size", "factor"), [(3, 1.3), (7, 2.4), (5, 0.5), (9, 1.9)])
def test_resizing_uses_the_factor_that_was_given(mode: str, size: int, factor: float) -> None:
    """A factor and the sizes it leads to do not agree; PyTorch uses the factor, unless the size stays the same."""
    map = torch.arange(float(size * size)).view(1, 1, size, size)
    dense = functional.interpolate(map, scale_factor=factor, mode=mode)
    scales = {"scale_y": factor, "scale_x": factor} | ({"align_corners": False} if mode == "bilinear" else {})
    stencil = Stencil.of(mode, Domain(size, size), Domain(*dense.shape[2:]), **scales)
    plan = build_plan(torch.ones(1, size, size, dtype=torch.bool), [], [stencil], "cpu")
    values = map.flatten()[plan.tensor(PlanInput("table", stencil))]  # everything is active: row number is position
    if mode == "bilinear":
        values = values * plan.tensor(PlanInput("weights", stencil))
    torch.testing.assert_close(values.sum(2), dense.flatten(1))
