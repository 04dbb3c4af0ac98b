"""How a step is computed: torch.compile and CUDA graphs, and where each is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dfkd.errors import UsageError
from dfkd.training.step import check_training, compiled, try_compiler
from dfkd.training.world import World
from dfkd_engine.backends import get
from tests.training.small_run import close, network, run, settings

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_compiled_networks_train_the_same_student_but_for_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: list[Any]
) -> None:
    """Traced forward and backward, but not turned into C++, which takes a minute; that is tried on a GPU."""
    own, modes = torch.compile, []

    def traced(network: nn.Module, dynamic: bool, options: dict[str, Any]) -> Any:
        modes.append(options["fallback_random"])
        return own(network, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(type(get("inductor")), "unusable", lambda *_: None)
    for mode in ("off", "default"):
        run(tmp_path / mode, settings(compile=mode))
    assert modes == [True, True] and tried == [("default", CPU)]
    close(tmp_path / "default/last", tmp_path / "off/last", 1e-3)


def test_a_network_that_cannot_be_compiled_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: object, **options: object) -> object:
        def call(images: torch.Tensor) -> torch.Tensor:
            raise torch._dynamo.exc.TorchDynamoException("no such op\nmore")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(UsageError, match=r"--compile default cannot take .*: TorchDynamoException: no such op\. use"):
        compiled(nn.Identity(), "default")(torch.zeros(4, 1))


@pytest.mark.parametrize(
    ("changes", "world", "words"),
    [
        ({"amp": "fp16"}, World(CPU), "--amp fp16 on a CPU"),
        ({"compile": "reduce-overhead"}, World(CPU), "--compile reduce-overhead on cpu"),
        ({"sync_bn": "on"}, World(CPU, 1, 2), "--sync-bn on on cpu: torch's SyncBatchNorm is for GPUs"),
        ({"cuda_graph": True}, World(CPU), "--cuda-graph on cpu: CUDA graphs are for GPUs"),
        ({"cuda_graph": True}, World(GPU, 0, 2), "--cuda-graph with 2 processes"),
        ({"cuda_graph": True, "amp": "fp16"}, World(GPU), "--cuda-graph with --amp fp16"),
        ({"cuda_graph": True, "compile": "max-autotune"}, World(GPU), "--cuda-graph with --compile max-autotune"),
    ],
)
def test_what_cannot_work_is_refused(
    changes: dict[str, Any], world: World, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(get("inductor")), "unusable", lambda *_: None)
    with pytest.raises(UsageError, match=re.escape(words)):
        check_training(settings(**changes).train, world)


def test_what_works_passes(monkeypatch: pytest.MonkeyPatch, tried: list[Any]) -> None:
    monkeypatch.setattr(type(get("inductor")), "unusable", lambda *_: None)
    check_training(settings(cuda_graph=True, compile="default", amp="bf16").train, World(GPU))
    check_training(settings(sync_bn="on").train, World(CPU))
    check_training(settings(sync_bn="auto", amp="bf16").train, World(CPU, 1, 2))
    assert tried == [("default", GPU)]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.device]]:
    """The compilers that were tried, none of them in fact."""
    found: list[tuple[str, torch.device]] = []
    monkeypatch.setattr("dfkd.training.step.try_compiler", lambda *given: found.append(given))
    return found


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="--compile default: it needs a C\\+\\+ compiler and finds no no-such"):
        check_training(settings(compile="default").train, World(CPU))


@pytest.mark.skipif(get("inductor").unusable(CPU) is not None, reason="needs a C++ compiler")
def test_a_compiler_that_fails_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that answers when it is asked for its version, and compiles nothing."""
    import torch._inductor.config

    compiler = tmp_path / "c++"
    says = "echo a.cpp:1: note: x\necho a.cpp:1: error: no y"
    compiler.write_text(f"#!/bin/sh\ncase $1 in -*v*) echo broken 1.0; exit 0;; esac\n{says}\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    try_compiler.cache_clear()
    own, words = {"cpp.cxx": (None, str(compiler))}, r"^--compile default cannot work here: a\.cpp:1: error: no y\. use"
    with torch._inductor.config.patch(own), pytest.raises(UsageError, match=words):
        run(tmp_path / "out", settings(compile="default"))
    assert not (tmp_path / "out").exists() and not any(capfd.readouterr())


def test_a_backward_pass_that_cannot_be_compiled_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: list[Any]
) -> None:
    """It is compiled when it is first taken, behind the call of the network."""

    def failing(network: nn.Module, **options: object) -> object:
        def refuse(gradient: torch.Tensor) -> None:
            raise torch._dynamo.exc.TorchDynamoException("no gradient of that op")

        def call(images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = network(images)
            if logits.requires_grad:
                logits.register_hook(refuse)
            return logits

        return call

    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setattr(type(get("inductor")), "unusable", lambda *_: None)
    with pytest.raises(UsageError, match=r"--compile default cannot take the network: .*no gradient of that op"):
        run(tmp_path / "out", settings(compile="default"))


def test_batch_norm_is_synchronised_where_that_acts() -> None:
    gpus, cpus = World(GPU, 0, 2), World(CPU, 0, 2)

    def layers(wanted: str, world: World) -> int:
        changed = world.synchronised(network(0), wanted)
        assert changed.state_dict().keys() == network(0).state_dict().keys()
        return sum(isinstance(layer, nn.SyncBatchNorm) for layer in changed.modules())

    assert layers("auto", gpus) == layers("on", gpus) == 1
    assert layers("off", gpus) == layers("auto", cpus) == layers("on", World(CPU)) == 0
