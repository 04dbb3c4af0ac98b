"""Hugging Face's package ``kernels`` has our import name: however it gets in, the message says what to uninstall."""

import os
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

import kernels

ROOT = Path(__file__).resolve().parents[1]


def run(statement: str, *path: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", statement], env=env, cwd=path[0], capture_output=True, text=True)


def test_refused_when_installed_beside_ours(tmp_path: Path) -> None:
    info = tmp_path / "kernels-0.18.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.3\n")
    done = run("import kernels", ROOT, tmp_path)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "0.18.3" in done.stderr
    assert "pip uninstall kernels" in done.stderr


def test_refused_when_found_before_ours(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.18.3'\n")
    done = run("import dfkd", tmp_path, ROOT)
    assert done.returncode == 1
    assert str(tmp_path / "kernels") in done.stderr
    assert "pip uninstall kernels" in done.stderr


def test_ours_alone_is_taken() -> None:
    assert run("import kernels, engine, dfkd", ROOT).returncode == 0


def test_version_stays_where_diffusers_and_transformers_ignore_it() -> None:
    assert Version(kernels.__version__) < Version("0.18")


def test_diffusers_and_transformers_import_beside_ours() -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    assert UNet2DConditionModel.__module__.startswith("diffusers.")
    assert CLIPTextModel.__module__.startswith("transformers.")
