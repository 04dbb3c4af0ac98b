"""How large the factors of a UNet's layers get on the prior's own way from noise to image: what 8 bits have to span.

NVIDIA ModelOpt watches a copy of the UNet while it denoises the run's prompts, unguided, with the run's sampler, steps
and classifier-free guidance: the largest magnitude of every layer's input, and of each output channel of its weights.
The noise is that of a fixed seed, so the same options give the same engine.

What stays wide, with the error of the demo's prediction against float64, mean over the unguided trajectories of ten
images; measured once, with WIDE as the rows say:

                                                       int8      fp8
    every convolution and linear layer in 8 bits      0.029    0.050
    conv_in and conv_out wide                         0.021    0.034    few channels: no time to gain, and their
                                                                        rounding is the prediction's own
    the skips' 1x1 conv_shortcut wide too (as here)   0.018    0.030    two blocks' ranges under one scale; a few % of
                                                                        the products
    feed-forward layers wide instead                  0.017    0.031    a third of the products

Time embeddings (wide) are computed for one row a call, so eight bits would gain nothing. Attention scores (wide) are
products of two results, which no weights' scale covers, and go through an exponential. ModelOpt's own presets keep
"*proj_out.*" wide, a language model's last layer; here that is a layer of every attention block, so the list is ours.
"""

import contextlib
import copy
import io
import warnings
from dataclasses import replace
from typing import Any

import torch

from dfkd.cli.generate_options import GenerateOptions
from dfkd.cli.prepare import latent_size
from dfkd.cli.teacher import load_teacher
from dfkd.synthesis.prompts import chosen_classes, labels_of, prompt_of
from dfkd.synthesis.sampler import INITIAL_NOISE, Denoiser, SamplerSettings
from dfkd.synthesis.schedule import StepTable, build_table
from dfkd_engine.backends.packages import missing
from dfkd_engine.errors import EngineError
from dfkd_engine.networks import Prior
from dfkd_engine.quantise import Amax
from dfkd_kernels.philox import philox_normal

# Images, so rows of the UNet: GROUPS * IMAGES * steps, twice that with classifier-free guidance. Two groups of 16 are
# two seconds for the demo; Stable Diffusion 1.5 in 50 steps at 512 pixels takes 3 200 rows, 2.6 PFLOP: seconds on a
# GPU of 400 TFLOP/s, hours on a CPU. More images found outliers, and a larger error (0.023 of four groups of 50).
GROUPS, IMAGES = 2, 16
SEED = 2**40  # of the trajectories; no run's own, unless it asks for it
WIDE = ("conv_in.*", "conv_out.*", "*time_emb*", "*conv_shortcut.*")  # quantisers of ModelOpt, as it matches names
BITS: dict[str, Any] = {"int8": 8, "fp8": (4, 3)}


def calibrate(options: GenerateOptions, prior: Prior, narrow: str) -> dict[str, Amax]:
    """Magnitudes of every layer of the prior's UNet that is to be in 8 bits, by its name in the UNet.

    narrow: a key of BITS. Raises EngineError where ModelOpt is not installed, and UsageError for options that do not
    fit the prior or the teacher.
    """
    if missing("modelopt"):
        why = "ModelOpt, which calibrates it, is not installed"
        raise EngineError(f"no {narrow} UNet can be built", why, "pip install 'dfkd[quantise]'")
    prompts = _prompts(options)
    table = build_table(prior.scheduler_config, options.sampler, options.steps)
    unet = copy.deepcopy(prior.unet)

    def loop(network: Any) -> None:
        for group in range(GROUPS):
            _denoise(options, replace(prior, unet=network), table, prompts, group)

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' version, which a UNet does not go through
        import modelopt.torch.quantization as mtq

        mtq.quantize(unet, _config(narrow), loop)
    found = {}
    for name, layer in unet.named_modules():
        weight: Any = getattr(layer, "weight_quantizer", None)
        if weight is not None and weight.is_enabled:
            amax: Any = layer.input_quantizer.amax
            found[name] = Amax(float(amax), weight.amax.detach().float().reshape(-1))
    return found


def _config(narrow: str) -> dict[str, Any]:
    bits = BITS[narrow]
    rules: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": bits, "axis": None}},
        *({"quantizer_name": pattern, "enable": False} for pattern in WIDE),
        {"quantizer_name": "*", "parent_class": "nn.LayerNorm", "enable": False},  # it has an input, and no weights
    ]
    return {"quant_cfg": rules, "algorithm": "max"}


def _prompts(options: GenerateOptions) -> list[str]:
    """Of all images, GROUPS after one another."""
    names: tuple[str, ...] = ("",)
    if "{" in options.prompt:
        given = (options.teacher, options.teacher_checkpoint, options.normalisation, options.classes)
        names = options.classes or load_teacher(*given).class_names
    classes = chosen_classes(names, options.only if names != ("",) else ())
    labels = labels_of(torch.arange(GROUPS * IMAGES), classes).tolist()
    return [prompt_of(options.prompt, names[label]) for label in labels]


@torch.no_grad()
def _denoise(options: GenerateOptions, prior: Prior, table: StepTable, prompts: list[str], group: int) -> None:
    """One group from noise to latents, as `sample_group` does without a teacher; nothing is decoded."""
    settings = SamplerSettings(cfg=options.cfg, cfg_from=options.cfg_from, cfg_to=options.cfg_to)
    ids = torch.arange(group * IMAGES, (group + 1) * IMAGES, device=prior.device)
    conditional = prior.encode_prompts([prompts[i] for i in ids.tolist()])
    unconditional = prior.encode_prompts([options.negative_prompt])
    denoise = Denoiser(prior, conditional, unconditional, settings.cfg, IMAGES)
    shape = (prior.latent_channels, *latent_size(options, prior))
    z = table.init_scale * philox_normal(SEED, ids, INITIAL_NOISE, shape)
    before = torch.zeros_like(z)
    for i in range(len(table)):
        row = table.row(i)
        t = torch.as_tensor(row.timestep, device=z.device)
        model = denoise(z, t, settings.classifier_free(i, len(table)))
        clean = row.z0_z * z + row.z0_model * model
        z = row.step_z * z + row.step_model * model + row.step_prev * before
        if row.step_noise:
            z = z + row.step_noise * philox_normal(SEED, ids, 1 + i, shape)
        before = clean
