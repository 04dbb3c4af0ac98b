"""The networks of a guided synthesis as functions that a compiler can take over, and engines in their place.

    unet            (z [B,C,h,w], t, *conditions [B,...])      -> prediction [B,C,h,w]; the denoiser, of any family
    decode          (z0 [B,C,h,w])                             -> image [B,3,H,W] in 0..1
    guidance_decode (z0)                                       -> image by the guidance's own decoder, where it has one
    gradient        (z0, labels [B])                           -> gradient [B,C,h,w], losses [B]; z0 is a whole group,
                                                                  or images that do not interact
    pixel_gradient  (image, labels)                            -> the same in the image
    image_moments   (image)                                    -> m1, m2 [B,K] of the BN layers' inputs, side by side
    image_gradient  (image, labels, mean1 [K], mean2 [K])      -> gradient in the image, losses; some images of a group
                                                                  whose averaged moments these are
    decode_vjp      (z0, image_gradient [B,3,H,W])             -> gradient [B,C,h,w]

Where the images are seen under views, each of the teacher's functions takes one input more, the last: view [B, V], of
views.py, which makes its matrices in the graph.

The last three and `decode` are the split form, for a group in several calls and for losses of a student, whose weights
change: (dL/dz0) = (d decode/dz0)^T dL/dx, with dL/dx taken where x is. The chain rule is exact.
"""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dfkd.compiled.functions import Function
from dfkd.extension import described, source_digest
from dfkd.synthesis import bn_statistics, guidance, losses, softplus, views
from dfkd.synthesis.bn_statistics import Moments, by_layer, side_by_side
from dfkd.synthesis.guidance import Decode, Guidance, identity, pulled_back
from dfkd.synthesis.joint import JointGuidance
from dfkd.synthesis.prompts import prompt_of
from dfkd_engine.priors.guidance_decoder import Decoder
from dfkd_engine.priors.prior import Prior
from dfkd_engine.spec import TensorSpec

if TYPE_CHECKING:
    from dfkd.synthesis.pipeline import GuidedPipeline

# Images whose trajectories an 8-bit UNet is calibrated on. Two groups of 16 are two seconds for the demo; Stable
# Diffusion 1.5 in 50 steps at 512 pixels takes 3 200 rows, 2.6 PFLOP: seconds on a GPU, hours on a CPU. More images
# found outliers, and a larger error (0.023 of four groups of 50).
CALIBRATION_GROUPS, CALIBRATION_IMAGES = 2, 16
CALIBRATION_SEED = 2**40  # no run's own, unless it asks for it
_GRADIENTS = ("gradient", "pixel_gradient", "image_gradient", "decode_vjp")
_OF_TEACHER = ("gradient", "pixel_gradient", "image_moments", "image_gradient")
_OF_VAE = ("decode", "gradient", "decode_vjp")
_OF_DECODER = ("guidance_decode", "gradient", "decode_vjp")  # where guidance has a decoder of its own


@dataclass(frozen=True)
class Networks:
    """What the functions are made of: the prior, where a teacher guides its guidance, without a student, and the
    decoder that is guidance's own, where it has one.

    Its methods are the functions of the table above, by the same names.
    """

    prior: Prior
    guidance: Guidance | None
    decoder: Decoder | None = None

    def traced(self) -> "Networks":
        """These networks, with guidance by operations that a graph can hold."""
        own = self.guidance
        if own is None:
            return self
        made = Guidance(own.decode, own.teacher, own.losses, None, own.narrow, traced=True)
        return Networks(self.prior, made, self.decoder)

    def doubled(self) -> "Networks":
        """A copy in float64, which compiled and eager results are judged by."""
        prior = self.prior.doubled()
        if self.guidance is None:
            return Networks(prior, None)
        teacher = self.guidance.teacher.replace(module=copy.deepcopy(self.guidance.teacher.module).double())
        decoder = self.decoder and self.decoder.doubled()
        made = Guidance(decoder or prior.decode, teacher, self.guidance.losses, traced=True)
        return Networks(prior, made, decoder)

    def unet(self, z: Tensor, t: Tensor, *conditions: Tensor) -> tuple[Tensor, ...]:
        return (self.prior.denoise(z, t, *conditions),)

    def decode(self, z0: Tensor) -> tuple[Tensor, ...]:
        return (self.prior.decode(z0),)

    def guidance_decode(self, z0: Tensor) -> tuple[Tensor, ...]:
        return ((self.decoder or self.prior.decode)(z0),)

    def decode_vjp(self, z0: Tensor, image_gradient: Tensor) -> tuple[Tensor, ...]:
        leaf, narrow = z0.detach().requires_grad_(), self.guidance is not None and self.guidance.narrow
        with torch.enable_grad():
            return (pulled_back(self.guidance_decode(leaf)[0], leaf, image_gradient, narrow),)

    def gradient(self, z0: Tensor, labels: Tensor, view: Tensor | None = None) -> tuple[Tensor, ...]:
        assert self.guidance is not None
        gradient, record = self.guidance.of_call(z0, labels, view=view)
        return gradient, *record.values()

    def pixel_gradient(self, image: Tensor, labels: Tensor, view: Tensor | None = None) -> tuple[Tensor, ...]:
        assert self.guidance is not None
        gradient, record = self.guidance.with_(identity).of_call(image, labels, view=view)
        return gradient, *record.values()

    def image_moments(self, image: Tensor, view: Tensor | None = None) -> tuple[Tensor, ...]:
        assert self.guidance is not None
        return side_by_side(self.guidance.with_(identity).moments(image, view))

    def image_gradient(
        self, image: Tensor, labels: Tensor, mean1: Tensor, mean2: Tensor, view: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        assert self.guidance is not None
        averages = by_layer(self.guidance.layers, mean1[None], mean2[None])
        gradient, record = self.guidance.with_(identity).of_call(image, labels, averages, view=view)
        return gradient, *record.values()


def functions_of(pipe: "GuidedPipeline") -> tuple[Function, ...]:
    """The functions that a pipeline calls, in the order of the data's way; () where none can be an engine.

    Guidance that differentiates through the UNet has none, since an engine has no backward pass. A loss is traced with
    the rest unless it needs the student, which is replaced between runs: then the image's gradient stays with autograd.
    """
    if pipe.guidance is None:
        names: tuple[str, ...] = ("unet", "decode")
    elif pipe.config.guidance.gradient == "unet":
        return ()
    else:
        cut = "group" in pipe.guidance.needs and pipe.group > pipe.call_size
        if isinstance(pipe.guidance, JointGuidance) or pipe.config.compute.teacher_dtype != "fp32":
            names = ("unet", "decode", "decode_vjp")
        elif pipe.needs_student:
            names = ("unet", "decode", *(("image_moments",) if cut else ()), "decode_vjp")
        elif cut:
            names = ("unet", "decode", "image_moments", "image_gradient", "decode_vjp")
        else:
            names = ("unet", "decode", "gradient", *(("pixel_gradient",) if pipe.config.guidance.refine_steps else ()))
        if pipe.guidance_decoder is not None and "decode_vjp" in names:
            names = (*names[:2], "guidance_decode", *names[2:])
    own = pipe.guidance
    if isinstance(own, JointGuidance):  # of which no function here has a teacher in it
        own = Guidance(pipe.guidance_decode, own.teacher, (), None, own.narrow)
    elif own is not None:  # as it is by autograd, whatever runs in its place
        losses = [loss for loss in own.losses if "student" not in loss.needs]
        own = Guidance(pipe.guidance_decode, own.teacher, losses, None, own.narrow, own.kernels, own.fused)
    networks = Networks(pipe.prior, own, pipe.guidance_decoder)
    return tuple(_function(name, pipe, networks) for name in names)


def _function(name: str, pipe: "GuidedPipeline", networks: Networks) -> Function:
    compute = pipe.config.compute
    cfg_rows = 2 if name == "unet" and pipe.uses_cfg else 1
    needs = networks.guidance.needs if networks.guidance else frozenset[str]()
    one_shape = name in ("gradient", "pixel_gradient") and "group" in needs
    # a power of two, 64 at the least, so that one engine serves other --batch too
    most = max(64, 1 << (max(pipe.config.batching.batch, pipe.group) - 1).bit_length())
    quantise = compute.quantise if name == "unet" else "none"
    plain = networks.traced()
    inputs, outputs = _specs(name, pipe, networks)
    return Function(
        name=name,
        call=getattr(plain, name),
        eager=getattr(networks, name),
        inputs=inputs,
        outputs=outputs,
        kind="gradient" if name in _GRADIENTS else "forward",
        rows=pipe.group if one_shape else cfg_rows * pipe.call_size,
        largest=pipe.group if one_shape else cfg_rows * most,
        one_shape=one_shape,
        samples=partial(_samples, name, pipe, networks),
        exact=lambda: getattr(plain.doubled(), name),
        components=_components(name, pipe, quantise),
        config=_config(name, pipe, networks, quantise),
        sources=source_digest(*_sources(name, pipe)),
        networks=_networks(name, pipe),
        device=pipe.device,
        dtype=dtype_of(name, pipe.prior, pipe.guidance_decoder),
        quantise=quantise,
        calibrate=partial(_calibrate, pipe) if quantise != "none" else None,
    )


def _networks(name: str, pipe: "GuidedPipeline") -> tuple[nn.Module, ...]:
    """Networks of the prior in a function."""
    if name == "unet":
        return (pipe.prior.denoiser,)
    if (decoder := pipe.guidance_decoder) is not None and name in _OF_DECODER:
        return (decoder.network,)
    return (pipe.prior.vae,) if name in _OF_VAE and pipe.prior.vae is not None else ()


def dtype_of(name: str, prior: Prior, decoder: Decoder | None = None) -> str:
    """The dtype of a function's networks: a VAE may be wider than the denoiser. decoder: guidance's own."""
    if decoder is not None and name in _OF_DECODER:
        return str(decoder.network.dtype).removeprefix("torch.")
    network = prior.networks.get("vae", prior.denoiser) if name != "unet" else prior.denoiser
    tensor = next(chain(network.parameters(), network.buffers()))  # patches of pixels have no weights
    return str(tensor.dtype).removeprefix("torch.")


def _specs(name: str, pipe: "GuidedPipeline", n: Networks) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a function."""
    latent = (None, pipe.prior.latent_channels, *pipe.latent_size)
    picture = (None, 3, pipe.image_size, pipe.image_size)
    z0, image = TensorSpec("z0", latent, "float32"), TensorSpec("image", picture, "float32")
    labels = TensorSpec("labels", (None,), "int64")
    in_latents, in_pixels = replace(z0, name="gradient"), replace(image, name="gradient")
    recorded = [TensorSpec(loss.name, (None,), "float32") for loss in (n.guidance.losses if n.guidance else ())]
    view = (TensorSpec("view", (None, views.width(own)), "float32"),) if (own := pipe.config.guidance.view).acts else ()
    means = [layer.running_mean for layer in (n.guidance.layers if n.guidance else ())]
    width = sum(mean.numel() for mean in means if mean is not None)
    if name == "unet":
        dtype = str(pipe.prior.dtype).removeprefix("torch.")
        z = TensorSpec("z", latent, dtype)
        conditions = [
            TensorSpec(named, (None, *tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))
            for named, tensor in zip(pipe.prior.family.inputs, _conditions(pipe, 1), strict=True)
        ]
        return (z, TensorSpec("t", (1,), "float32"), *conditions), (replace(z, name="prediction"),)
    if name in ("decode", "guidance_decode"):
        return (z0,), (image,)
    if name == "decode_vjp":
        return (z0, replace(image, name="image_gradient")), (in_latents,)
    if name == "gradient":
        return (z0, labels, *view), (in_latents, *recorded)
    if name == "pixel_gradient":
        return (image, labels, *view), (in_pixels, *recorded)
    if name == "image_moments":
        return (image, *view), (TensorSpec("m1", (None, width), "float32"), TensorSpec("m2", (None, width), "float32"))
    averages = TensorSpec("mean1", (width,), "float32"), TensorSpec("mean2", (width,), "float32")
    return (image, labels, *averages, *view), (in_pixels, *recorded)


@torch.no_grad()
def _samples(name: str, pipe: "GuidedPipeline", networks: Networks, rows: int, seed: int) -> tuple[Tensor, ...]:
    """Inputs [rows, ...] such as a run has: latents of unit variance, images that the decoder draws, labels in turn."""
    generator, prior = torch.Generator().manual_seed(seed), pipe.prior
    z = torch.randn(rows, prior.latent_channels, *pipe.latent_size, generator=generator).to(pipe.device)
    if name == "unet":
        return z.to(prior.dtype), torch.tensor([500.0], device=pipe.device), *_conditions(pipe, rows)
    if name in ("decode", "guidance_decode"):
        return (z,)
    images = prior.decode(z)
    noise = torch.randn(images.shape, generator=generator).to(pipe.device)
    if name == "decode_vjp":
        return z, noise
    # A decoder draws its first guess smooth; some noise makes the teacher's layers see all their range.
    images = (images + 0.1 * noise).clamp(0, 1)
    labels = (torch.arange(rows) % len(pipe.class_names)).to(pipe.device)
    view = _given(pipe.view(seed, torch.arange(rows, device=pipe.device), 0))
    if name == "image_gradient":
        m1, m2 = networks.image_moments(images, *view)
        return images, labels, m1.mean(0), m2.mean(0), *view
    given = {"image_moments": (images,), "gradient": (z, labels), "pixel_gradient": (images, labels)}[name]
    return *given, *view


def _conditions(pipe: "GuidedPipeline", rows: int) -> list[Tensor]:
    """The denoiser's conditions [rows, ...]: of the run's classes in turn, and between them the unconditional one."""
    names = [prompt_of(pipe.prompt, pipe.class_names[i]) for i in pipe.classes[:2]]
    given = pipe.prior.conditions(names, pipe.image_size, pipe.cfg)
    if pipe.prior.family.cfg == "rows":
        free = pipe.prior.unconditional(pipe.config.sampling.negative_prompt, pipe.image_size)
        given = tuple(torch.cat([own[:1], other]) for own, other in zip(given, free, strict=True))
    return [tensor[torch.arange(rows) % len(tensor)].to(pipe.device) for tensor in given]


def _components(name: str, pipe: "GuidedPipeline", quantise: str) -> dict[str, str]:
    digests = pipe.prior.digests
    by_vae = name in _OF_VAE and "vae" in digests and not _own_decoder(name, pipe)
    parts = [pipe.prior.family.part] if name == "unet" else ["vae"] if by_vae else []
    if quantise != "none":  # its scales follow from the trajectories of the run's prompts
        parts = [part for part in digests if part != "vae"]
    found = {part: digests[part] for part in parts}
    if (decoder := pipe.guidance_decoder) is not None and _own_decoder(name, pipe):
        found["guidance_decoder"] = decoder.digest
    return found | ({"teacher": pipe.teacher.digest()} if name in _OF_TEACHER else {})


def _own_decoder(name: str, pipe: "GuidedPipeline") -> bool:
    """Whether a function goes through guidance's own decoder."""
    return pipe.guidance_decoder is not None and name in _OF_DECODER


def _config(name: str, pipe: "GuidedPipeline", networks: Networks, quantise: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if name in _OF_VAE and not _own_decoder(name, pipe):
        found["scaling_factor"] = pipe.prior.scaling_factor
    if name in _GRADIENTS:
        found["narrow"] = pipe.guidance is not None and pipe.guidance.narrow
    if name in _OF_TEACHER and name != "image_moments" and networks.guidance:
        found["losses"] = [described(loss) for loss in networks.guidance.losses]
    if name in _OF_TEACHER and (beta := pipe.config.guidance.softplus_beta):
        found["softplus_beta"] = beta
    if quantise != "none":
        found["sampling"] = {key: value for key, value in pipe.config.sampling.identity().items() if key != "size"}
        found["class_names"] = list(pipe.class_names)
    return found


def _sources(name: str, pipe: "GuidedPipeline") -> list[Path]:
    """The Python files behind a function, the engine's own package apart."""
    modules = [sys.modules[__name__], guidance] if name == "decode_vjp" else [sys.modules[__name__]]
    if name in _OF_TEACHER:
        modules += [guidance, losses, bn_statistics, softplus, views]
        modules += [sys.modules[type(layer).__module__] for layer in [*pipe.teacher.module.modules(), pipe.teacher]]
    files = {Path(module.__file__) for module in modules if getattr(module, "__file__", None)}  # type: ignore[arg-type]
    return sorted(file for file in files if Path(torch.__file__).parent not in file.parents)


def _calibrate(pipe: "GuidedPipeline", unet: nn.Module) -> None:
    """Let a UNet in the place of the prior's make unguided trajectories, with the run's sampler and prompts."""
    own = copy.copy(pipe)
    own.prior, own.call_size = replace(pipe.prior, denoiser=unet), CALIBRATION_IMAGES
    own.guidance = own.statistics = None
    own.without_engines()
    for group in range(CALIBRATION_GROUPS):
        ids = torch.arange(group * CALIBRATION_IMAGES, (group + 1) * CALIBRATION_IMAGES)
        own.latents(own.pack(ids, CALIBRATION_SEED))


class EngineGuidance(Guidance):
    """Guidance by engines, each function that has none by autograd.

    A group in one call, and images that do not interact, take the fused gradient. A group in several calls takes the
    split form: decode, moments, the image's gradient with the group's averages held, then the decoder's
    vector-Jacobian product. So do losses that need a student, whose image gradient stays with autograd.

    guidance: what is computed, by autograd. engines: by function name. pixels: images stand in the place of latents.
    decoding: name of the function that is the guidance's decoder.
    """

    def __init__(
        self,
        guidance: Guidance,
        engines: Mapping[str, Callable[..., Any]],
        pixels: bool = False,
        decoding: str = "decode",
    ) -> None:
        own = (guidance.student, guidance.narrow, guidance.kernels, guidance.fused)
        super().__init__(guidance.decode, guidance.teacher, guidance.losses, *own)
        self.engines, self.pixels, self.decoding = engines, pixels, decoding
        self.in_pixels = self if pixels else EngineGuidance(guidance.with_(identity), engines, pixels=True)

    def of_call(
        self,
        latents: Tensor,
        labels: Tensor,
        averages: Sequence[Moments] | None = None,
        to_latent: Decode = identity,
        view: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if to_latent is not identity:
            return super().of_call(latents, labels, averages, to_latent, view)
        fused, views = self.engines.get("pixel_gradient" if self.pixels else "gradient"), _given(view)
        if fused is not None and averages is None:
            return self._named(fused(latents, labels, *views))
        if self.pixels:
            engine = self.engines.get("image_gradient")
            if engine is None or averages is None:
                return super().of_call(latents, labels, averages, view=view)
            mean1, mean2 = side_by_side(averages)
            return self._named(engine(latents, labels, mean1[0], mean2[0], *views))
        if "decode_vjp" not in self.engines:
            return super().of_call(latents, labels, averages, view=view)
        gradient, record = self.in_pixels.of_call(self._decoded(latents), labels, averages, view=view)
        return self.engines["decode_vjp"](latents, gradient)[0], record

    def moments(self, latents: Tensor, view: Tensor | None = None) -> list[Moments]:
        engine = self.engines.get("image_moments")
        if engine is None:
            return super().moments(latents, view)
        return by_layer(self.layers, *engine(latents if self.pixels else self._decoded(latents), *_given(view)))

    def _named(self, found: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        return found[0], dict(zip((loss.name for loss in self.losses), found[1:], strict=True))

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> Tensor:
        engine = self.engines.get(self.decoding)
        return self.decode(latents) if engine is None else engine(latents)[0]


def _given(view: Tensor | None) -> tuple[Tensor, ...]:
    """The last input of the teacher's functions, which they do not have without views."""
    return () if view is None else (view,)
