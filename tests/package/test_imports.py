"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from support.tree import PACKAGE, ROOT, defined_names, dotted_names, imports, modules, private_uses

#: Each part may import its own layer and those before it.
LAYERS = (
    ("errors", "options", "tracing.inputs", "tracing.replacements", "private"),
    ("runtime",),
    ("operators",),
    # The stages of the passes. "passes" itself is the list of all of them.
    ("passes.common",),
    ("passes.normalise",),
    ("passes.domains",),
    ("passes.sparsify",),
    ("passes.caching",),
    ("passes.processor",),
    ("passes",),
    ("tracing",),
    ("executing",),
    ("backend", "reporting"),
    ("scenes", "pipelines", ""),
    ("bench",),
    ("cli",),
)
LEVELS = {part: level for level, parts in enumerate(LAYERS) for part in parts}
MODULES = modules()


def part(name: str) -> str:
    """What a module belongs to, by the longest name that has a place in the order; "" for the package itself."""
    inner = name.split(".")[1:]
    known = (".".join(inner[:count]) for count in range(len(inner), 0, -1))
    found = next((names for names in known if names in LEVELS), None)
    if found is not None:
        return found
    return inner[0] if inner and f"{PACKAGE}.{inner[0]}" in MODULES else ""


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    own = part(module)
    assert own in LEVELS, f"{own} has no place in the order of imports"
    for found in imports(module, MODULES[module]):
        if found.name.split(".")[0] != PACKAGE:
            continue
        target = part(found.name)
        assert LEVELS[target] <= LEVELS[own], f"{MODULES[module]}:{found.line}: {own or PACKAGE} imports {found.name}"


@pytest.mark.parametrize("module", MODULES)
def test_folders_are_never_imported_by_their_bare_names(module: str) -> None:
    for found in imports(module, MODULES[module]):
        assert found.name.split(".")[0] not in ("passes", "runtime"), f"{MODULES[module]}:{found.line}: {found.name}"


#: What must be usable without graphs.
GRAPHLESS = ("errors", "options", "runtime")


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) in GRAPHLESS])
def test_the_runtime_knows_no_graphs(module: str) -> None:
    path = MODULES[module]
    for found in (*imports(module, path), *dotted_names(path)):
        assert not f"{found.name}.".startswith("torch.fx."), f"{path}:{found.line}: {found.name}"


def private_import(name: str) -> bool:
    """Whether an import is of a private name of another library."""
    first, *rest = name.split(".")
    return first not in (PACKAGE, "__future__") and any(_is_private(inner) for inner in rest)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


#: The one door: the folder that may use private names of other libraries.
PRIVATE = f"{PACKAGE}.private"
DEFINED = frozenset().union(*(defined_names(path) for path in MODULES.values()))


@pytest.mark.parametrize("module", [name for name in MODULES if not f"{name}.".startswith(f"{PRIVATE}.")])
def test_private_names_of_others_stay_in_one_folder(module: str) -> None:
    path = MODULES[module]
    imported = [found for found in imports(module, path) if private_import(found.name)]
    for found in (*imported, *private_uses(path, DEFINED)):
        pytest.fail(f"{path}:{found.line}: {found.name} belongs in {PRIVATE}")


def test_the_rule_sees_every_way_to_a_private_name(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import torch._dynamo\n"
        "from torch._dynamo.source import ConstantSource\n"
        "from ..private.graphs import trace_functional\n"
        "class Own:\n"
        "    def __init__(self, other):\n"
        "        self._value = other._value\n"
        "        self._modules\n"
        "        self._elsewhere()\n"
        "NAME = '_interrupt'\n"
        "def use(x, m, aten):\n"
        "    getattr(x, '_hf_hook')\n"
        "    x._orig_mod = m\n"
        "    torch.ops.mkldnn._linear_pointwise(x)\n"
        "    vars(m)['_modules']\n"
        "    importlib.import_module('torch._inductor.config')\n"
        "    torch._C._get_tracing_state()\n"
        "    aten._softmax.default, torch.ops.aten._to_copy, x._replace(a=1), x.__version__\n"
        "    x.endswith('_like'), f'{x}_row', f'_{x}'\n"
    )
    found = [item.name for item in imports(f"{PACKAGE}.pipelines.module", path) if private_import(item.name)]
    assert found == ["torch._dynamo", "torch._dynamo.source.ConstantSource"]
    assert defined_names(path) == {"_value"}
    assert sorted(item.name for item in private_uses(path, frozenset({"_elsewhere"}))) == sorted(
        [
            "self._modules",
            "_interrupt",
            "_hf_hook",
            "x._orig_mod",
            "torch.ops.mkldnn._linear_pointwise",
            "_modules",
            "torch._inductor.config",
            "torch._C._get_tracing_state",
            "torch._C",
        ]
    )


def test_the_reference_knows_no_passes() -> None:
    path = Path(__file__).parents[1] / "support" / "reference.py"
    for found in imports("reference", path):
        assert not found.name.startswith(f"{PACKAGE}.passes"), f"{path}:{found.line}: {found.name}"


def test_the_rules_see_every_way_to_import(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import torch._dynamo\n"
        "from torch import _C, fx\n"
        "from torch.utils._pytree import tree_map\n"
        "from ..passes.common import ir\n"
        "from . import spec\n"
        "def late():\n"
        "    import fisedit_compile.cli.main\n"
        "    return torch._C._get_tracing_state(), torch.ops.aten._softmax, torch.__version__\n"
    )
    ast.parse(path.read_text())
    found = [item.name for item in imports("fisedit_compile.runtime.module", path)]
    assert found == [
        "torch._dynamo",
        "torch._C",
        "torch.fx",
        "torch.utils._pytree.tree_map",
        "fisedit_compile.passes.common.ir",
        "fisedit_compile.runtime.spec",
        "fisedit_compile.cli.main",
    ]
    assert {"torch.ops.aten", "torch._C._get_tracing_state"} <= {item.name for item in dotted_names(path)}
    assert part("fisedit_compile.passes.common.ir") == "passes.common" and part("fisedit_compile.EditSession") == ""
    assert part("fisedit_compile.passes.manager") == "passes" and part("fisedit_compile.passes.new.rule") == "passes"


def test_every_stage_has_a_place_in_the_order() -> None:
    """A folder that has none could import all of them, and none could import it."""
    folders = {path.name for path in (ROOT / "passes").iterdir() if (path / "__init__.py").is_file()}
    assert folders == {name.removeprefix("passes.") for name in LEVELS if name.startswith("passes.")}
