"""What a compiled kernel takes of a GPU: read from its machine code with the tools that come with triton."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

# Of an SM: shared memory in KiB (1 of each block is the system's), from the CUDA programming guide, "Compute
# capabilities". Registers (65,536), warps (64) and blocks (32) are the same on both.
SHARED_OF_SM = {"sm_80": 164, "sm_90": 228}
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """Registers a thread, bytes of shared memory a block, and how often some instructions stand in the code.

    `spills` counts loads and stores of local memory, `stack` is its bytes a thread.
    """

    registers: int
    shared: int
    stack: int
    spills: int
    blocks_per_sm: int
    hgmma: int
    hmma: int
    ldgsts: int
    tma: int
    loads: int
    wide_loads: int


def shared_limit(architecture: str) -> int:
    """The most shared memory that one block can have, in bytes."""
    return (SHARED_OF_SM[architecture] - 1) * 1024


def read_once(cubin: bytes, shared: int, num_warps: int, architecture: str) -> Resources:
    """:func:`read`, kept in triton's cache folder: to disassemble takes longer than to load a kernel from it."""
    key = hashlib.sha256(Path(__file__).read_bytes() + cubin + f"{shared} {num_warps} {architecture}".encode())
    path = Path(triton.knobs.cache.dir) / "farl_kernels_aot" / f"{key.hexdigest()}.json"
    if path.exists():
        return Resources(**json.loads(path.read_text()))
    found = read(cubin, shared, num_warps, architecture)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all, whoever else writes it.
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(dataclasses.asdict(found)))
    partial.replace(path)
    return found


def read(cubin: bytes, shared: int, num_warps: int, architecture: str) -> Resources:
    """The resources of a kernel with `shared` bytes of dynamic shared memory and `num_warps` warps a block."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(path))
        # Without data flow analysis, of which nothing is printed here.
        code = _tool("nvdisasm", "-c", "-ndf", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said {usage!r}")
    registers, stack, static, local = map(int, found.groups())
    shared = max(shared, static)
    counts = Counter(_INSTRUCTION.findall(code))

    def count(*opcodes: str, last: str = "") -> int:
        return sum(n for name, n in counts.items() if name.split(".")[0] in opcodes and last in name)

    return Resources(
        registers=registers,
        shared=shared,
        stack=stack + local,
        spills=count("LDL", "STL"),
        blocks_per_sm=blocks_per_sm(registers, shared, num_warps, architecture),
        hgmma=count("HGMMA"),
        hmma=count("HMMA"),
        ldgsts=count("LDGSTS"),
        tma=count("UTMALDG"),
        loads=count("LDG"),
        wide_loads=count("LDG", last=".128"),
    )


def blocks_per_sm(registers: int, shared: int, num_warps: int, architecture: str) -> int:
    """How many blocks fit on an SM at once: registers go by 256 to a warp, a quarter of them to each scheduler."""
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = 16384 // max(of_warp, 256) * 4 // num_warps
    by_shared = SHARED_OF_SM[architecture] * 1024 // (shared + 1024)
    return min(by_registers, by_shared, 64 // num_warps, 32)


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
