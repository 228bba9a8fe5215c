"""Find which values are spatial, at which resolution, with which dimensions.

Why: every later pass asks this of its operands. Equal sizes do not mean equal places: where positions were cut, moved
or joined, a domain has a cover of its own (movement.py).

Before: no annotations
After:  ``node.meta["spatial"] = Spatial(domain, dims)`` on spatial values (``"spatial_outputs"``, a list, on nodes
        with several outputs), ``node.meta["origin"]`` on every node, and ``node.meta["dense_reason"]`` on operators
        that read a spatial value and stay dense. Where values from different places meet, and where an output lies
        at another place than it is masked at, ``alias(x)`` is x at the other place.

Conditions for an input to be spatial:
1. It is a floating tensor of rank 4 with more than one position, and not a parameter; or it is one of the tokens that
   the user says are pictures (tokens.py), for which condition 2 holds.
2. It flows into a convolution, norm or resampling through elementwise and layout operators only; or it has more than
   one row and column, does not flow into the mask of an attention, and no other input flows into one of those, unless
   it has the resolution of one that does. (The tokens of several images are [B, images, tokens, C].)
3. Its batch is that of the first such input.

An operator's output is spatial when its family's inference rule says so. Where a rule gives its reason, behind an
operator that no rule knows, and further on behind values that are not spatial but were made from one, recognise.py
tells. Values of one size from different places meet where both are active: attention may have queries from elsewhere.
A graph that returns a value about which it cannot tell has no annotations: it stays dense, with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from fisedit_compile.options import TOKENS_HINT
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.family import Family
from fisedit_compile.passes.common.ir import insert_call, reads_spatial, shape_of, spatial_of, unknown
from fisedit_compile.passes.common.layouts import HEIGHT, NCHW, NHWC, TOKENS, WIDTH, Spatial
from fisedit_compile.passes.common.meta import DENSE_REASON, MODULE_PATH, ORIGIN, SPATIAL, SPATIAL_OUTPUTS, VALUE
from fisedit_compile.passes.common.program import InputInfo
from fisedit_compile.passes.common.reading.attentions import is_within
from fisedit_compile.passes.common.reading.moves import joined_axis, read_crops
from fisedit_compile.passes.common.reading.writes import stretch_of
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.common.targets import (
    ALIAS,
    ATTENTIONS,
    GROUP_NORMS,
    JOINS,
    RESOLUTION_CHANGES,
    SPLITS,
    WRITES,
    aten,
    is_elementwise,
)
from fisedit_compile.passes.domains.geometry.domain_graph import (
    data_flow,
    domain_graph,
    is_attention_bias,
    reaches_anchor,
    reads_channels_last,
)
from fisedit_compile.passes.domains.geometry.geometry import Geometry, Places
from fisedit_compile.passes.domains.geometry.movement import Movement
from fisedit_compile.passes.domains.geometry.recognise import Recogniser
from fisedit_compile.passes.domains.geometry.returned import layout_of_returned, maker
from fisedit_compile.runtime.spec import Domain

NAME = "propagate_domains"
UNKNOWN = "no rule knows this operator"
NO_INPUT = "none of its inputs is a picture or a feature map"
BEHIND = "it reads what a dense operator made of a spatial value"


def find_spatial_inputs(graph: fx.Graph, infos: Sequence[InputInfo], report: Report) -> list[fx.Node]:
    """Annotate the spatial inputs; one of rank 4 or of tokens that is not spatial is reported with its reason."""
    flow = data_flow(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    known: dict[fx.Node, tuple[Spatial, bool]] = {}
    for node, info in zip(placeholders, infos, strict=True):
        value = node.meta.get(VALUE)
        if info.tokens is not None:
            known[node] = (Spatial(info.tokens, TOKENS), True)
            continue
        if info.kind != "user" or not isinstance(value, torch.Tensor) or value.dim() != 4:
            continue
        dims = NHWC if reads_channels_last(flow, node.name) else NCHW
        size = (value.shape[dims.index(name)] for name in (HEIGHT, WIDTH))
        known[node] = (Spatial(Domain(*map(int, size)), dims), reaches_anchor(flow, node.name))
    certain = {s.domain for node, (s, anchored) in known.items() if anchored and node.meta[VALUE].is_floating_point()}
    found: list[fx.Node] = []
    for node, (spatial, anchored) in known.items():
        domain, batch = spatial.domain, shape_of(node)[0]
        if not node.meta[VALUE].is_floating_point() or domain.size < 2:
            report.miss(NAME, node, "it is not a floating tensor with more than one position")
        elif not anchored and is_attention_bias(flow, node.name):
            report.miss(NAME, node, "it is the mask of an attention")
        elif not anchored and min(domain.height, domain.width) < 2:
            report.miss(NAME, node, "it is a single row or column and reaches no convolution, norm or resampling")
        elif not anchored and certain and domain not in certain:
            report.miss(NAME, node, "it reaches no convolution, norm or resampling, unlike an input of another size")
        elif found and shape_of(found[0])[0] != batch:
            report.miss(NAME, node, f"its batch is {batch}, not {shape_of(found[0])[0]}")
        else:
            node.meta[SPATIAL] = spatial
            found.append(node)
    return found


def find_resolutions(derived: Sequence[fx.Node], batch: int, domains: set[Domain]) -> None:
    """Add the resolutions that padding, pooling, resizing, cropping and graphs of which nothing is known lead to, so
    that shapes can be recognised."""
    for node in derived:
        value = node.meta.get(VALUE)
        if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.shape[0] != batch:
            continue
        source = node.args[0] if node.args else None
        cropped = (
            node.target is aten.slice.Tensor
            and isinstance(source, fx.Node)
            and Domain(*shape_of(source)[2:]) in domains
        )
        domain = Domain(*shape_of(node)[2:])
        if (cropped or node.target in RESOLUTION_CHANGES or node.target is unknown) and domain.size > 1:
            domains.add(domain)


def _meet(node: fx.Node, movement: Movement, derived: dict[fx.Node, None]) -> None:
    """Bring operands of one size to the place of the result: what a row operator reads has the rows that it makes."""
    operands = [value for value in dict.fromkeys(node.all_input_nodes) if spatial_of(value) is not None]
    if node.target in ATTENTIONS and not is_within(node):
        _meet_keys(node, [value for value in operands if value is not node.args[0]], movement, derived)
        operands = [value for value in operands if value is node.args[0]]
    elif node.target in JOINS and (known := spatial_of(operands[0])) is not None and joined_axis(node, known):
        return
    elif node.target in WRITES and stretch_of(node) is not None:
        return
    elif node.target in GROUP_NORMS or not (len(operands) > 1 or is_elementwise(node.target)):
        return
    sizes: dict[Domain, list[fx.Node]] = {}
    for value in operands:
        sizes.setdefault(_domain(value).whole, []).append(value)
    for values in sizes.values():
        met = movement.met(node, values)
        for value in values:
            if _domain(value).cover != met.cover:
                node.replace_input_with(value, _at(value, node, met, movement, derived))


def _meet_keys(node: fx.Node, operands: list[fx.Node], movement: Movement, derived: dict[fx.Node, None]) -> None:
    """Bring keys and values to one place, at which both have all their active positions."""
    if len({_domain(value) for value in operands}) < 2 or len({_domain(value).whole for value in operands}) > 1:
        return
    size = _domain(operands[0]).whole
    both = movement.places.both(size, [movement.geometry(value) for value in operands])
    for value in operands:
        if _domain(value).cover != both.cover:
            node.replace_input_with(value, _at(value, node, both, movement, derived))


def _settle(node: fx.Node, movement: Movement, derived: dict[fx.Node, None]) -> None:
    """Bring a result that has the rows of its operands, and lies elsewhere because it depends on more, to its place."""
    spatial = spatial_of(node)
    if spatial is None or node not in movement.on_rows:
        return
    covers = {source.domain.cover for value in node.all_input_nodes if (source := spatial_of(value)) is not None}
    if covers == {spatial.domain.cover}:
        return
    (cover,) = covers
    geometry = movement.geometry(node)
    node.meta[SPATIAL] = spatial.at(cover)
    node.replace_all_uses_with(
        _at(node, node.next, geometry, movement, derived), delete_user_cb=lambda user: user.target is not ALIAS
    )


def _at(
    value: fx.Node, reader: fx.Node, geometry: Geometry, movement: Movement, derived: dict[fx.Node, None]
) -> fx.Node:
    """A value at another place, for one reader."""
    spatial = spatial_of(value)
    assert spatial is not None
    node = movement.aliases.get((value, reader)) or insert_call(reader, ALIAS, value)
    node.meta[SPATIAL] = spatial.at(geometry.cover)
    node.meta[ORIGIN] = node.name
    movement.put(node, geometry)
    derived[node] = None
    return node


def _take_aliases(graph: fx.Graph) -> dict[tuple[fx.Node, fx.Node], fx.Node]:
    """What an earlier run left: (value, reader) -> the value at the reader's place, which nobody reads now."""
    found = {}
    for node in graph.nodes:
        if node.target is ALIAS:
            source, readers = node.args[0], list(node.users)
            node.replace_all_uses_with(source)
            found.update({(source, reader): node for reader in readers})
    return found


def _domain(node: fx.Node) -> Domain:
    spatial = spatial_of(node)
    assert spatial is not None
    return spatial.domain


def _mask_outputs(graph: fx.Graph, movement: Movement, derived: dict[fx.Node, None]) -> None:
    """Bring each output, and what is joined with other tokens to one, to the place at which it is masked."""
    output = next(iter(reversed(graph.nodes)))
    joins = [value for value in output.all_input_nodes if value.target in JOINS and spatial_of(value) is None]
    for reader in (output, *joins):
        for value in reader.all_input_nodes:
            spatial = spatial_of(value)
            if spatial is None or value.op == "placeholder":
                continue
            geometry = movement.geometry(value)
            cover = movement.places.output(geometry, spatial.domain.whole)
            if cover != spatial.domain.cover:
                reader.replace_input_with(value, _at(value, reader, replace(geometry, cover=cover), movement, derived))


def _annotate(
    node: fx.Node,
    families: Sequence[Family],
    batch: int,
    domains: set[Domain],
    recogniser: Recogniser,
    movement: Movement,
) -> None:
    """Annotate a node that reads a spatial value."""
    family = next((family for family in families if family.matches(node.target)), None)
    inferred = family.infer(node) if family is not None else UNKNOWN
    if isinstance(inferred, Spatial) and shape_of(node)[inferred.batch_dim] != batch:
        inferred = f"its batch is not {batch}"
    if isinstance(inferred, list):
        node.meta[SPATIAL_OUTPUTS] = inferred
        domains.update(layout.domain.whole for layout in inferred)
    elif isinstance(inferred, Spatial):
        node.meta[SPATIAL] = movement.place(node, inferred, inferred=True)
        domains.add(inferred.domain.whole)
    else:
        node.meta[DENSE_REASON] = inferred
        _recognise(node, recogniser, movement)


def _recognise(node: fx.Node, recogniser: Recogniser, movement: Movement) -> None:
    """Annotate a node that is computed densely, if it is a map."""
    recogniser.recognise(node)
    layout = spatial_of(node)
    if layout is not None:
        node.meta[SPATIAL] = movement.place(node, layout, inferred=False)


def _annotate_output(getter: fx.Node, source: fx.Node, outputs: Sequence[Spatial], movement: Movement) -> None:
    """Annotate one of the outputs of a node that has several."""
    number = getter.args[1]
    assert isinstance(number, int)
    layout, whole = outputs[number], source.args[0]
    spatial = spatial_of(whole)
    assert isinstance(whole, fx.Node) and spatial is not None
    crops = read_crops(source, spatial) if source.target in SPLITS else None
    geometry = movement.geometry(whole)
    if crops is not None:
        geometry = movement.cropped(whole, crops[number], layout.domain)
    movement.put(getter, geometry)
    getter.meta[SPATIAL] = layout.at(geometry.cover)


def _no_input(graph: fx.Graph, infos: Sequence[InputInfo]) -> str:
    """Why nothing is spatial, and which inputs the user could declare to be pictures."""
    placeholders = (node.meta.get(VALUE) for node in graph.nodes if node.op == "placeholder")
    tokens = [
        info.name
        for info, value in zip(infos, placeholders, strict=True)
        if info.kind == "user" and isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 3
    ]
    hint = f"{TOKENS_HINT} of tokens [B, H * W, C], here of {' or '.join(tokens)}" if tokens else ""
    return NO_INPUT + hint


def _forget(node: fx.Node) -> None:
    for key in (SPATIAL, SPATIAL_OUTPUTS, DENSE_REASON):
        node.meta.pop(key, None)


def _recognise_returned(
    graph: fx.Graph,
    families: Sequence[Family],
    recogniser: Recogniser,
    movement: Movement,
    derived: dict[fx.Node, None],
) -> None:
    """Return what may be a map or not as one, where the maps that it was made from tell its positions."""
    output = next(iter(reversed(graph.nodes)))
    for node in [node for node in recogniser.doubtful if output in node.users]:
        layout = layout_of_returned(node, families, recogniser.probe, derived)
        if layout is None or shape_of(node)[layout.batch_dim] != recogniser.batch:
            continue
        returned = movement.aliases.get((node, output)) or insert_call(output, ALIAS, node)
        output.replace_input_with(node, returned)
        if returned in recogniser.doubtful:  # as it was read by nobody
            recogniser.doubtful.remove(returned)
        returned.meta[ORIGIN], returned.meta[DENSE_REASON] = returned.name, BEHIND
        derived[returned] = None
        movement.place(returned, layout, inferred=False)
        geometry = movement.geometry(returned)
        cover = movement.places.output(geometry, layout.domain.whole)
        returned.meta[SPATIAL] = layout.at(cover)
        movement.put(returned, replace(geometry, cover=cover))


def _made_by(node: fx.Node, derived: dict[fx.Node, None]) -> str:
    """The operator that made a value, and the one to blame for what is not known of it, in words."""
    if node.target is unknown:
        return "an unknown operator"
    blamed = maker(node, derived)
    if blamed is node:
        return str(node.target)
    path = blamed.meta.get(MODULE_PATH)
    where = f" in module {path}" if path else ""
    return f"{node.target} of what {blamed.target}{where} made, of which it is not known where its positions are"


def _check_outputs(graph: fx.Graph, doubtful: Sequence[fx.Node], derived: dict[fx.Node, None], report: Report) -> None:
    """Keep the whole graph dense when it returns a value that may be a map or not: it could not be masked."""
    returned = next(iter(reversed(graph.nodes))).all_input_nodes
    for node in doubtful:
        if node not in returned:
            report.miss(NAME, node, f"its shape {list(shape_of(node))} does not tell which dimensions are positions")
            continue
        report.dense_reason = (
            f"its output {node.name} of shape {list(shape_of(node))} was made by {_made_by(node, derived)}, and its "
            "sizes do not tell which of its dimensions are positions; another resolution or number of channels may"
        )
        for other in graph.nodes:
            _forget(other)
        return


def propagate_domains(compilation: Compilation) -> None:
    """Run the pass on the traced graph; ``compilation.families`` know the layouts of their operators' outputs."""
    graph, infos, report = compilation.edit.graph, compilation.inputs, compilation.report
    earlier = _take_aliases(graph)
    inputs = find_spatial_inputs(graph, infos, report)
    domains = {spatial.domain for node in inputs if (spatial := spatial_of(node))}
    derived = dict.fromkeys(inputs)
    for node in graph.nodes:
        node.meta[ORIGIN] = node.name
        if node.op != "placeholder":
            _forget(node)
        if node.op == "call_function" and any(value in derived for value in node.all_input_nodes):
            derived[node] = None
    if not inputs:
        report.dense_reason = _no_input(graph, infos)
    else:
        batch = shape_of(inputs[0])[0]
        find_resolutions(list(derived), batch, domains)
        movement = Movement(Places(max(map(_domain, inputs), key=lambda domain: domain.size)), derived)
        movement.aliases = earlier
        for node in inputs:
            movement.input(node)
        recogniser = Recogniser(derived, batch, domains)
        for node in [node for node in derived if node not in inputs]:
            source = node.args[0] if node.target is operator.getitem else None
            outputs = source.meta.get(SPATIAL_OUTPUTS) if isinstance(source, fx.Node) else None
            if outputs is not None:
                assert isinstance(source, fx.Node)
                _annotate_output(node, source, outputs, movement)
            elif node.target is not operator.getitem and reads_spatial(node):
                _meet(node, movement, derived)
                _annotate(node, compilation.families, batch, domains, recogniser, movement)
                _settle(node, movement, derived)
            else:
                node.meta[DENSE_REASON] = BEHIND
                _recognise(node, recogniser, movement)
        _recognise_returned(graph, compilation.families, recogniser, movement, derived)
        _check_outputs(graph, recogniser.doubtful, derived, report)
        if report.dense_reason is None:
            _mask_outputs(graph, movement, derived)
            for node in earlier.values():
                if not node.users:
                    graph.erase_node(node)
            for node, reason in movement.lost.items():
                report.lose(NAME, node, reason)
    report.matches[NAME] += len(inputs)
    report.flow = domain_graph(graph)
