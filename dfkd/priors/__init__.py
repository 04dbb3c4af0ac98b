"""Priors that come with the program, by name.

demo            a tiny Stable Diffusion pipeline of coloured digits
cifar10-mini    a class-conditional flow of CIFAR-10's classes at 32x32, of half of its training images
"""

from pathlib import Path

from dfkd_engine import EMBEDDED

for name in ("demo", "cifar10-mini"):
    EMBEDDED[name] = Path(__file__).parent / name
