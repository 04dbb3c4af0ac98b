"""Counter-based noise and fused device code; needs torch, and Triton where a GPU (or its interpreter) runs the kernels.

The version stays below 0.18: diffusers and transformers look for Hugging Face's package of the same name, and take this
one for it from that version on.
"""

from importlib import metadata

__version__ = "0.1.0"
__project__ = "dfkd"


def _refuse_foreign() -> None:
    """Raise ImportError where Hugging Face's ``kernels`` is installed too: of two packages, one name hides one."""
    try:
        found = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"the package 'kernels' {found} (Hugging Face's) is installed beside dfkd's package of the same name: "
        "one hides the other. Run: pip uninstall kernels, then reinstall dfkd."
    )


_refuse_foreign()
