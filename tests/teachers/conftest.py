"""timm and torchvision for the tests of teachers, where they are installed or lie beside the environment."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

# `make` puts them here: PyPI's torchvision is built for the CUDA build of torch, and transformers would import it.
BESIDE = Path(sys.prefix) / "beside"
_DECLARED: list[torch.library.Library] = []


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    _make_importable()
    found: ModuleType = pytest.importorskip("timm")
    return found


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    _make_importable()
    found: ModuleType = pytest.importorskip("torchvision")
    return found


def _make_importable() -> None:
    """Find the two libraries; where torchvision's operators are built for another torch, declare those it asks for at
    import. No classifier uses them."""
    if str(BESIDE) not in sys.path:
        sys.path.append(str(BESIDE))
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or _DECLARED or "torchvision" in sys.modules:
        return
    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
    except OSError:
        _DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _DECLARED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
