"""Compile a launch to machine code and read what it needs, also where there is no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fisedit_compile.operators.triton.chips import Capability
from fisedit_compile.operators.triton.launches import Launch

#: Triton's names of pointer types.
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes.

    Attributes:
        registers: of each thread.
        spilled: bytes of memory that each thread uses because registers did not suffice.
        shared: bytes of shared memory.
        threads: of a program.
        assembly: PTX.
    """

    registers: int
    spilled: int
    shared: int
    threads: int
    assembly: str

    def wide_loads(self) -> int:
        """Instructions that load or copy 16 bytes at once."""
        return len(re.findall(r"ld\.global[.\w]*\.(?:v4\.b32|v2\.b64)|cp\.async[^;]*, 0x10", self.assembly))

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.spilled} bytes spilled, {self.shared} bytes shared"


def signature_of(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and known alignments of a kernel's parameters, as Triton finds them when launching.

    Memory of tensors counts as aligned to 16 bytes, which PyTorch's allocations are.
    """
    types: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int, ...], Any] = {}
    for position, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in constants:
            types[name] = "constexpr"
            continue
        value = launch.arguments[name]
        aligned = not parameter.do_not_specialize
        if value is None:
            types[name], constants[name] = "constexpr", None
        elif isinstance(value, torch.Tensor):
            types[name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        elif aligned and value == 1:
            types[name], constants[name] = "constexpr", 1
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if aligned and value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def specialisation(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches that compile to the same code."""
    types, constants, attributes = signature_of(launch)
    kernel = (launch.kernel.fn.__module__, launch.kernel.fn.__name__)
    parts = (types, constants, {str(key): str(value) for key, value in attributes.items()})
    return (*kernel, *(tuple(sorted(part.items(), key=str)) for part in parts), launch.warps, launch.stages)


def compile_launch(launch: Launch, capability: Capability) -> Resources:
    """Compile for a GPU of this capability; no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = signature_of(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    compiled = triton.compile(source, target=target, options={"num_warps": launch.warps, "num_stages": launch.stages})
    ((registers, spilled),) = read_usage([compiled.asm["cubin"]])
    return Resources(registers, spilled, compiled.metadata.shared, 32 * launch.warps, compiled.asm["ptx"])


def read_usage(binaries: Iterable[bytes]) -> list[tuple[int, int]]:
    """Registers and bytes of local memory of each binary, by the tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usages = []
    for binary in binaries:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            command = [str(tool), "--dump-resource-usage", file.name]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
        if found is None:
            raise ValueError(f"cuobjdump printed no resource usage: {text!r}")
        usages.append((int(found[1]), int(found[2]) + int(found[3])))
    return usages
