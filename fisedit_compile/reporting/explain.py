"""What of a network becomes sparse, what stays dense, and why. Nothing is computed: the network is only traced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx
import torch
from torch import Tensor, fx
from torch.nn import functional

from fisedit_compile.errors import OptionError
from fisedit_compile.operators.records import Times
from fisedit_compile.operators.triton.chips import Chip
from fisedit_compile.options import Options, parse_options
from fisedit_compile.passes import Miss, Program, SparseProgram, build_program
from fisedit_compile.passes.common.report import MacCount
from fisedit_compile.private.dynamo import OptimizedModule, compile_settings
from fisedit_compile.private.operators import schema_of
from fisedit_compile.reporting import measured
from fisedit_compile.reporting.flow import flow_graph, write_graph
from fisedit_compile.reporting.kernels import KernelChoice, kernel_choices
from fisedit_compile.reporting.tables import Table, render
from fisedit_compile.runtime.masks import prepare_mask, reduce_mask, tile_mask
from fisedit_compile.runtime.plans import IndexPlan, build_plan
from fisedit_compile.runtime.spec import Domain, PlanInput, Site
from fisedit_compile.runtime.stats import format_bytes, format_count
from fisedit_compile.tracing.trace import DenseGraph, capture_all

#: Densities that the printed table shows.
DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.5)
KERNEL_DENSITIES = (0.05, 0.2, 0.6)
#: Operators that read few positions of a recorded map: the argument with the map, and the one with the positions.
PARTIAL_READS: dict[Any, tuple[int, int]] = {
    torch.ops.fisedit.gather_rows.default: (0, 1),
    torch.ops.fisedit.gather_taps.default: (1, 2),
    torch.ops.fisedit.conv_rows.default: (1, 2),
    torch.ops.fisedit.conv_choice.default: (1, 2),
    torch.ops.fisedit.conv_tiles.default: (1, 2),
    torch.ops.fisedit.norm_totals.default: (1, 3),
}


@dataclass(frozen=True)
class Cost:
    """What one edit call costs with a given mask.

    Attributes:
        density: active share of the mask at the network's input, 0 to 1.
        macs: multiply-accumulates.
        bytes_loaded: recorded bytes read, at the computed dtypes.
    """

    density: float
    macs: float
    bytes_loaded: int


@dataclass(frozen=True)
class GraphReport:
    """One of the network's graphs.

    Attributes:
        program: None when nothing of the graph can be masked.
        reason: why nothing of it is masked; None when something is.
        traced: whether it could be traced; one that could not runs as a whole.
    """

    program: Program | None
    reason: str | None = None
    traced: bool = True


def ragged_mask(density: float, domain: Domain, seed: int = 0) -> Tensor:
    """A blob with an uneven outline: bool ``[height, width]`` with a given share of active cells."""
    if not 0.0 < density <= 1.0:
        raise OptionError(f"density must be above 0 and at most 1, got {density}")
    generator = torch.Generator().manual_seed(seed)
    size = (domain.height, domain.width)
    noise = torch.randn(1, 1, 9, 9, generator=generator)
    field = functional.interpolate(noise, size, mode="bicubic", align_corners=True)[0, 0]
    y, x = (torch.linspace(-1, 1, count) for count in size)
    order = (field - 3.0 * torch.hypot(y[:, None], x[None, :])).flatten().argsort(descending=True)
    mask = torch.zeros(domain.size, dtype=torch.bool)
    mask[order[: max(1, round(density * domain.size))]] = True
    return mask.reshape(size)


def fine_mask(program: SparseProgram, mask: Any) -> Tensor:
    """A mask, or a ragged one for a density, at the resolution and batch of a program."""
    # On the host, whatever the device of the user's code is.
    with torch.device("cpu"):
        given = ragged_mask(mask, program.mask_domain) if isinstance(mask, float | int) else mask
        return reduce_mask(tile_mask(prepare_mask(given), program.batch), program.mask_domain)


class ExplainReport:
    """Sums over the graphs of a network; ``print`` shows them as tables."""

    def __init__(self, graphs: Sequence[GraphReport]) -> None:
        self.graphs = tuple(graphs)

    @property
    def programs(self) -> list[Program]:
        """Of the graphs that have one."""
        return [graph.program for graph in self.graphs if graph.program is not None]

    @property
    def mac_counts(self) -> list[MacCount]:
        """One entry for each convolution, linear layer, matrix product and attention."""
        return [count for program in self.programs for count in program.report.mac_counts]

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates of one dense call."""
        return sum(program.report.total_macs for program in self.programs)

    @property
    def sparse_macs(self) -> int:
        """Multiply-accumulates of what runs on active rows only, counted as if dense."""
        return sum(program.report.sparse_macs for program in self.programs)

    @property
    def sparse_mac_fraction(self) -> float:
        """Share of the multiply-accumulates that edits spend on active rows only, 0 to 1. Graphs that cannot be traced
        are not counted; ``dense_nodes`` lists them."""
        return self.sparse_macs / self.total_macs if self.total_macs else 0.0

    def macs_at(self, densities: Mapping[Domain, float]) -> float:
        """Multiply-accumulates of one edit call, given the share of active positions of each resolution."""
        return sum(program.report.macs_at(densities) for program in self.programs)

    @property
    def graph(self) -> networkx.DiGraph:
        """Resolutions of the network, what stays dense, and the operators in between; see ``reporting.flow``."""
        return flow_graph([program.report for program in self.programs])

    def write_graph(self, path: str | Path) -> None:
        """Write ``graph`` to a file: a drawing (``.svg``), for Graphviz (``.dot``), or node-link data (``.json``).

        Raises:
            OptionError: the file has another ending.
        """
        write_graph(self.graph, Path(path))

    @property
    def matches(self) -> Counter[str]:
        """Rewrites by pass."""
        return sum((program.report.matches for program in self.programs), Counter())

    @property
    def misses(self) -> list[Miss]:
        """Rules that looked at an operator and did not apply, each with its reason."""
        return [miss for program in self.programs for miss in program.report.misses]

    @property
    def lost(self) -> list[Miss]:
        """Operators behind which it is not known where positions lie on the mask, with the reason: all of them count as
        active there, so that nothing behind saves time."""
        return [miss for program in self.programs for miss in program.report.lost]

    @property
    def dense_nodes(self) -> list[Miss]:
        """Operators on feature maps that run densely, each with its reason; and graphs that do as a whole."""
        nodes = [miss for program in self.programs for miss in program.report.dense_nodes]
        for number, graph in enumerate(self.graphs):
            if graph.reason is not None:
                nodes.append(Miss("trace", f"graph {number}", "the whole graph", graph.reason))
        return nodes

    @property
    def seconds(self) -> Counter[str]:
        """Seconds by pass."""
        return sum((Counter(program.report.seconds) for program in self.programs), Counter())

    @property
    def bytes_stored(self) -> int:
        """Bytes that one recorded call stores, at the computed dtypes."""
        return sum(program.report.bytes_stored for program in self.programs)

    def cost(self, mask: Any) -> Cost:
        """What one edit call costs.

        Args:
            mask: as for ``Runtime.edit``; or a density above 0 and at most 1, which stands for a ragged mask.
        """
        macs, loaded, densities = 0.0, 0, []
        for program in self.programs:
            if not isinstance(program, SparseProgram):
                macs += program.report.total_macs
                continue
            fine = fine_mask(program, mask)
            densities.append(float(fine.float().mean()))
            if not fine.any():
                continue
            domains = {count.domain for count in program.report.mac_counts if count.domain is not None}
            macs += program.report.macs_at({d: float(reduce_mask(fine, d).float().mean()) for d in domains})
            plan = build_plan(fine, program.domains, program.stencils, torch.device("cpu"))
            loaded += bytes_read(program, plan)
        return Cost(max(densities, default=0.0), macs, loaded)

    def kernel_choices(self, mask: Any, chip: Chip) -> list[KernelChoice]:
        """What computes the sparse convolutions on a GPU.

        Args:
            mask: as for :meth:`cost`.
            chip: the GPU; it need not be at hand.
        """
        found = []
        for program in self.programs:
            if isinstance(program, SparseProgram) and (fine := fine_mask(program, mask)).any():
                plan = build_plan(fine, program.domains, program.stencils, torch.device("cpu"))
                found += kernel_choices(program, plan, chip)
        return found

    def describe_kernels(self, chip: Chip) -> str:
        """The choices for a few densities as tables."""
        tables = []
        for density in KERNEL_DENSITIES:
            choices = self.kernel_choices(density, chip)
            headings = ("rows", "channels", "taps", "count", "kernel", "microseconds", "dense")
            total = 1e3 * sum(choice.seconds for choice in choices)
            title = f"Convolutions on {chip}, ragged mask of {100 * density:g} %: {total:.2f} ms expected"
            table = Table(title, headings)
            for found in choices:
                problem, choice = found.problem, found.choice
                table.add_row(
                    f"{problem.total} of {problem.dense_total}",
                    f"{problem.inputs} to {problem.outputs}",
                    str(problem.taps),
                    str(found.count),
                    "dense" if found.dense else str(choice.blocks),
                    f"{1e6 * choice.seconds:.0f}",
                    f"{1e6 * choice.dense_seconds:.0f}",
                )
            tables.append(table)
        return render(tables)

    def bytes_loaded(self, density: float) -> int:
        """Recorded bytes that one edit call reads with a ragged mask of this density, at the computed dtypes."""
        return self.cost(density).bytes_loaded

    def __str__(self) -> str:
        return render(self._tables())

    def _tables(self) -> list[Table]:
        summary = Table("Summary")
        traced = sum(graph.traced for graph in self.graphs)
        summary.add_row("graphs", f"{len(self.graphs)}, of which {traced} traced")
        summary.add_row("sparse share of the multiply-accumulates", f"{100 * self.sparse_mac_fraction:.2f} %")
        summary.add_row("multiply-accumulates of a dense call", format_count(self.total_macs))
        summary.add_row("stored by a recorded call", format_bytes(self.bytes_stored))
        packed = sum(program.report.packed_bytes for program in self.programs)
        if packed:
            summary.add_row("packed copies of weights", format_bytes(packed))
        maps = [site for program in self.programs for site in program.report.attention_sites]
        if maps:
            kept = format_bytes(sum(site.bytes for site in maps))
            summary.add_row("cross-attention that can be stabilised", f"{len(maps)}, whose maps take {kept} a call")
        tables = [summary]
        if any(isinstance(program, SparseProgram) for program in self.programs):
            costs = Table("An edit call, ragged mask", ("density", "multiply-accumulates", "of dense", "loaded"))
            for density in DENSITIES:
                cost = self.cost(density)
                share = cost.macs / self.total_macs if self.total_macs else 1.0
                row = format_count(cost.macs), f"{100 * share:.1f} %", format_bytes(cost.bytes_loaded)
                costs.add_row(f"{100 * density:g} %", *row)
            tables.append(costs)
        passes = Table("Passes", ("pass", "rewrites", "rules that did not apply", "seconds"))
        missed = Counter(miss.pass_name for miss in self.misses)
        matches, seconds = self.matches, self.seconds
        for name in dict.fromkeys((*seconds, *matches, *missed)):
            passes.add_row(name, str(matches[name]), str(missed[name]), f"{seconds[name]:.2f}")
        tables.append(passes)
        for title, found in (
            ("Where positions go is not known: all behind them are active", self.lost),
            ("Dense", self.dense_nodes),
            ("Rules that did not apply", self.misses),
        ):
            reasons = Counter((miss.target, miss.reason) for miss in found)
            first = {(miss.target, miss.reason): miss.node for miss in reversed(found)}
            if reasons:
                table = Table(title, ("operator", "count", "first", "reason"))
                for (target, reason), count in reasons.most_common():
                    table.add_row(target, str(count), first[target, reason], reason)
                tables.append(table)
        rows = sum((program.report.row_convolutions for program in self.programs), Counter())
        if rows:
            table = Table("Convolutions with no other way than row by row", ("reason", "count"))
            for reason, count in rows.most_common():
                table.add_row(reason, str(count))
            tables.append(table)
        for title, times in (
            ("3x3 convolutions", self.measured_convolutions()),
            ("Products", self.measured_products()),
            ("Attention", self.measured_attention()),
        ):
            if times:
                table = Table(f"{title}, as measured on this machine", ("case", "fastest", "milliseconds"))
                for case, spent in times.items():
                    shown = ", ".join(f"{way} {1000 * second:.2f}" for way, second in spent.items())
                    table.add_row(case, min(spent, key=spent.__getitem__), shown)
                tables.append(table)
        return tables

    def measured_convolutions(self) -> dict[str, Times]:
        """Seconds of each way to compute the network's 3x3 convolutions, by case, as far as they were measured on this
        machine: on rows by edits, which take the fastest way, and on whole maps by recorded and dense calls."""
        return measured.measured_convolutions(self.programs)

    def measured_products(self) -> dict[str, Times]:
        """The same of the network's products: of few rows by edits, and of whole maps."""
        return measured.measured_products(self.programs)

    def measured_attention(self) -> dict[str, Times]:
        """The same of the network's attention, for all numbers of queries that were measured."""
        return measured.measured_attention(self.programs)


def bytes_read(program: SparseProgram, plan: IndexPlan) -> int:
    """Recorded bytes that the edit graph reads: few rows of most maps, all of those that attention looks at."""
    placeholders = [node for node in program.edit.graph.nodes if node.op == "placeholder"]
    sources = dict(zip(placeholders, program.edit_inputs, strict=True))
    sites = {site.name: site for site in program.sites}
    total = 0
    for node, source in sources.items():
        if source.kind == "recorded":
            site = sites[str(source.reference)]
            total += min(site.bytes, sum(_read_by_users(node, site, sources, plan)))
    return total


def _read_by_users(node: fx.Node, site: Site, sources: Mapping[fx.Node, Any], plan: IndexPlan) -> list[int]:
    """Bytes of ``site`` that each reader of ``node``, a view of it, reads."""
    counts: list[int] = []
    for user in node.users:
        if user.op == "output":
            continue
        map_at, index_at = PARTIAL_READS.get(user.target, (None, None))
        if map_at is not None and index_at is not None and user.args[map_at] is node:
            counts.append(_rows_read(user.args[index_at], site, sources, plan))
        elif user.args and user.args[0] is node and _is_view(user):
            counts.extend(_read_by_users(user, site, sources, plan))
        else:
            counts.append(site.bytes)
    return counts


def _rows_read(index: Any, site: Site, sources: Mapping[fx.Node, Any], plan: IndexPlan) -> int:
    source = sources.get(index)
    if source is None or not isinstance(source.reference, PlanInput) or site.domain is None:
        return site.bytes
    positions = plan.tensor(source.reference)
    return site.bytes if positions is None else site.bytes * positions.shape[1] // site.domain.size


def _is_view(node: fx.Node) -> bool:
    """Whether the node only looks at its first input in another way."""
    schema = schema_of(node.target)
    return schema is not None and any(returned.alias_info is not None for returned in schema.returns)


def explain(model: Any, *args: Any, **kwargs: Any) -> ExplainReport:
    """Trace one call of a network and tell what becomes sparse.

    The network and its inputs may be on the meta device. Nothing is computed, recorded or compiled.

    Args:
        model: a module or function; the options of a module that ``torch.compile(..., backend="fisedit")`` returned
            count, others are taken with the default ones.
        *args: of the call.
        **kwargs: of the call.

    Raises:
        OptionError: one of the module's options is unknown or has an invalid value.
    """
    settings = compile_settings(model, "fisedit") if isinstance(model, OptimizedModule) else {}
    devices = {value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
    _, options = parse_options(settings.get("mode"), settings.get("options"), devices)
    return explain_with(options, model, *args, **kwargs)


def explain_with(options: Options, model: Any, *args: Any, **kwargs: Any) -> ExplainReport:
    """As ``explain``, with options of the backend."""
    graphs = []
    for traced in capture_all(model, *args, **kwargs):
        if isinstance(traced, DenseGraph):
            graphs.append(GraphReport(None, traced.reason, traced=False))
            continue
        program = build_program(traced.gm, traced.input_infos, options, traced.opaque)
        graphs.append(GraphReport(program, program.report.dense_reason, traced.opaque is None))
    return ExplainReport(graphs)
