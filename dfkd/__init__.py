"""Data-free knowledge distillation: a frozen teacher and a frozen diffusion prior make a student's training set."""

import kernels

__version__ = "0.1.0"

# kernels refuses a foreign package of its name by itself, but not where that one comes first on the path.
if getattr(kernels, "__project__", None) != "dfkd":
    raise ImportError(
        f"'kernels' is imported from {kernels.__file__}, which is not dfkd's: Hugging Face has a package of that name. "
        "Run: pip uninstall kernels, then reinstall dfkd."
    )
