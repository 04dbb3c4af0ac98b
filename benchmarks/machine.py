"""What a measurement was taken on, to stand beside every recorded number."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dfkd

PACKAGES = ("torch", "triton", "diffusers")


def describe(device: torch.device) -> dict[str, Any]:
    """Device, cores, versions, commit and date, as plain JSON values."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "kind": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"dfkd": dfkd.__version__, **{name: found for name in PACKAGES if (found := _version(name))}},
        "python": platform.python_version(),
        "commit": commit or None,
        "date": datetime.now(UTC).date().isoformat(),
    }


def name_of(machine: dict[str, Any]) -> str:
    """The device of `describe` as a part of a file's name."""
    return "-".join(re.findall(r"[a-z0-9.]+", machine["device"].lower()))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # kernels are measured where there is no diffusers
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
