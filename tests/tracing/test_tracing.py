"""Tracing: one functional graph of whole operators, with the values, names and inputs the passes rely on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, fx, nn
from torch.nn import functional

from fisedit_compile.private import dynamo
from fisedit_compile.tracing import description
from fisedit_compile.tracing.description import UntraceableGraph, describe
from fisedit_compile.tracing.trace import TracedGraph, capture, capture_all, trace
from support.diffusers_networks import DIFFUSERS, unet
from support.tolerances import assert_identical

aten = torch.ops.aten
NETWORKS = {network.name: network for network in DIFFUSERS}
DECOMPOSED = (
    "addmm",
    "native_layer_norm",
    "native_group_norm",
    "convolution",
    "_softmax",
    "sigmoid",
    "aten.t.",
    "view",
)


class Function(nn.Module):
    """A function with one parameter, one buffer and one plain tensor attribute."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(3, 1, 1))
        self.register_buffer("count", torch.zeros(3, 1, 1))
        self.plain = torch.ones(3, 1, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, *arguments: Any) -> Any:
        return self.function(self, *arguments)


class Comparing:
    """A backend that traces every graph and compares it with Dynamo's at every call."""

    def __init__(self) -> None:
        self.graphs: list[TracedGraph] = []
        self.calls = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        traced = trace(gm, describe(gm, example_inputs))
        self.graphs.append(traced)

        def run(*arguments: Any) -> Any:
            self.calls += 1
            expected = gm(*arguments)
            with torch.no_grad():
                for got, wanted in zip(traced.gm(*arguments), expected, strict=True):
                    assert_identical(got, wanted.detach(), "traced graph")
            return expected

        return run


def targets(traced: TracedGraph) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(str(node.target) for node in traced.gm.graph.nodes if node.op == "call_function")


def picture() -> Tensor:
    """``[2, 3, 8, 9]``."""
    return torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd15 with residuals", "ddpm", "decoder", "encoder", "old attention"])
def test_networks_of_diffusers_are_one_functional_graph_of_whole_operators(name: str) -> None:
    network = NETWORKS["sd15" if name == "old attention" else name]
    module = network.module()
    if name == "old attention":
        module.get_submodule("network").set_attn_processor(AttnProcessor())  # type: ignore[operator]
    backend = Comparing()
    with torch.no_grad():
        torch.compile(module, backend=backend)(*network.inputs(0))
    assert backend.calls == len(backend.graphs) == 1, "it is one graph, and it computes the same"
    traced = backend.graphs[0]
    found = targets(traced)
    assert not [target for target in found if any(part in target for part in DECOMPOSED)]
    assert {"aten.conv2d.default", "aten.group_norm.default", "aten.linear.default", "aten.silu.default"} <= set(found)
    attention = "aten.baddbmm.default" if name == "old attention" else "aten.scaled_dot_product_attention.default"
    assert found[attention] >= 1
    for node in traced.gm.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta, node
            assert not getattr(node.target, "_schema", None) or not node.target._schema.is_mutable, node
    modules = {path.removeprefix("network.") for path, _ in module.named_modules()}
    convolutions = [node for node in traced.gm.graph.nodes if node.target is aten.conv2d.default]
    assert {node.meta["module_path"].removeprefix("network.") for node in convolutions} <= modules
    assert len({node.meta["module_path"] for node in convolutions}) == len(convolutions)
    kinds = Counter(info.kind for info in traced.input_infos)
    unused = {"decoder": ("network.encoder.", "network.quant"), "encoder": ("network.decoder.", "network.post_quant")}
    used = [path for path, _ in module.named_parameters() if not path.startswith(unused.get(name, "-"))]
    assert sorted(info.name for info in traced.input_infos if info.kind == "parameter") == sorted(used)
    assert kinds["scalar"] == len([shape for shape in network.shapes if len(shape) <= 1])
    assert kinds["user"] == len([shape for shape in network.shapes if len(shape) > 1])


def test_names_of_inputs_and_modules_are_those_of_the_model() -> None:
    (traced,) = capture(unet().eval(), torch.randn(2, 4, 8, 6), torch.tensor(3.0), torch.randn(2, 7, 20))
    names = {info.name: info.kind for info in traced.input_infos}
    assert names["network.conv_in.weight"] == "parameter"
    assert names["network.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias"] == "parameter"
    assert [name for name, kind in names.items() if kind == "scalar"] == ["timestep"]
    assert {name for name, kind in names.items() if kind == "user"} == {"x", "prompt"}
    paths = {node.meta["module_path"] for node in traced.gm.graph.nodes}
    assert "network.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2" in paths


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['conv']._parameters['weight']", "conv.weight"),
        ("L['self'].__dict__['_modules']['down'].0.__dict__['_modules']['conv']", "down.0.conv"),
        ("L['args'][1]", "args[1]"),
        ("L['kwargs']['encoder_hidden_states']", "encoder_hidden_states"),
        ("L['self'].scale", "scale"),
        ("___from_numpy(L['self'].scale)", "scale"),
    ],
)
def test_readable_names(source: str, name: str) -> None:
    assert description.readable_name(source) == name


def test_everything_a_module_holds_is_a_parameter() -> None:
    (traced,) = capture(Function(lambda self, x: x * self.weight + self.count + self.plain), picture())
    kinds = {info.name: info.kind for info in traced.input_infos}
    assert kinds == {"args[0]": "user", "weight": "parameter", "count": "parameter", "plain": "parameter"}


def test_what_a_module_holds_as_numpy_is_compared_by_value() -> None:
    """Dynamo makes new tensors of it at every call, so identities say nothing."""
    module = Function(lambda self, x: x * self.number + torch.as_tensor(self.table)[None, :, None, None])
    module.number, module.table = numpy.float64(2.5), numpy.ones(picture().shape[1], numpy.float32)
    (traced,) = capture(module, picture())
    kinds = {info.name: info.kind for info in traced.input_infos}
    assert kinds == {"args[0]": "user", "number": "scalar", "table": "scalar"}


def local_changes(self: Function, x: Tensor) -> Tensor:
    y = x.clone()
    y.add_(1).relu_()
    y[:, 0] = 3.0
    y[:, :, 1:3, 2:] *= 2
    return y + torch.tensor(2.5) * torch.ones_like(y).fill_(4.0)


def without_gradient(self: Function, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 2
    return x + y


def idle_autocast(self: Function, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return x @ x.transpose(-1, -2)


@pytest.mark.parametrize("function", [local_changes, without_gradient, idle_autocast])
def test_side_effects_inside_the_graph_become_functional(function: Callable[..., Tensor]) -> None:
    backend = Comparing()
    torch.compile(Function(function), backend=backend)(picture())
    assert backend.calls == 1
    (traced,) = backend.graphs
    assert all(
        isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable
        for node in traced.gm.graph.nodes
        if node.op == "call_function"
    )


def batch_statistics(self: Function, x: Tensor) -> Tensor:
    return self.norm(x)


def changes_buffer(self: Function, x: Tensor) -> Tensor:
    self.count.add_(1)  # type: ignore[operator]
    return x + self.count


def changes_input(self: Function, x: Tensor) -> Tensor:
    x.mul_(2)
    return x + 1


def busy_autocast(self: Function, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x.transpose(-1, -2)


def checkpointed(self: Function, x: Tensor) -> Tensor:
    result: Tensor = torch.utils.checkpoint.checkpoint(lambda y: y.sin(), x, use_reentrant=False)
    return result


@torch.library.custom_op("fisedit_tests::double_", mutates_args=("x",))
def double_(x: Tensor) -> None:
    x.mul_(2)


def custom_change(self: Function, x: Tensor) -> Tensor:
    y = x + 1
    double_(y)
    return y


def writes_into_windows(self: Function, x: Tensor) -> Tensor:
    y = x + 1
    y[:1].as_strided((2, 2), (3, 1)).select(0, 1).fill_(0)
    return y


def strided(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Callable[..., Any]:
    return lambda self, x: (x * 2).as_strided(size, stride, offset)


REFUSED: list[tuple[Callable[..., Any], str]] = [
    (batch_statistics, "changes its inputs in place: .*norm.running_mean"),
    (changes_buffer, "changes its inputs in place: count"),
    (changes_input, r"changes its inputs in place: args\[0\]"),
    (lambda self, x: functional.dropout(x, 0.5, training=True), "dropout.default is random"),
    (lambda self, x: functional.rrelu(x, training=True), "rrelu.default is random"),
    (lambda self, x: x + torch.rand_like(x), "rand_like.default is random"),
    (lambda self, x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1), "attention.default is random"),
    (busy_autocast, "switches autocast"),
    (checkpointed, "higher-order operator tag_activation_checkpoint"),
    (custom_change, "higher-order operator auto_functionalized"),
    (writes_into_windows, "RuntimeError: .* a mutation on a view chain"),
    (lambda self, x: torch.vmap(torch.sin)(x), "a function transform of torch.func, such as vmap"),
    (strided((2, 2), (1, 1), 3), "as_strided.default looks at other values than those of its input"),
    (strided((2, 2), (1, 10**6)), "as_strided.default looks at other values than those of its input"),
    (lambda self, x: (x * 2).transpose(1, 2).as_strided((3,), (2,)), "looks at values that do not lie in order"),
]


def test_operators_that_look_at_strides_look_at_elements_in_order() -> None:
    def function(self: Function, x: Tensor) -> Tensor:
        rows = (x * 2).transpose(1, 2).contiguous()
        windows = rows.as_strided((3, 4), (2, 1))
        turned = torch.view_as_real(torch.view_as_complex(rows[..., :2].contiguous()) * 1j)
        return windows.sum() + turned.sum() + rows.view(torch.int16).float().mean() + x

    (traced,) = capture(Function(function), picture())
    found = targets(traced)
    expected = {f"fisedit.{name}.default": 1 for name in ("as_strided", "complex_of_pairs", "reinterpreted")}
    assert {name: count for name, count in found.items() if name.startswith("fisedit.")} == expected
    assert not {"aten.as_strided.default", "aten.view_as_complex.default", "aten.view.dtype"} & set(found)


@pytest.mark.parametrize(("function", "reason"), REFUSED)
def test_graphs_that_stay_dense_say_why(function: Callable[..., Any], reason: str) -> None:
    module = Function(function)
    (found,) = capture_all(module, picture())
    assert isinstance(found, TracedGraph) and found.opaque is not None
    with pytest.raises(UntraceableGraph, match=reason) as caught:
        capture(module, picture())
    assert str(caught.value) == found.opaque.reason


def test_capturing_computes_nothing() -> None:
    module, x = Function(changes_buffer), picture()
    before = x.clone()
    capture_all(module, x)
    capture_all(Function(changes_input), x)
    assert_identical(x, before, "the input")
    assert module.count.eq(0).all()


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: functional.dropout(x, 0.5, training=False),
        lambda self, x: functional.dropout(x, 0.0, training=True),
        lambda self, x: functional.rrelu(x, training=False),
        lambda self, x: functional.scaled_dot_product_attention(x, x, x),
    ],
)
def test_operators_that_are_random_in_training_only(function: Callable[..., Any]) -> None:
    assert len(capture(Function(function), picture())) == 1


def test_python_ints_that_are_no_sizes_stay_inputs() -> None:
    backend = Comparing()
    compiled = torch.compile(Function(lambda self, x, number: x * number + torch.tensor([number])), backend=backend)
    for number in (981, 961, 941, 921, 1, 0):
        compiled(picture(), number)
    assert (len(backend.graphs), backend.calls) == (2, 6), "all values but the first share a graph"
    assert backend.graphs[0].numbers == ()
    traced = backend.graphs[1]
    (position,) = traced.numbers
    assert traced.input_infos[position].kind == "scalar"
    assert position not in traced.constants
    assert traced.steady == (() if dynamo.INTEGERS_CHOOSE_GRAPHS else (position,))
    assert [node for node in traced.gm.graph.nodes if node.op == "placeholder"][position].users


def test_python_floats_stay_inputs() -> None:
    backend = Comparing()
    compiled = torch.compile(Function(lambda self, x, number: x * number), backend=backend)
    for number in (0.5, 0.25, 0.125):
        compiled(picture(), number)
    assert (len(backend.graphs), backend.calls) == (2, 3)
    assert len(backend.graphs[1].numbers) == 1
    assert backend.graphs[1].steady == backend.graphs[1].numbers, "a dynamic float takes the first value as well"


def test_python_ints_that_are_sizes_or_decide_are_fixed() -> None:
    backend = Comparing()
    compiled = torch.compile(Function(lambda self, x, count: x.reshape(count, -1)), backend=backend)
    for count in (2, 4, 8):
        compiled(picture(), count)
    assert (len(backend.graphs), backend.calls) == (3, 3)
    assert all(traced.numbers == () for traced in backend.graphs)
    assert len(backend.graphs[1].constants) == 1


def test_each_resolution_is_a_static_graph() -> None:
    backend = Comparing()
    compiled = torch.compile(Function(lambda self, x: x * self.weight), backend=backend)
    for width in (5, 6, 7, 7, 6):
        compiled(torch.randn(2, 3, 4, width))
    assert (len(backend.graphs), backend.calls) == (3, 5)
    for traced, width in zip(backend.graphs, (5, 6, 7), strict=True):
        (node,) = (node for node in traced.gm.graph.nodes if node.target is aten.mul.Tensor)
        assert tuple(node.meta["val"].shape) == (2, 3, 4, width)
        assert all(type(size) is int for size in node.meta["val"].shape)
        assert all(not node.users for at, node in enumerate(traced.gm.graph.nodes) if at in traced.constants), (
            "sizes are fixed"
        )


def test_the_graph_does_not_depend_on_the_gradient_mode() -> None:
    network = NETWORKS["decoder"]
    codes = []
    for guard in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        torch.compiler.reset()
        backend = Comparing()
        with guard():
            torch.compile(network.module().requires_grad_(True), backend=backend)(*network.inputs(0))
        codes.append(backend.graphs[0].gm.code)
    assert codes[0] == codes[1] == codes[2]


def test_capture_on_the_meta_device() -> None:
    network = NETWORKS["sd15"]
    inputs = [torch.empty(shape, device="meta") for shape in network.shapes]
    (traced,) = capture(network.module().to("meta"), *inputs)
    (real,) = capture(network.module(), *network.inputs(0))
    copies = {"aten.clone.default"}  # attention leaves other strides on the meta device
    assert {k: v for k, v in targets(traced).items() if k not in copies} == {
        k: v for k, v in targets(real).items() if k not in copies
    }
    assert {node.meta["val"].device.type for node in traced.gm.graph.nodes if node.op == "placeholder"} == {"meta"}


def test_capture_never_runs_into_dynamos_limit() -> None:
    """The graphs of explanations must not count against those of the user's model."""
    module = Function(lambda self, x: x * self.weight)
    for _ in range(10):
        assert len(capture(module, picture())) == 1
    backend = Comparing()
    with torch.compiler.set_stance("default"):
        torch.compile(module, backend=backend)(picture())
    assert backend.calls == 1


def test_capture_follows_graph_breaks() -> None:
    def broken(self: Function, x: Tensor) -> Tensor:
        y = x * self.weight
        print("", end="")
        return y + 1

    first, second = capture(Function(broken), picture())
    assert targets(first) == {"aten.mul.Tensor": 1}
    assert targets(second) == {"aten.add.Tensor": 1}


def test_constants_keep_their_values() -> None:
    (traced,) = capture(Function(lambda self, x: x + torch.tensor([1.5, 2.5, 3.5]).reshape(3, 1, 1)), picture())
    (node,) = (node for node in traced.gm.graph.nodes if node.op == "get_attr")
    constant = getattr(traced.gm, str(node.target))
    assert type(constant) is Tensor
    assert constant.flatten().tolist() == [1.5, 2.5, 3.5]
