"""How many images a network call may hold."""

import os

import torch

# Stable Diffusion 1.5's decoder keeps 2.85 GiB of activations for the gradient of one 512x512 image in half precision
# (counted); they grow with pixels, with the width of the decoder's last block (128 there) and with the bytes a value.
_BYTES_PER_IMAGE = 2.85 * 2**30
_PIXELS, _WIDTH, _VALUE = 512 * 512, 128, 2
_SHARE = 0.6  # of the memory: the rest is for weights, the denoiser's rows and fragmentation
_MAX_ELEMENTS = 2**31 - 1  # of one feature map: convolutions refuse larger ones


def device_bytes(device: torch.device) -> int:
    """Memory of a CUDA device, or of the machine for the CPU (0 where the system does not tell).

    All of it and not what is free: a run that was stopped and started again must cut its groups as before, or its
    images would differ in the last bits.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def images_per_call(pixels: int, width: int, value_bytes: int, memory: int) -> int:
    """The most images whose decoder gradient fits in `memory` bytes and in one convolution, 1 at least.

    Args:
        pixels: height x width of an image.
        width: channels of the decoder's last block.
        value_bytes: bytes of an activation.
        memory: bytes of the device; 0 where unknown leaves the element limit alone.
    """
    by_elements = _MAX_ELEMENTS // (2 * width * pixels)  # the widest map at full size has twice the last block's width
    image = _BYTES_PER_IMAGE * (pixels / _PIXELS) * (width / _WIDTH) * (value_bytes / _VALUE)
    by_memory = int(_SHARE * memory / image) if memory else by_elements
    return max(1, min(by_elements, by_memory))
