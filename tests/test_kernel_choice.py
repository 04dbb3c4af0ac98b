"""--kernels: what each value comes to, and the refusal before any work."""

import importlib.util

import pytest
import torch

from dfkd.errors import UsageError
from dfkd.runtime import choose_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "wanted, device, name, why",
    [
        ("auto", CPU, "torch", "the device is cpu"),
        ("auto", CUDA, "triton", "the device is cuda"),
        ("torch", CUDA, "torch", "as asked"),
        ("triton", CUDA, "triton", "as asked"),
    ],
)
def test_choice(wanted, device, name, why, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choice = choose_kernels(wanted, device)
    assert (choice.name, choice.why) == (name, why)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match=r"--kernels triton on cpu.*--kernels torch"):
        choose_kernels("triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter" in choose_kernels("triton", CPU).why


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    assert choose_kernels("auto", CUDA).name == "torch"
    with pytest.raises(UsageError, match="Triton is not installed"):
        choose_kernels("triton", CUDA)
