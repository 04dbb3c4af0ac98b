"""What compiled code depends on in a device, as EngineSpec.device holds it."""

from typing import TYPE_CHECKING

from dfkd_engine.spec import cpu_architecture, kind_of

if TYPE_CHECKING:
    import torch


def architecture(device: "torch.device | str") -> str:
    """Such as "cpu x86_64 avx2" or "cuda sm_90 NVIDIA H100 80GB HBM3"; only a GPU's imports torch."""
    if kind_of(device) != "cuda":
        return cpu_architecture()
    import torch

    properties = torch.cuda.get_device_properties(device)
    return f"cuda sm_{properties.major}{properties.minor} {properties.name}"
