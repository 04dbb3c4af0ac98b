"""Priors that come with the program, by name: "demo", a tiny Stable Diffusion pipeline of coloured digits."""

from pathlib import Path

from dfkd_engine import EMBEDDED

EMBEDDED["demo"] = Path(__file__).parent / "demo"
