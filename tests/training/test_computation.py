"""How a run is computed: cached logits, torch.compile, CUDA graphs, and where each is refused."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dfkd.training import cached_logits, step
from dfkd.training.checks import check_computation
from dfkd.training.compiled import compiled
from dfkd.training.cuda_graph import check_cuda_graph
from dfkd.training.world import World
from dfkd.errors import UsageError
from dfkd_engine.backends import get
from tests.training.small_run import network, settings, teacher
from tests.training.test_train import equal, run

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NO_COMPILER = get("inductor").unusable(CPU)
PLAIN = {"augment": "none", "mix": "none"}


def same_but_for_rounding(one: Path, other: Path, tolerance: float) -> None:
    """Weights of two runs of about a dozen steps; float32 unless the tolerance says otherwise."""
    mine, theirs = (load_file(path / "last" / "model.safetensors") for path in (one, other))
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=tolerance, atol=tolerance / 10)


class Counted(nn.Module):
    """A network that counts the images that it is asked for in training."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.images = inner, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.images += len(x)
        answers: torch.Tensor = self.inner(x)
        return answers


@pytest.mark.parametrize("changes", [{}, {"amp": "bf16"}, {"epochs": 3}, {"loader": "torch", "workers": 0}])
def test_cached_logits_train_the_same_student_but_for_rounding(tmp_path: Path, changes: dict[str, object]) -> None:
    """The last layer's matrix product rounds a row by its place in the batch; with epochs=3 the last batch is short."""
    for name in ("on", "off", "auto"):
        run(tmp_path / name, settings(cache_logits=name, **PLAIN, **changes))
    assert equal(tmp_path / "on", tmp_path / "auto")
    same_but_for_rounding(tmp_path / "on", tmp_path / "off", 1e-2 if "amp" in changes else 1e-4)


def test_the_teacher_is_asked_once_for_every_image(tmp_path: Path) -> None:
    from dataclasses import replace

    asked = {}
    for name in ("on", "off"):
        counted = Counted(teacher().module)
        run(tmp_path / name, settings(cache_logits=name, held_out=0.0, steps=30, **PLAIN), teacher=replace(
            teacher(), module=counted
        ))  # fmt: skip
        asked[name] = counted.images
    assert asked == {"on": 40, "off": 30 * 8}  # 40 images: five calls of 8


@pytest.mark.parametrize("changes", [{"augment": "shift"}, {"mix": "mixup"}])
def test_logits_of_images_that_change_are_not_cached(changes: dict[str, object]) -> None:
    ((name, value),) = changes.items()
    options = settings(**{**PLAIN, **changes})
    choice = cached_logits.choose_cache(options, 40, 3)
    assert not choice.on and f"--{name} {value}" in choice.why
    with pytest.raises(UsageError, match=f"--cache-logits on: with --{name} {value}"):
        check_computation(settings(cache_logits="on", **{**PLAIN, **changes}), World(CPU))


def test_a_large_table_is_made_only_when_asked() -> None:
    assert not cached_logits.choose_cache(settings(**PLAIN), 10**6, 1000).on
    assert cached_logits.choose_cache(settings(cache_logits="on", **PLAIN), 10**6, 1000).on


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
def test_compiled_networks_train_the_same_student_but_for_rounding(tmp_path: Path) -> None:
    """Dropout and a shorter last batch included."""
    options = {"epochs": 2, "batch_size": 16}
    calls = []
    own = step.compiled

    def counted(module: nn.Module, mode: str, rows: int) -> object:
        calls.append((mode, rows))
        return own(module, mode, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "compiled", counted)
        run(tmp_path / "eager", settings(**options))
        run(tmp_path / "compiled", settings(compile="default", **options))
    assert calls == [("off", 16)] * 2 + [("default", 16)] * 2
    assert not equal(tmp_path / "compiled", tmp_path / "eager")  # it was compiled
    same_but_for_rounding(tmp_path / "compiled", tmp_path / "eager", 1e-3)


def test_a_batch_of_another_size_goes_through_the_network_itself() -> None:
    seen = []

    def failing(*given: object, **options: object) -> object:
        return lambda images: seen.append(len(images)) or images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", failing)
        call = compiled(nn.Identity(), "default", 4)
    call(torch.zeros(4, 1))
    call(torch.zeros(3, 1))
    assert seen == [4]


def test_a_network_that_cannot_be_compiled_is_refused_in_words() -> None:
    def failing(*given: object, **options: object) -> object:
        def call(images: torch.Tensor) -> torch.Tensor:
            raise torch._dynamo.exc.TorchDynamoException("no such op\nmore")

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", failing)
        call = compiled(nn.Identity(), "default", 4)
    with pytest.raises(UsageError, match=r"--compile default cannot take the network: no such op\. use"):
        call(torch.zeros(4, 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cuda_graph": True}, "--cuda-graph on cpu: CUDA graphs are for GPUs"),
        ({"compile": "reduce-overhead"}, "--compile reduce-overhead on cpu"),
        ({"amp": "fp16"}, "--amp fp16 on a CPU"),
    ],
)
def test_what_needs_a_gpu_is_refused_on_a_cpu(
    changes: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(get("inductor")), "unusable", lambda *_: None)
    with pytest.raises(UsageError, match=re.escape(words)):
        check_computation(settings(**changes), World(CPU))


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="--compile default: it needs a C\\+\\+ compiler and finds no no-such"):
        check_computation(settings(compile="default"), World(CPU))


@pytest.mark.parametrize(
    ("changes", "processes", "words"),
    [
        ({}, 2, "with 2 processes"),
        ({"amp": "fp16"}, 1, "with --amp fp16"),
        ({"compile": "reduce-overhead"}, 1, "with --compile reduce-overhead"),
        ({"compile": "max-autotune"}, 1, "with --compile max-autotune"),
    ],
)
def test_what_cannot_be_captured_is_refused(changes: dict[str, object], processes: int, words: str) -> None:
    with pytest.raises(UsageError, match=f"--cuda-graph {words}"):
        check_cuda_graph(settings(cuda_graph=True, **changes), GPU, processes)
    check_cuda_graph(settings(cuda_graph=True, compile="default", amp="bf16"), GPU, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "clip_norm": 0.5, "mix": "both"}, PLAIN, {"epochs": 3}])
def test_a_captured_step_trains_as_the_uncaptured_one(tmp_path: Path, changes: dict[str, object]) -> None:
    """The same kernels in the same order: only algorithms that a library picks anew may round otherwise."""
    for name in (True, False):
        run(tmp_path / str(name), settings(cuda_graph=name, device="cuda", **changes))
    same_but_for_rounding(tmp_path / "True", tmp_path / "False", 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{"amp": "fp16", "ema": 0.9}, {"amp": "bf16"}, {"compile": "reduce-overhead"}])
def test_precisions_and_compiled_networks_train_on_a_gpu(tmp_path: Path, changes: dict[str, object]) -> None:
    result = run(tmp_path, settings(device="cuda", steps=60, **changes))
    assert result.skipped < 60 and all(p.isfinite().all() for p in result.student.module.parameters())


@pytest.mark.gpu
def test_the_fused_optimizer_starts_well_where_its_first_step_is_skipped() -> None:
    from dfkd.training.state import State

    own = State(network(0).cuda(), settings(amp="fp16"), GPU)
    for factor in (1e36, 1.0):
        own.set_rate(0.1)
        own.descend(factor * own.student(torch.ones(2, 3, 8, 8, device="cuda")).square().sum())
        own.advance()
    assert own.measured()["skipped"] == 1 and all(p.isfinite().all() for p in own.student.parameters())
