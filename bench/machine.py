"""What a result must carry to be read later: the machine, the versions and the commit."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("torch", "triton", "numpy", "open_clip_torch", "timm", "torchvision", "webdataset", "simplejpeg", "xformers"),
    *(
        "flash-attn",
        "liger-kernel",
        "apex",
        "quack-kernels",
        "memeff",
        "inf-cl",
        "nvidia-cudnn-cu13",
        "nvidia-dali-cuda130",
        "nvidia-dali-cuda120",
        "pytest-benchmark",
    ),
)
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


def describe() -> dict[str, Any]:
    """Device, driver, clocks as found (nothing is set), versions and commit."""
    found: dict[str, Any] = {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **nvidia_smi(),
        }
    return found


def device_name() -> str:
    """The GPU's name, or the number of cores this process may use and the CPU's name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {cpu_name()}"


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    lines = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", text, re.MULTILINE))
    name = lines.get("model name", "unknown")
    if not text:
        return platform.processor() or platform.machine()
    # Some virtual machines hide the model's name and leave its number.
    return (
        name if any(map(str.isdigit, name)) else f"{name}, family {lines.get('cpu family')} model {lines.get('model')}"
    )


def versions() -> dict[str, str]:
    """Versions of those of `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """The commit of FARL_COMMIT if set (for copies without git), else git's, with whether files differ from it."""
    given = os.environ.get("FARL_COMMIT")
    if given:
        return {"id": given, "dirty": None}
    identity = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if identity is None:
        return {"id": "unknown", "dirty": None}
    return {"id": identity, "dirty": bool(_output("git", "-C", str(ROOT), "status", "--porcelain"))}


def nvidia_smi() -> dict[str, str]:
    """Driver and clocks at this moment."""
    names = ("driver_version", *CLOCKS)
    line = _output("nvidia-smi", "-i", "0", f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    if not line:
        return {"driver_version": "not read: nvidia-smi gave nothing"}
    return dict(zip(names, (value.strip() for value in line.splitlines()[0].split(",")), strict=False))


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    print(json.dumps(describe(), indent=2))
