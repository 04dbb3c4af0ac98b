"""What a process is: its rank, its GPU, its threads; and what --kernels comes to there."""

import importlib.util
import os

import pytest
import torch

from dfkd.errors import UsageError
from dfkd.runtime import Rank, choose_kernels, cpu_threads, own_rank, resolve_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}


def test_a_rank_is_read_from_torchruns_environment():
    assert own_rank({"RANK": "3", "WORLD_SIZE": "4"}) == Rank()  # another launcher's, or left over
    rank = own_rank(TORCHRUN)
    assert rank == Rank(3, 4, 1, 2) and not rank.first and Rank(0, 4).first
    owners = [[r for r in range(3) if Rank(r, 3).owns(index)] for index in range(7)]
    assert owners == [[0], [1], [2], [0], [1], [2], [0]]


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    assert resolve_device("cpu", Rank(1, 2, 1, 2)) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("auto", "cuda"):
        assert resolve_device(name, Rank(1, 2, 1, 2)) == torch.device("cuda:1")
    assert resolve_device("cuda:1") == torch.device("cuda:1") and resolve_device("cuda") == torch.device("cuda")
    with pytest.raises(UsageError, match="--device cuda:0 with several processes"):
        resolve_device("cuda:0", Rank(1, 2, 1, 2))
    with pytest.raises(UsageError, match="torchrun starts 3 processes here: torch sees 2 GPUs"):
        resolve_device("auto", Rank(0, 3, 0, 3))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system tells no affinity")
def test_threads_under_torchrun_are_those_of_a_process_that_runs_alone():
    alone, told = torch.get_num_threads(), {"OMP_NUM_THREADS": "1"}
    assert cpu_threads(3, told) == 3 and cpu_threads(0, {}) == cpu_threads(0, told) == alone
    assert 1 <= cpu_threads(0, {**TORCHRUN, **told}) <= len(os.sched_getaffinity(0))  # torchrun's own 1 does not count
    assert cpu_threads(0, {**TORCHRUN, "OMP_NUM_THREADS": "2"}) == alone  # a user's does, as torch read it


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
