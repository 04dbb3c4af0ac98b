"""GPUs as their makers describe them: what shares of a peak and floors of a time are taken of."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DataSheet:
    """flops: dense FLOP/s by precision, of tensor cores where there are any. bandwidth: bytes/s."""

    name: str
    flops: Mapping[str, float]
    bandwidth: float


def _sheet(name: str, half: float, tf32: float, single: float, bandwidth: float) -> DataSheet:
    flops = {"float16": half * 1e12, "bfloat16": half * 1e12, "tf32": tf32 * 1e12, "float32": single * 1e12}
    return DataSheet(name, flops, bandwidth * 1e12)


# NVIDIA's data sheets: TFLOP/s without sparsity, accumulated in float32; TB/s.
SHEETS: Mapping[str, DataSheet] = {
    "H200": _sheet("H200 SXM", 989, 494, 67, 4.8),
    "H100": _sheet("H100 SXM", 989, 494, 67, 3.35),
    "A100": _sheet("A100 SXM 80GB", 312, 156, 19.5, 2.039),
    "RTX4090": _sheet("GeForce RTX 4090", 165.2, 82.6, 82.6, 1.008),
}


def sheet_of(device_name: str) -> DataSheet | None:
    """The sheet of a device as torch.cuda.get_device_name names it; None where there is none here."""
    plain = device_name.replace(" ", "")
    return next((sheet for model, sheet in SHEETS.items() if model in plain), None)
