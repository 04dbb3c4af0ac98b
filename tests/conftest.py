"""Where the tests run: Triton's interpreter without a GPU, few threads, and a ``device`` to put tensors on."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

# Triton reads it when a kernel is declared, so it has to be set before any test imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

# Tensors of tests are small: more threads than this only wait for each other.
torch.set_num_threads(min(4, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    absent = pytest.mark.skip(reason="needs a CUDA device, torch finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(absent)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def tiny_prior(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a family in tests/tiny_priors.py -> the folder of its reduced pipeline, written once."""

    @cache
    def folder_of(name: str) -> Path:
        from tests.tiny_priors import make_tiny_prior  # here: the kernels' GPU tests are collected without diffusers

        return make_tiny_prior(name, tmp_path_factory.mktemp("priors") / name)

    return folder_of
