"""The parts around the networks beside what one would write without this project: kernels on a CPU or a GPU, noise,
Latent CutMix, random views, shards written and read.

    python -m benchmarks.bench_parts

A second's bytes are those that must move, as the benchmarks of the single kernels count them. On a CPU group norms and
a BatchNorm with its moments are PyTorch's own operations, so that these have rows on a GPU alone. A group's moments are
what a teacher's layers give L_bn, and their gradient in the layer's input.
"""

import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks import bench_bn_moments, bench_group_norm_silu, bench_guided_step, bench_soft_kl, driver
from benchmarks.bandwidth import Launch
from benchmarks.driver import Group, Work
from benchmarks.loader_ways import viewed
from dfkd.data import KINDS, Record, ShardFolder, apply_views, draw, read_folder
from dfkd.errors import UsageError
from dfkd.synthesis import cutmix
from dfkd.synthesis.bn_statistics import Moments, averaged, moments_of, moments_together
from dfkd.training.losses import kl_at_temperature
from dfkd_kernels.guided_step import GUIDED_STEPS, paste
from dfkd_kernels.philox import philox_normal

PLAIN = "plain PyTorch"
BATCH, CLASSES, LATENT = {"cpu": 16, "cuda": 256}, 100, (8, 8, 8)
MAPS = [(64, 32)]  # channels, height and width of the feature maps of the two norms
IMAGES, SIZE = 256, 32


def plain_guided_step(
    z: Tensor, model: Tensor, row: Tensor, *, push: Tensor, noise: Any = None
) -> tuple[Tensor, Tensor]:
    """The step of a loop over a diffusers scheduler: classifier-free guidance, the step, then noise of torch.randn."""
    free, prompted = model.float()
    predicted = free + row[7] * (prompted - free)
    clean = row[0] * z + row[1] * predicted + push
    after = row[2] * z + row[3] * predicted + row[6] * push
    return (after if noise is None else after + row[5] * torch.randn_like(after)), clean


def plain_soft_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """As tutorials have it."""
    q, p = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(q, p, reduction="batchmean")


def plain_cutmix(latents: Tensor, labels: Tensor, random: np.random.Generator) -> Tensor:
    """Latent CutMix of [B, C, h, w], image by image."""
    mixed = latents.clone()
    height, width = latents.shape[2:]
    for i in range(len(latents)):
        same = (labels == labels[i]).nonzero()[:, 0]
        partner = int(same[random.integers(len(same))])
        side = np.sqrt(1 - random.beta(1.0, 1.0))
        h, w = int(side * height), int(side * width)
        y, x = int(random.integers(height)) - h // 2, int(random.integers(width)) - w // 2
        y0, y1, x0, x1 = max(y, 0), min(y + h, height), max(x, 0), min(x + w, width)
        mixed[i, :, y0:y1, x0:x1] = latents[partner, :, y0:y1, x0:x1]
    return mixed


def plain_write(path: Path, images: np.ndarray) -> None:
    """A tar of PNG, label and record, as webdataset reads it."""
    with tarfile.open(path, "w") as tar:
        for i, image in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            fields = {"png": file.getvalue(), "cls": b"0", "json": json.dumps({"id": i, "label": 0}).encode()}
            for name, data in fields.items():
                member = tarfile.TarInfo(f"{i:08d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def plain_read(path: Path) -> Tensor:
    """The images of such a tar, uint8 [B, S, S, 3]."""
    with tarfile.open(path) as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".png")]
        return torch.from_numpy(np.stack([np.array(Image.open(file).convert("RGB")) for file in files if file]))


def plain_moments(x: Tensor, layer: nn.BatchNorm2d) -> Moments:
    """Moments [1, C] of a group of maps [B, C, H, W] about a layer's running mean, in float32."""
    assert layer.running_mean is not None
    d = x.float() - layer.running_mean[:, None, None]
    return Moments(d.mean((0, 2, 3))[None], d.square().mean((0, 2, 3))[None])


def guided(launch: str, device: torch.device, step: Callable[..., Any]) -> Work:
    size, dtype = BATCH[device.type], torch.float16 if device.type == "cuda" else torch.float32
    call = bench_guided_step.calls_of({"": step}, launch, size, device, dtype)[""]
    return Work(call, bench_guided_step.moved(launch, size))


def soft_kl(device: torch.device, loss: Callable[..., Tensor]) -> Work:
    rows = 16 * BATCH[device.type]
    student, teacher = (torch.randn(rows, CLASSES, device=device) for _ in range(2))
    call = partial(bench_soft_kl.trained, loss, student.requires_grad_(), teacher)
    return Work(call, bench_soft_kl.moved("training", rows, CLASSES, "float32"))


def noise(device: torch.device, draw: Callable[[Tensor], Tensor]) -> Work:
    ids = torch.arange(16 * BATCH[device.type], device=device)
    return Work(partial(draw, ids), 4 * len(ids) * LATENT[0] * LATENT[1] * LATENT[2])


def moments(device: torch.device, dtype: torch.dtype, taken: Callable[[Tensor, nn.BatchNorm2d], Moments]) -> Work:
    """A group's moments and their gradient; a map must be read for each, and the gradient written."""
    channels, side = MAPS[0]
    layer = nn.BatchNorm2d(channels, device=device).eval().requires_grad_(False)
    x = torch.randn(BATCH[device.type], channels, side, side, device=device).to(dtype)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    given = tuple(torch.randn(1, channels, device=device) for _ in range(2))
    return Work(lambda: torch.autograd.grad(taken(x, layer), x, given), 3 * x.numel() * x.element_size())


def kernels(device: torch.device) -> list[Group]:
    """Every operation by the ways to run it, and what one would write as the baseline."""

    def group(name: str, make: Callable[[Callable[..., Any]], Work], functions: dict[str, Callable[..., Any]]) -> Group:
        rows = {way: partial(make, function) for way, function in functions.items()}
        if device.type != "cuda" and "triton" in rows:
            rows["triton"] = partial(_absent, "Triton compiles for GPUs, and torch finds no CUDA device")
        return Group(name, PLAIN, rows, "bytes")

    steps = {PLAIN: plain_guided_step, **GUIDED_STEPS}
    losses = {PLAIN: plain_soft_kl, "torch": kl_at_temperature, "triton": bench_soft_kl.fused}
    draws = {PLAIN: lambda ids: torch.randn(len(ids), *LATENT, device=ids.device)}
    draws["philox"] = lambda ids: philox_normal(0, ids, 0, LATENT)
    found = [group(f"guided step, {own}", partial(guided, own, device), steps) for own in ("guided", "with noise")]
    found += [group("soft_kl", partial(soft_kl, device), losses), group("noise", partial(noise, device), draws)]
    ways = {PLAIN: plain_moments, "of every image": lambda x, layer: averaged([moments_of(x, layer)])[0]}
    ways["together"] = moments_together
    for dtype in (torch.float32, torch.bfloat16):
        rows = {way: partial(moments, device, dtype, taken) for way, taken in ways.items()}
        found.append(Group(f"a group's moments, {str(dtype).removeprefix('torch.')}", PLAIN, rows, "bytes"))
    if device.type == "cuda":
        found += [_norm("group_norm_silu", launch) for launch in bench_group_norm_silu.launches(MAPS, [64])]
        found += [_norm("bn_moments", launch) for launch in bench_bn_moments.launches([64], MAPS)]
    return found


def _norm(name: str, launch: Launch) -> Group:
    def make(way: str) -> Work:
        return Work(launch.ways(torch.device("cuda"))[way], launch.moved)

    title = f"{name}, {launch.labels['launch']}, {launch.labels['dtype']}"
    return Group(title, "eager", {way: partial(make, way) for way in ("eager", "triton")}, "bytes")


def _absent(why: str) -> Work:
    raise UsageError(why)


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8)


def our_cutmix() -> Work:
    ids, latents = torch.arange(IMAGES), torch.randn(IMAGES, *LATENT)

    def call() -> Tensor:
        plan = cutmix.plan(0, ids, ids % 10, 0, 1.0, *LATENT[1:])
        return paste(latents, plan.partner, plan.box)

    return Work(call, IMAGES)


def their_cutmix() -> Work:
    given = (torch.randn(IMAGES, *LATENT), torch.arange(IMAGES) % 10, np.random.default_rng(0))
    return Work(partial(plain_cutmix, *given), IMAGES)


def our_views(kind: str) -> Work:
    images, generator = torch.rand(IMAGES, 3, SIZE, SIZE), torch.Generator().manual_seed(0)
    return Work(lambda: apply_views(images, draw(kind, IMAGES, SIZE, SIZE, generator)), IMAGES)


def their_views() -> Work:
    images = pixels()
    return Work(lambda: torch.stack([viewed(image) for image in images]), IMAGES)


def our_shard(root: Path, read: bool) -> Work:
    records = [Record(i, 0, "zero", 0, "a photo", losses={"bn": 1.0, "cls": 1.0}) for i in range(IMAGES)]
    path = Path(tempfile.mkdtemp(dir=root))
    folder = ShardFolder.create_or_open(path, {}, ("zero",), SIZE, "png", IMAGES, IMAGES)
    if not read:
        return Work(partial(folder.write, 0, pixels(), records), IMAGES)
    with folder:
        folder.write(0, pixels(), records)
    return Work(partial(read_folder, path), IMAGES)


def their_shard(root: Path, read: bool) -> Work:
    path = root / "plain.tar"
    write = partial(plain_write, path, pixels())
    if not read:
        return Work(write, IMAGES)
    write()
    return Work(partial(plain_read, path), IMAGES)


def groups(device: torch.device, root: Path) -> list[Group]:
    """root: an empty folder, for shards."""
    alone, tar = "one image at a time", "tarfile and PIL"
    views: dict[str, Callable[[], Work]] = {f"crop-flip, {alone}": their_views}
    views |= {kind: partial(our_views, kind) for kind in KINDS if kind != "none"}
    shards = {
        name: {tar: partial(their_shard, root, read), "ours": partial(our_shard, root, read)}
        for name, read in (("a shard written", False), ("a shard read", True))
    }
    return [
        *kernels(device),
        Group("latent CutMix", alone, {alone: their_cutmix, "ours": our_cutmix}),
        Group("random views", f"crop-flip, {alone}", views),
        *(Group(name, tar, rows) for name, rows in shards.items()),
    ]


def main() -> None:
    a = driver.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as root:
        driver.run(groups(a.device, Path(root)), a, "bench_parts")


if __name__ == "__main__":
    main()
