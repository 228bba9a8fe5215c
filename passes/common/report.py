"""What the passes did and did not do, and why: the source of ``fisedit.explain``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import networkx
from torch import fx

from fisedit_compile.runtime.spec import Domain, Site

MacKind = Literal["convolution", "linear", "product", "attention", "transformer layer", "attention layer"]
Connection = Literal["rows", "stencil", "attention", "statistics", "ends locality"]


@dataclass(frozen=True)
class Miss:
    """A rule that looked at a node and did not apply."""

    pass_name: str
    node: str
    target: str
    reason: str


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates of one node of the dense graph.

    ``domain`` is the resolution of its output rows when the node runs on rows, else None.
    """

    node: str
    kind: MacKind
    macs: int
    domain: Domain | None


@dataclass
class Report:
    """Counts, reasons and sizes gathered while a program is built.

    Attributes:
        matches: rewrites by pass name.
        misses: rules that did not apply, each with its reason.
        dense_nodes: nodes that stay dense although they read or make a spatial value.
        lost: operators behind which it is not known where positions lie on the mask, so that all of them are active.
        mac_counts: one entry for each convolution, linear layer, matrix product and attention.
        sites: what one recorded call stores.
        attention_sites: the attention maps that it stores besides, when asked to.
        seconds: time spent by pass name.
        row_convolutions: how many convolutions are computed row by row only, by the reason.
        packed_bytes: what packed copies of weights take.
        dense_reason: why the graph has no edit graph; None when it has one.
        flow: which operators lead from one resolution to another, as ``domain_graph`` has it.
    """

    matches: Counter[str] = field(default_factory=Counter)
    misses: list[Miss] = field(default_factory=list)
    dense_nodes: list[Miss] = field(default_factory=list)
    lost: list[Miss] = field(default_factory=list)
    mac_counts: list[MacCount] = field(default_factory=list)
    sites: tuple[Site, ...] = ()
    attention_sites: tuple[Site, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    row_convolutions: Counter[str] = field(default_factory=Counter)
    packed_bytes: int = 0
    dense_reason: str | None = None
    flow: networkx.MultiDiGraph = field(default_factory=networkx.MultiDiGraph)

    def match(self, pass_name: str) -> None:
        """Count one rewrite."""
        self.matches[pass_name] += 1

    def miss(self, pass_name: str, node: fx.Node, reason: str) -> None:
        """Note that the rule of ``pass_name`` did not apply to ``node``."""
        self.misses.append(Miss(pass_name, node.name, str(node.target), reason))

    def stays_dense(self, node: fx.Node, reason: str) -> None:
        """Note that ``node`` runs densely."""
        self.dense_nodes.append(Miss("densify", node.name, str(node.target), reason))

    def lose(self, pass_name: str, node: fx.Node, reason: str) -> None:
        """Note that it is not known how ``node`` moves positions."""
        self.lost.append(Miss(pass_name, node.name, str(node.target), reason))

    @property
    def connections(self) -> Counter[tuple[str, str, str]]:
        """How many values flow between two resolutions, by kind of connection."""
        return Counter((str(source), str(target), data["kind"]) for source, target, data in self.flow.edges(data=True))

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates of one dense call."""
        return sum(count.macs for count in self.mac_counts)

    @property
    def sparse_macs(self) -> int:
        """Multiply-accumulates of the nodes that run on rows, counted as if dense."""
        return sum(count.macs for count in self.mac_counts if count.domain is not None)

    @property
    def sparse_mac_fraction(self) -> float:
        """Share of the multiply-accumulates that the edit graph spends on rows only; 0.0 without any."""
        return self.sparse_macs / self.total_macs if self.total_macs else 0.0

    def macs_at(self, densities: Mapping[Domain, float]) -> float:
        """Multiply-accumulates of one edit call, given the share of active positions of each resolution."""
        return sum(
            count.macs * (densities[count.domain] if count.domain is not None else 1.0) for count in self.mac_counts
        )

    @property
    def bytes_stored(self) -> int:
        """Bytes one recorded call stores at the computed dtypes."""
        return sum(site.bytes for site in self.sites)
