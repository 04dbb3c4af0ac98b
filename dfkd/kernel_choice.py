"""Which implementation of the fused kernels a run takes, and why."""

import importlib.util
import os
from dataclasses import dataclass

import torch

from dfkd.errors import UsageError


@dataclass(frozen=True)
class KernelChoice:
    """name: "torch" or "triton". why: for people."""

    name: str
    why: str


def choose_kernels(wanted: str, device: torch.device) -> KernelChoice:
    """What `wanted` of KERNEL_NAMES comes to on this device.

    Raises UsageError: triton where it is not installed, or on a CPU outside Triton's interpreter.
    """
    if wanted == "torch":
        return KernelChoice("torch", "as asked")
    installed = importlib.util.find_spec("triton") is not None
    if wanted == "auto":
        if device.type != "cuda":
            return KernelChoice("torch", f"the device is {device.type}")
        if installed:
            return KernelChoice("triton", f"the device is {device.type}")
        return KernelChoice("torch", "Triton is not installed (pip install 'dfkd[gpu]')")
    if not installed:
        raise UsageError(
            "--kernels triton", "Triton is not installed", "pip install 'dfkd[gpu]', or use --kernels torch"
        )
    if device.type == "cuda":
        return KernelChoice("triton", "as asked")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return KernelChoice("triton", "as asked, in its interpreter (TRITON_INTERPRET=1), which is slow")
    raise UsageError(
        f"--kernels triton on {device.type}",
        "Triton compiles for GPUs",
        "use --kernels torch, or set TRITON_INTERPRET=1 to try the kernels in its interpreter",
    )
