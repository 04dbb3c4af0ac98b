"""Every Triton kernel compiled ahead of time for GPUs that need not be there: registers, spills, width of its accesses.

    python -m benchmarks.kernel_resources            a table, then JSON on the last line

Shapes are those of a run at 512x512 (latents [B, 4, 64, 64]); pointers are aligned to 16 bytes and sizes are multiples
of 16 elements, which Triton's launcher tells its compiler of such arguments. Must not run with TRITON_INTERPRET=1,
which leaves nothing to compile.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class Case:
    """A kernel at one shape.

    arguments  by name: a type ("*fp32", "i64", "fp32", ...), or the value of one that is fixed at compile time
    unaligned  names of the integers that are no multiple of 16
    """

    name: str
    kernel: Any
    arguments: Mapping[str, Any]
    warps: int
    unaligned: tuple[str, ...] = field(default=())


def philox_cases() -> list[Case]:
    from dfkd_kernels import philox

    words = {"k0": "u32", "k1": "u32", "stream_id": "u32"}
    fixed = {"KIND": 2, "BLOCK": philox.BLOCK}
    arguments = {"out_ptr": "*fp32", "ids_ptr": "*i64", **words, "n": "i64", **fixed}
    return [Case("philox normal", philox._kernel, arguments, 4, tuple(words))]


def guided_cases() -> list[Case]:
    """Both memory formats, in each the plainest launch and the one with every term."""
    from dfkd_kernels import guided_clean, guided_push, guided_update

    found = []
    size = {"micro": "i32", "n": "i32", "pixels": "i32"}
    for nhwc in (True, False):
        walk = {"CHANNELS": 4, "NHWC": nhwc, "TILE": guided_clean.TILE}
        where = "channels_last" if nhwc else "contiguous"
        pointers = {"x_ptr": "*fp16", "clean_ptr": None, "z_ptr": "*fp32", "model_ptr": "*fp16", "row_ptr": "*fp32"}
        fixed = {**walk, "MODEL_NHWC": nhwc, "X_NHWC": nhwc, "COPIES": 2}
        arguments = {**pointers, "scale": "fp32", "shift": "fp32", **size, **fixed}
        found.append(Case(f"guided_clean {where}", guided_clean._kernel, arguments, guided_clean.WARPS, ("micro",)))

        pointers = {"pushed_ptr": "*fp32", "x_ptr": "*fp16", "push_ptr": "*fp32", "gradient_ptr": "*fp16"}
        pointers |= {"length_ptr": "*fp32", "base_ptr": "*fp32"}
        numbers = {"unit": "fp32", "scale": "fp32", "shift": "fp32", "images": "i32", **size}
        fixed = {**walk, "GRADIENT_NHWC": nhwc, "X_NHWC": nhwc, "COPIES": 1, "NORM": True}
        arguments, loose = {**pointers, **numbers, **fixed}, ("images", "micro")
        found.append(Case(f"guided_push {where}", guided_push._kernel, arguments, guided_clean.WARPS, loose))

        pointers = {"after_ptr": "*fp32", "rows_ptr": "*fp16", "z_ptr": "*fp32", "model_ptr": "*fp16"}
        pointers |= {"row_ptr": "*fp32", "gradient_ptr": "*fp16", "length_ptr": "*fp32"}
        optional = {"clean_ptr": "*fp32", "push_ptr": "*fp32", "before_ptr": "*fp32"}
        noise, mix = {"ids_ptr": "*i64"}, {"partner_ptr": "*i64", "box_ptr": "*i64"}
        numbers = {
            "unit": "fp32",
            "k0": "u32",
            "k1": "u32",
            "stream_id": "u32",
            "images": "i32",
            **size,
            "width": "i32",
        }
        fixed = {**walk, "MODEL_NHWC": nhwc, "GRADIENT_NHWC": nhwc, "ROWS_NHWC": nhwc, "COPIES": 2, "NEXT_COPIES": 2}
        fixed |= {"NOISE_ORDER": guided_update.noise_order(4, 4096, nhwc), "NORM": True}
        for name, terms in (("", {}), (" noise", noise), (" every term", {**optional, **noise, **mix})):
            absent = dict.fromkeys((*optional, *noise, *mix))
            arguments = {**pointers, **absent, **terms, **numbers, **fixed}
            loose = ("images", "micro", "k0", "k1", "stream_id")
            case = Case(f"guided_update {where}{name}", guided_update._kernel, arguments, guided_clean.WARPS, loose)
            found.append(case)
    return found


def soft_kl_cases() -> list[Case]:
    """Class counts of CIFAR, ImageNet, the widest row in registers, and ImageNet-21k, whose odd rows have no alignment.

    21840 is a wide row that has some.
    """
    from dfkd_kernels import soft_kl

    found = []
    for classes, dtype, labels in (
        (10, "fp32", False), (1000, "fp32", False), (1000, "fp16", True),
        (soft_kl.WIDEST, "fp32", True), (21840, "fp16", True), (21841, "fp32", False),
    ):  # fmt: skip
        rows, block, warps = soft_kl.tile_of(classes)
        logits = dict.fromkeys(("gradient_ptr", "student_ptr", "teacher_ptr"), f"*{dtype}")
        arguments = {"losses_ptr": "*fp32", **logits, "labels_ptr": "*i64" if labels else None, "rows": "i32"}
        arguments |= {"CLASSES": classes, "STUDENT_STRIDE": classes, "TEACHER_STRIDE": classes, "TEMPERATURE": 4.0}
        arguments |= {"CE_WEIGHT": float(labels), "AGREEING": False, "UNIT": 1.0, "ROWS": rows, "BLOCK": block}
        name = f"soft_kl {classes} {dtype}" + " labels" * labels
        found.append(Case(name, soft_kl._kernel, arguments, warps))
    logits = dict.fromkeys(("losses_ptr", "gradient_ptr", "student_ptr", "teacher_ptr"), "*fp64")
    rows, block, warps = soft_kl.tile_of(1000)
    arguments = {**arguments, **logits, "labels_ptr": None, "TEMPERATURE": 1.0, "CE_WEIGHT": 0.0, "AGREEING": True}
    arguments |= {"CLASSES": 1000, "STUDENT_STRIDE": 1000, "TEACHER_STRIDE": 1000, "ROWS": rows, "BLOCK": block}
    found.append(Case("soft_kl 1000 fp64 agreeing", soft_kl._kernel, arguments, warps))
    return found


def group_norm_cases() -> list[Case]:
    """Feature maps of Stable Diffusion's VAE (512 channels at 64x64 to 128 at 512x512) and UNet, in 32 groups."""
    import torch

    from dfkd_kernels import group_norm_backward, group_norm_forward
    from dfkd_kernels.group_norm_tiles import Cut

    found = []
    for channels, side, dtype, nhwc, silu in (
        (128, 512, "fp16", True, True), (128, 512, "fp32", True, True), (512, 64, "bf16", True, True),
        (512, 64, "fp16", False, True), (128, 512, "fp32", False, True), (320, 64, "fp16", True, False),
        (1280, 8, "fp16", True, True), (1280, 8, "fp32", True, True),
    ):  # fmt: skip
        cut = Cut(torch.empty(1, channels, side, side, device="meta"), 32, nhwc)
        maps = dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "weight_ptr", "bias_ptr"), f"*{dtype}")
        sums = dict.fromkeys(("mean_ptr", "rstd_ptr", "plain_ptr", "along_ptr", "part_ptr"), "*fp32")
        fixed = {"EPS": 1e-6, "SILU": silu, "SPAN": cut.tile.steps * cut.tile.pixels, "GROUPS": 32}
        launches: list[tuple[Any, dict[str, Any]]] = [(group_norm_forward._whole, cut.whole)]
        launches += [(group_norm_backward._whole, cut.whole)]
        if not cut.tile.whole:
            launches = [(group_norm_forward._moments, cut.tiles), (group_norm_forward._statistics, cut.combining)]
            launches += [(group_norm_forward._apply, cut.tiles), (group_norm_backward._slopes, cut.tiles)]
            launches += [(group_norm_backward._sums, cut.combining), (group_norm_backward._gradient, cut.tiles)]
        for kernel, own in launches:
            every = {**maps, **sums, **fixed, **own}
            arguments = {name: every[name] for name in kernel.arg_names}
            way = kernel.__module__.removeprefix("dfkd_kernels.group_norm_") + kernel.__name__
            name = f"group_norm {way} {channels}x{side}x{side} {dtype} {'channels_last' if nhwc else 'contiguous'}"
            found.append(Case(name, kernel, arguments, own["num_warps"]))
    return found


def batch_norm_tap_cases() -> list[Case]:
    """Stem of a 224 pixels wide ResNet, a narrow and a wide layer of a CIFAR network, in both memory formats.

    Maps of 7x7 have no alignment in the order of channels.
    """
    from dfkd_kernels import batch_norm_launches as taps

    found = []
    layer = dict.fromkeys(("mean_ptr", "variance_ptr", "weight_ptr", "bias_ptr"), "*fp32")
    for channels, pixels, dtype in ((64, 12544, "fp16"), (16, 1024, "fp32"), (512, 64, "fp16"), (2048, 49, "fp16")):
        for nhwc in (True, False):
            wide, high, span, warps = taps.tile_of(channels, pixels, nhwc)
            name = f"{channels}x{pixels} {dtype} {'channels_last' if nhwc else 'contiguous'}"
            size = {"channels": "i32", "pixels": "i32"}
            loose = ("pixels",) if pixels % 16 else ()
            fixed = {"NHWC": nhwc, "RELU": True, "EPS": 1e-5, "CHANNELS": wide, "PIXELS": high, "SPAN": span}
            maps = dict.fromkeys(("y_ptr", "x_ptr"), f"*{dtype}") | dict.fromkeys(("m1_ptr", "m2_ptr"), "*fp32")
            arguments = {**maps, **layer, "rows": "i32", **size, **fixed, "WHOLE": span >= pixels}
            found.append(Case(f"batch_norm_tap {name}", taps._forward, arguments, warps, loose))
            maps = dict.fromkeys(("dx_ptr", "x_ptr", "dy_ptr"), f"*{dtype}")
            maps |= dict.fromkeys(("dm1_ptr", "dm2_ptr"), "*fp32")
            arguments = {**maps, **layer, **size, **fixed, "DY_NHWC": nhwc}
            found.append(Case(f"batch_norm_tap gradient {name}", taps._backward_kernel, arguments, warps, loose))
    names = ("m1_ptr", "m2_ptr", "m1_parts_ptr", "m2_parts_ptr")
    arguments = dict.fromkeys(names, "*fp32") | dict.fromkeys(("rows", "parts", "pixels"), "i32")
    arguments |= {"ROWS": taps.ROWS, "PARTS": taps.PARTS}
    found.append(Case("batch_norm_tap parts", taps._added_up, arguments, 4, ("parts",)))
    return found


def cases() -> list[Case]:
    return [*philox_cases(), *guided_cases(), *soft_kl_cases(), *group_norm_cases(), *batch_norm_tap_cases()]


def measure(case: Case, capability: int) -> dict[str, Any]:
    """Registers a thread, bytes of spilled registers and of stack, bytes of shared memory, widest load and store."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    typed = re.compile(r"\*?(fp|bf|i|u)\d+")
    signature, fixed = {}, {}
    for name, value in case.arguments.items():
        if isinstance(value, str) and typed.fullmatch(value):
            signature[name] = value
        else:
            signature[name], fixed[name] = "constexpr", value
    order = list(case.kernel.arg_names)
    aligned = [n for n, t in signature.items() if t[0] == "*" or (t[0] in "iu" and n not in case.unaligned)]
    built = triton.compile(
        ASTSource(
            case.kernel,
            signature={name: signature[name] for name in order},
            constexprs=fixed,
            attrs={(order.index(name),): [["tt.divisibility", 16]] for name in aligned},
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
    """Of a PTX access such as ld.global.v4.b32."""
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
