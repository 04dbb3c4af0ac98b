"""The plan of a synthesis: how the rows of a group are cut into calls, for each network, and what bounds them.

A plan follows from the options, the networks' shapes and the device, and from nothing that changes between two starts:
a run that was stopped goes on with the same calls. Only an out-of-memory error makes them smaller, and is remembered.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import nn

from dfkd.cli.generate_options import GenerateOptions
from dfkd.compiled.requests import CALL_UNIT, in_group
from dfkd.synthesis.planning.calls import GRADIENTS, copies_of, network_calls
from dfkd.synthesis.planning.data_sheets import DataSheet
from dfkd.synthesis.memory import device_bytes, usable_bytes
from dfkd.synthesis.run import Rows, Synthesis
from dfkd_engine.footprint import footprint, weight_bytes
from dfkd_engine.planner import CallPlan, Footprint, decoder_elements, most_rows, plan_calls, unet_elements

# Elements of the largest map of one row up to which a network is run to be measured: that is quicker than a run without
# data, a second on one core at worst.
_SMALL = 2**20
_HELD = 4  # times that a group's images are held at once in float32: decoded, refined, pushed and their gradient


@dataclass(frozen=True)
class Plan:
    """calls: by network (unet, decode, gradient); rows are images there, and `copies` rows of the UNet are one image.

    footprints  by network, of an image
    weights     bytes of all networks, and of a group's images beside them
    memory      bytes of the device, 0 where unknown
    """

    group: int
    copies: int
    calls: Mapping[str, CallPlan]
    footprints: Mapping[str, Footprint]
    weights: int
    memory: int

    @property
    def rows(self) -> Rows:
        unet, decode = self.calls["unet"].rows, self.calls["decode"].rows
        return Rows(unet, decode, self.calls["gradient"].rows if "gradient" in self.calls else decode)


def make_plan(
    options: GenerateOptions,
    synthesis: Synthesis,
    remembered: Mapping[str, int],
    processes: int = 1,
    sheet: DataSheet | None = None,
) -> Plan:
    """The plan of a synthesis on eager networks; engines of the same networks are taken to need no more.

    remembered: most images a call, by network, from out-of-memory errors. processes: that share the memory of a CPU.
    sheet: of the GPU to plan for; None: the synthesis' own device.
    """
    prior = synthesis.prior
    networks = [prior.unet, prior.vae, *filter(None, [prior.text_encoder]), synthesis.teacher.module]
    if synthesis.guidance and synthesis.guidance.student:
        networks.append(synthesis.guidance.student.module)
    device = synthesis.device if sheet is None else torch.device("cuda")
    memory = sheet.memory if sheet else device_bytes(device) // (processes if device.type == "cpu" else 1)
    return plan_of(options, footprints_of(synthesis), copies_of(synthesis), held_bytes(synthesis, networks), memory,
                   usable_bytes(memory, device), remembered)  # fmt: skip


def plan_of(
    options: GenerateOptions,
    footprints: Mapping[str, Footprint],
    copies: int,
    weights: int,
    memory: int,
    usable: int,
    remembered: Mapping[str, int],
) -> Plan:
    """The same from what was measured; `usable` bytes of `memory` are for weights and calls."""
    calls = {}
    for network, needs in footprints.items():
        limits = {}
        whole = network == "gradient" and in_group(options) and options.gradient == "latent"
        if options.micro_batch:
            limits["--micro-batch"] = options.micro_batch
        if options.batch < options.group and (options.micro_batch or not whole):
            limits["--batch"] = max(options.batch - options.batch % CALL_UNIT, CALL_UNIT)
        if network in remembered:
            limits["remembered"] = remembered[network]
        limits["elements"] = most_rows(needs.elements)
        if memory:
            limits["memory"] = needs.most_rows(usable - weights)
        calls[network] = plan_calls(options.group, needs, limits, CALL_UNIT, exact="--micro-batch")
    return Plan(options.group, copies, calls, footprints, weights, memory)


def footprints_of(synthesis: Synthesis) -> dict[str, Footprint]:
    """By network, of an image; every form of the guidance gradient is in the one of `gradient`."""
    prior, settings = synthesis.prior, synthesis.settings
    through_unet = settings.gradient == "unet" or settings.noise_edit_steps > 0
    counted = elements_of(
        prior.unet.config, prior.vae.config, synthesis.latent_size, copies_of(synthesis), through_unet
    )
    calls = network_calls(synthesis)
    measured = {name: footprint(call, max(counted.values()) > _SMALL) for name, call in calls.items()}
    gradients = [measured.pop(name) for name in GRADIENTS if name in measured]
    if gradients:
        measured["gradient"] = reduce(Footprint.with_, gradients)
    return {name: replace(found, elements=max(found.elements, counted[name])) for name, found in measured.items()}


def elements_of(
    unet: Mapping[str, Any], vae: Mapping[str, Any], latent_size: tuple[int, int], copies: int, through_unet: bool
) -> dict[str, int]:
    """Elements of an image's largest feature map, by network, from the configs: no count takes fewer.

    through_unet: whether a gradient calls the UNet.
    """
    rows, image = copies * unet_elements(unet, latent_size), decoder_elements(vae, latent_size)
    return {"unet": rows, "decode": image, "gradient": max(rows, image) if through_unet else image}


def held_bytes(synthesis: Synthesis, networks: list[nn.Module]) -> int:
    """Bytes that are taken all the time: weights and a group's images."""
    side = synthesis.prior.vae_scale_factor
    pixels = side**2 * synthesis.latent_size[0] * synthesis.latent_size[1]
    return weight_bytes(*networks) + _HELD * synthesis.group * 3 * pixels * 4
