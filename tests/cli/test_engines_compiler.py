"""dfkd-engines build by the C++ compiler of this machine: where it works, and where it does not."""

from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import AutoencoderTiny

from dfkd.cli import engines
from dfkd_engine.backends import get
from dfkd_engine.backends.inductor import PACKAGE
from tests.cli.small_generate import status_of
from tests.tiny_sd import make_tiny_sd

VAE = {
    "encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4),
    "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1),
}  # fmt: skip
# It tells its version, as compilers are asked to before anything else, and finds no header.
BROKEN = """#!/bin/sh
case "$1" in -v|--version) echo "broken 1.0"; exit 0;; esac
echo "In file included from main.cpp:1:"
echo "main.cpp:1:10: fatal error: Python.h: No such file or directory"
exit 1
"""

pytestmark = pytest.mark.skipif(get("inductor").unusable("cpu") is not None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, small_teacher: Path) -> Callable[[object], int]:
    """build(store) -> the status of dfkd-engines, which compiles a small decoder."""
    prior = make_tiny_sd(tmp_path_factory.mktemp("tiny") / "prior", vae_class=AutoencoderTiny, vae=VAE)
    run = ("--prior", prior, "--teacher-checkpoint", small_teacher, "--device", "cpu", "--guidance-step", 0)

    def build(store: object) -> int:
        own = ("--backend", "inductor", "--only", "decode", "--engines", store)
        return status_of(engines.main, "build", *own, "--", *run)

    return build


def test_in_a_folder_with_spaces(
    build: Callable[[object], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Torch splits its compiler's command at spaces; the folder of temporary files may have none then."""
    folder = tmp_path / "with space"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert build("store") == 0, capsys.readouterr().err
    (payload,) = (folder / "store").rglob(PACKAGE)
    assert [file.name for file in payload.parent.iterdir()] == [PACKAGE]  # nothing of the compiler's work
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    capsys.readouterr()
    assert build("other") == 2
    assert f"Set TMPDIR to a folder without them, instead of {folder}" in capsys.readouterr().err
    assert not list((folder / "other").rglob(PACKAGE))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("#!/bin/sh\nexit 1\n", "it needs a C++ compiler, and {} --version ends with status 1 (install g++"),
        (BROKEN, "its compiler stopped (main.cpp:1:10: fatal error: Python.h: No such file or directory)"),
    ],
)
def test_a_compiler_that_fails_is_told_in_one_line(
    script: str, words: str, build: Callable[[object], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import torch._inductor.config  # it reads CXX when it is imported, in a process of the command after this

    compiler = tmp_path / "c++"
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with torch._inductor.config.patch({"cpp.cxx": (None, str(compiler))}):
        assert build(tmp_path / "store") == 2
    said = capsys.readouterr().err.splitlines()
    assert words.format(compiler) in said[-1] and said[-1].startswith("error: decode")
    assert ("or see to the C++ compiler" in said[-1]) == (script == BROKEN)
    assert not [line for line in said if "Traceback" in line or "kept at" in line]
    assert not list((tmp_path / "store").rglob(PACKAGE))
