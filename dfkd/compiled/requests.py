"""Which engines a synthesis needs, and what each is made of, read from options and files alone: no torch is loaded.

A request's recipe names everything that its engine follows from. A recipe that was built before needs no tracing to
find its engine; one that was not is traced, and the graph decides.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dfkd.config import QUANTISING_BACKENDS, STORED_BACKENDS
from dfkd.cli.generate_options import GenerateOptions
from dfkd.compiled import digests
from dfkd.compiled.digests import FileDigests
from dfkd.compiled.teacher_files import described
from dfkd.errors import UsageError
from dfkd_engine.backends import get
from dfkd_engine.planner import decoder_elements, most_rows, unet_elements
from dfkd_engine.prior_folder import CONFIGS, WEIGHTS, PriorError, locate, read_config, weight_files
from dfkd_engine.spec import cpu_architecture, kind_of

DIGESTS = "file-digests.json"  # in the store's folder
# Calls have a multiple of so many rows, or a whole group's. Libraries take other kernels for a matrix product of fewer,
# slower ones whose last bits differ, and share out the rows of other numbers by parts of an image among threads.
CALL_UNIT = 16
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_TEACHER = ("gradient", "pixel_gradient", "image_moments", "image_gradient")
_GRADIENT = ("gradient", "pixel_gradient", "image_gradient", "decode_vjp")
_DECODER = ("decode", "gradient", "decode_vjp")
_NORMED = ("unet", *_DECODER)  # they have group norms

# The modules that write a graph; a backend's own are added to them.
_GRAPH = (
    *("engine/dfkd_engine/graph.py", "engine/dfkd_engine/tracing", "engine/dfkd_engine/decompositions", "engine/dfkd_engine/rewrites", "engine/dfkd_engine/networks.py"),
    *("engine/dfkd_engine/export.py", "engine/dfkd_engine/quantise.py", "dfkd/compiled/functions.py"),
)
_TENSORRT = ("engine/dfkd_engine/backends/tensorrt.py", "engine/dfkd_engine/backends/tensorrt_library.py")
_MODULES: Mapping[str, tuple[str, ...]] = {
    **{name: (f"engine/dfkd_engine/backends/{name}.py",) for name in STORED_BACKENDS},
    "tensorrt": _TENSORRT,
    "tensorrt-rtx": _TENSORRT,
    "torch-tensorrt": ("engine/dfkd_engine/backends/torch_tensorrt.py",),
}
# What a quantised UNet's scales follow from, beside its graph.
_QUANTISING = ("dfkd/compiled/calibration.py", "dfkd/synthesis/schedule.py")
_CALIBRATION = ("sampler", "steps", "cfg", "cfg_from", "cfg_to", "prompt", "negative_prompt", "only", "classes")
# What a graph with the kernel's group norms follows from, beside what it follows from in any case.
_NORMING = (
    "engine/dfkd_engine/group_norms.py",
    *(f"kernels/dfkd_kernels/group_norm_{part}.py" for part in ("silu", "forward", "backward", "tiles")),
)
_LOSSES = ("dfkd/synthesis/guidance.py", "dfkd/synthesis/statistics.py", "dfkd/teachers")


@dataclass(frozen=True)
class Request:
    """One engine that a run can use.

    batch   smallest, planned and largest rows of a call: of a whole group, so that one engine serves any --batch; of
            the calls as planned where the backend compiles for fixed rows
    timed   rows of a call as the options plan it
    recipe  flat mapping of strings: `engine.store` finds an engine by it
    """

    network: str
    backend: str
    batch: tuple[int, int, int]
    timed: int
    recipe: Mapping[str, str]

    @property
    def quantised(self) -> str:
        """What its graph is quantised to, "int8" or "fp8"; "none"."""
        return self.recipe.get("flags.quantise", "none")

    @property
    def group_norm(self) -> str:
        """Of its graph: "torch", "triton" (the kernel's), or "quicker": both are compiled, and the quicker is kept."""
        return self.recipe.get("flags.group_norm", "torch")

    def __str__(self) -> str:
        narrow = "" if self.quantised == "none" else f" {self.quantised}"
        return f"{self.network}{narrow} in {self.backend}, up to {self.batch[2]} rows"


def needed(options: GenerateOptions) -> tuple[str, ...]:
    """The networks of dfkd.compiled.functions that a run with these options calls; () where none can be an engine."""
    if options.guides and options.gradient == "unet":
        return ()  # guidance differentiates through UNet and decoder, and an engine has no backward
    if not options.guides:
        return "unet", "decode"
    cut = in_group(options) and gradient_rows(options) < options.group
    if options.adv_weight:  # the image gradient stays with autograd: the student of L_adv is replaced between runs
        return "unet", "decode", *(("image_moments",) if cut else ()), "decode_vjp"
    if cut:
        return "unet", "decode", "image_moments", "image_gradient", "decode_vjp"
    return "unet", "decode", "gradient", *(("pixel_gradient",) if options.refine_steps else ())


def in_group(options: GenerateOptions) -> bool:
    """Whether the images of a group enter one another's gradient."""
    return options.guides and options.bn_weight > 0 and options.bn_stats == "group"


def rows_per_call(options: GenerateOptions) -> int:
    """Images a network call as planned; dfkd-generate may take fewer where memory is short."""
    units = max(options.batch // CALL_UNIT, 1)
    most = options.group if options.batch >= options.group else min(units * CALL_UNIT, options.group)
    return min(options.micro_batch or most, most)


def gradient_rows(options: GenerateOptions) -> int:
    """Images a call of the guidance gradient as planned.

    The latent gradient of a group with statistics in common is taken whole, whatever --batch says: in parts it takes
    two passes, and engines of other rounding. Only --micro-batch, or short memory in its place, cuts it.
    """
    whole = in_group(options) and options.gradient == "latent" and not options.micro_batch
    return options.group if whole else rows_per_call(options)


def takes(options: GenerateOptions, network: str, backend: str) -> bool:
    """Whether the backend can have an engine of the network with these options: not every one has 8 bits."""
    return network != "unet" or options.quantise == "none" or backend in QUANTISING_BACKENDS


def requests(options: GenerateOptions, backend: str, device: str, memory: FileDigests) -> tuple[Request, ...]:
    """A request for every network that is needed and that the backend takes, in the order of the data's way.

    device: an architecture, as engine.spec writes it (`cpu_architecture()` for a CPU), or a family of targets.

    Raises UsageError: the prior or the teacher cannot be found, or an unknown backend.
    """
    networks = (network for network in needed(options) if takes(options, network, backend))
    return tuple(request(options, network, backend, device, memory) for network in networks)


def request(options: GenerateOptions, network: str, backend: str, device: str, memory: FileDigests) -> Request:
    """The request for one network; raises as `requests`."""
    doubled = 2 if network == "unet" and options.cfg != 1 else 1
    own = get(backend)
    timed = gradient_rows(options) if network in _GRADIENT else doubled * rows_per_call(options)
    rows = doubled * options.group
    if own.fixed_rows:
        rows = timed = _within_a_tensor(options, network, timed, doubled)
    recipe = {
        "network": network,
        "backend": backend,
        "device": device,
        "dtype": TORCH_NAMES[options.dtype],
        "batch": f"1 to {rows}",
        "size": str(options.size or "the prior's own"),
    }
    recipe |= {f"prior.{name}": value for name, value in _prior(options, network, memory).items()}
    packages = {"torch", "diffusers"}
    if network in _TEACHER:
        recipe |= {f"teacher.{name}": value for name, value in _teacher(options, memory).items()}
        recipe |= {f"losses.{name}": value for name, value in _losses(options, network).items()}
        packages |= _library(recipe["teacher.architecture"])
    quantised = network == "unet" and options.quantise != "none"
    if quantised:
        recipe |= {"flags.quantise": options.quantise} | _calibration(options, memory)
    if (norm := group_norm_of(options, network, backend, device)) != "torch":
        recipe["flags.group_norm"] = norm
    sources = [*_GRAPH, *_MODULES[backend], *(_LOSSES if network in _TEACHER else ())]
    sources += _QUANTISING if quantised else ()
    sources += _NORMING if norm != "torch" else ()
    recipe["sources"] = digests.of_sources(*sources)
    found = {name: _version(name) for name in sorted(packages)} | own.versions()
    recipe |= {f"versions.{name}": value for name, value in found.items()}
    recipe |= {f"flags.{name}": value for name, value in own.flags(device).items()}
    return Request(network, backend, (1, rows, rows), timed, recipe)


def group_norm_of(options: GenerateOptions, network: str, backend: str, device: str) -> str:
    """As `Request.group_norm`. Only inductor's engines call back into this process, where the kernel is."""
    if backend != "inductor" or network not in _NORMED or options.kernels == "torch":
        return "torch"
    if options.kernels == "auto":
        return "quicker" if kind_of(device) == "cuda" else "torch"
    return "triton"


def _within_a_tensor(options: GenerateOptions, network: str, rows: int, doubled: int) -> int:
    """Planned rows, or as many as a compiler for fixed rows can take: no feature map has more than 2^31 - 1 elements.

    Raises UsageError: a group whose images share statistics would have to be in one call, and is too large for that.
    """
    unet, vae = (read_config(prior_folder(options), part, CONFIGS[part]) for part in ("unet", "vae"))
    sides = unet.get("sample_size") or 1
    scale = 2 ** (len(vae.get("block_out_channels", (0,))) - 1)
    size = (options.size // scale,) * 2 if options.size else (sides, sides) if isinstance(sides, int) else tuple(sides)
    elements = unet_elements(unet, size) if network == "unet" else decoder_elements(vae, size)
    most = most_rows(elements) // doubled * doubled
    if most == 0:
        what = f"one image of {options.size or size[0] * scale} pixels a side is too large for the {network}"
        raise UsageError(what, "its largest feature map has more than 2^31 - 1 elements", "choose a smaller --size")
    if rows > most and network == "gradient" and in_group(options):
        what = f"a group of {rows} images of {options.size or size[0] * scale} pixels a side is too large for one call"
        todo = f"cut it with --micro-batch, at most {most // CALL_UNIT * CALL_UNIT or most}"
        raise UsageError(what, f"its largest feature map holds {most} images at the most", todo)
    return min(rows, most)


def architecture_of(device: str) -> str:
    """The architecture behind --device, without torch where there can be no GPU. Raises UsageError."""
    no_gpu = not any(Path("/dev").glob("nvidia*")) and not Path("/dev/dxg").exists()
    if device == "cpu" or (device == "auto" and no_gpu):
        return cpu_architecture()
    from dfkd.runtime import resolve_device
    from dfkd_engine.architecture import architecture

    return architecture(resolve_device(device))


def prior_folder(options: GenerateOptions) -> Path:
    """Where the prior's files lie. Raises UsageError."""
    try:
        return locate(options.prior)
    except PriorError as error:
        raise UsageError(str(error)) from None


def _prior(options: GenerateOptions, network: str, memory: FileDigests) -> dict[str, str]:
    folder = prior_folder(options)
    parts = ["unet"] if network == "unet" else ["vae"] if network in _DECODER else []
    found = {}
    try:
        for part in parts:
            files = [folder / part / CONFIGS[part], *weight_files(folder, part, WEIGHTS[part])]
            found[part] = digests.of_files(folder, files, memory)
        # the size of latents, images and prompts
        shapes = [folder / part / CONFIGS[part] for part in ("unet", "vae", "text_encoder")]
        shapes += [file for file in (folder / "tokenizer" / "tokenizer_config.json",) if file.is_file()]
        found["shapes"] = digests.of_files(folder, shapes, memory)
    except PriorError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"cannot read the prior {folder}", str(error)) from None
    return found


def _calibration(options: GenerateOptions, memory: FileDigests) -> dict[str, str]:
    """What the magnitudes in a quantised UNet were measured on: prompts and trajectories."""
    found = {name: str(getattr(options, name)) for name in _CALIBRATION}
    folder = prior_folder(options)
    try:
        files = [*weight_files(folder, "text_encoder", WEIGHTS["text_encoder"]), *(folder / "tokenizer").glob("*.*")]
        found["text"] = digests.of_files(folder, files, memory)
        found["scheduler"] = digests.of_files(folder, [folder / "scheduler" / CONFIGS["scheduler"]], memory)
    except PriorError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"cannot read the prior {folder}", str(error)) from None
    if "{" in options.prompt and not options.classes:  # the names in the prompts are the teacher's
        if options.teacher is None and options.teacher_checkpoint is None:
            why = "it is calibrated on the run's prompts, and they name classes"
            todo = "give --teacher-checkpoint, or the names with --classes"
            raise UsageError(f"--quantise {options.quantise} knows no classes", why, todo)
        found |= {f"teacher.{name}": value for name, value in _teacher(options, memory).items()}
    found["modelopt"] = _version("nvidia-modelopt")
    return {f"calibration.{name}": value for name, value in found.items()}


def _teacher(options: GenerateOptions, memory: FileDigests) -> dict[str, str]:
    return described(options.teacher, options.teacher_checkpoint, options.normalisation, options.classes, memory.of)


def _losses(options: GenerateOptions, network: str) -> dict[str, str]:
    if network == "image_moments":
        return {}
    found = {"cls": str(options.cls_weight), "bn": str(options.bn_weight)}
    return found | ({"bn_stats": options.bn_stats, "bn_loss": options.bn_loss} if options.bn_weight else {})


def _library(architecture: str) -> set[str]:
    prefix = architecture.partition(":")[0] if ":" in architecture else ""
    return {prefix} if prefix in ("timm", "torchvision", "transformers") else set()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
