"""Every Triton kernel compiled ahead of time for GPUs that need not be there: registers, spills, width of its accesses.

    python -m benchmarks.kernel_resources            a table, then JSON on the last line

Launches are those of a run at 512x512 (latents [B, 4, 64, 64]), made on meta tensors and recorded where Triton would
compile and start them. Pointers count as aligned to 16 bytes, as PyTorch allocates them. Must not run with
TRITON_INTERPRET=1, which leaves nothing to compile.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

CAPABILITIES = (80, 90, 100)
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
POINTERS = {F64: "*fp64", F32: "*fp32", F16: "*fp16", BF16: "*bf16", torch.int64: "*i64"}


@dataclass(frozen=True)
class Case:
    """A kernel as one launch compiles it.

    signature: by argument "*fp32", "i32", ..., or "constexpr" for one that `fixed` has.
    aligned: arguments that 16 divides.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    fixed: Mapping[str, Any]
    aligned: tuple[str, ...]
    warps: int


def meta(*shape: int, dtype: torch.dtype = F32, nhwc: bool = False) -> Tensor:
    order = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=order)


def guided_step() -> Iterator[tuple[str, Callable[[], object]]]:
    from dfkd_kernels.guided_step import _launch

    shape, ids = (8, 4, 64, 64), meta(8, dtype=torch.int64)
    z, row, box = meta(*shape), meta(8), meta(8, 4, dtype=torch.int64)
    model = meta(2, *shape, dtype=F16)
    yield "4x64x64", lambda: _launch(z, model[:1], row, None, None, None, None, None, 0, 0)
    yield "4x64x64", lambda: _launch(z, model, row, z, None, None, None, None, 0, 0)
    yield "4x64x64", lambda: _launch(z, model, row, z, None, ids, None, None, 7, 3)
    yield "4x64x64 every term", lambda: _launch(z, model, row, z, z, ids, ids, box, 7, 3)


def soft_kl() -> Iterator[tuple[str, Callable[[], object]]]:
    """Class counts of CIFAR, ImageNet, the widest row in registers, and ImageNet-21k, whose rows have no alignment."""
    from dfkd_kernels.soft_kl import WIDEST, _launch

    for classes, dtype in ((10, F32), (1000, F32), (1000, F16), (WIDEST, F32), (21841, F32)):
        logits = meta(256, classes, dtype=dtype)
        yield f"{classes} {name_of(dtype)}", lambda given=(logits, logits, 4.0, False): _launch(*given)
    logits = meta(256, 1000, dtype=F64)
    yield "1000 fp64 agreeing", lambda: _launch(logits, logits, 1.0, True)


def group_norm_silu() -> Iterator[tuple[str, Callable[[], object]]]:
    """Feature maps of Stable Diffusion's VAE (128 channels at 512x512) and UNet, in 32 groups."""
    from dfkd_kernels.group_norm_silu import _launch_backward, _launch_forward

    for channels, side, dtype, nhwc, silu in (
        (128, 512, F16, True, True),
        (128, 512, F32, False, True),
        (320, 64, BF16, True, False),
        (1280, 8, F16, True, True),
    ):
        x, w = meta(2, channels, side, side, dtype=dtype, nhwc=nhwc), meta(channels, dtype=dtype)
        name, of_groups = f"{channels}x{side}x{side} {name_of(dtype)} {order_of(nhwc)}", meta(2, 32)
        yield name, lambda given=(x, w, w, 32, 1e-6, silu): _launch_forward(*given)
        yield name, lambda given=(x, x, of_groups, of_groups, w, w, 32, silu): _launch_backward(*given)


def bn_moments() -> Iterator[tuple[str, Callable[[], object]]]:
    """Stem of a 224 pixels wide ResNet, and maps of 7x7, which have no alignment in the order of channels."""
    from dfkd_kernels.bn_moments import _launch, _launch_gradient

    for channels, side, dtype in ((64, 112, F16), (2048, 7, F16)):
        for nhwc in (True, False):
            x, layer = meta(16, channels, side, side, dtype=dtype, nhwc=nhwc), [meta(channels)] * 4
            name, moments = f"{channels}x{side}x{side} {name_of(dtype)} {order_of(nhwc)}", meta(16, channels)
            yield name, lambda given=(x, *layer, 1e-5, True): _launch(*given)
            yield name, lambda given=(x, *layer, 1e-5, True, x, moments, moments): _launch_gradient(*given)


LAUNCHES = {
    "guided_step": guided_step, "soft_kl": soft_kl, "group_norm_silu": group_norm_silu, "bn_moments": bn_moments
}  # fmt: skip


def name_of(dtype: torch.dtype) -> str:
    return POINTERS[dtype][1:]


def order_of(nhwc: bool) -> str:
    return "channels_last" if nhwc else "contiguous"


def cases() -> list[Case]:
    from triton.runtime.jit import JITFunction

    calls: list[tuple[Any, ...]] = []
    found: list[Case] = []
    with patch.object(JITFunction, "run", lambda kernel, *args, **kwargs: calls.append((kernel, args, kwargs))):
        for stem, launches in LAUNCHES.items():
            for label, launch in launches():
                calls.clear()
                launch()
                found += [case_of(stem, label, *call) for call in calls]
    return found


def case_of(stem: str, label: str, kernel: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Case:
    """A launch as Triton's launcher describes it to the compiler."""
    values: dict[str, Any] = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature: dict[str, str] = {}
    fixed: dict[str, Any] = {}
    aligned: list[str] = []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], fixed[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned.append(name)
        else:
            signature[name] = parameter.annotation_type or ("i32" if value < 2**31 else "i64")
            aligned += [name] if value % 16 == 0 and not parameter.do_not_specialize else []
    absent = "".join(f" no {name.removesuffix('_ptr')}" for name, value in fixed.items() if value is None)
    title = f"{stem} {kernel.__name__.lstrip('_')} {label}{absent}"
    return Case(title, kernel, signature, fixed, tuple(aligned), kwargs.get("num_warps", 4))


def measure(case: Case, capability: int) -> dict[str, Any]:
    """Registers a thread, bytes of spilled registers and of stack, bytes of shared memory, widest load and store."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = list(case.kernel.arg_names)
    built = triton.compile(
        ASTSource(
            case.kernel,
            signature=dict(case.signature),
            constexprs=dict(case.fixed),
            attrs={(order.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.warps},
    )
    found = {"kernel": case.name, "sm": capability, **usage(built.asm["cubin"])}
    for kind, what in (("ld", "load"), ("st", "store")):
        found[f"widest_{what}_bits"] = max(map(_bits, re.findall(rf"{kind}\.global\S*", built.asm["ptx"])), default=0)
    return found


def usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump, which Triton ships, says of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    values = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    names = {"REG": "registers", "LOCAL": "spilled_bytes", "STACK": "stack_bytes", "SHARED": "shared_bytes"}
    return {name: int(values[key]) for key, name in names.items()}


def _bits(access: str) -> int:
    """Width of a PTX access such as ld.global.v4.b32."""
    vector = re.search(r"\.v(\d)", access)
    width = re.search(r"\.[bfsu](\d+)", access)
    return (int(vector[1]) if vector else 1) * (int(width[1]) if width else 0)


def markdown(rows: list[dict[str, Any]]) -> str:
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads).replace("_", " ") + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(str(row[head]) for head in heads) + " |" for row in rows])


def main() -> None:
    rows = [measure(case, capability) for case in cases() for capability in CAPABILITIES]
    print(markdown(rows), file=sys.stderr)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
