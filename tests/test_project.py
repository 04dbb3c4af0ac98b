"""The repository as a whole: what is tracked, what is installed, what make offers, what `import dfkd` gives."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import dfkd
from dfkd.cli import COMMANDS
from tests.cli.small_generate import CLASS_NAMES, save_classifier

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LARGEST = 5 * 1024 * 1024
MARK = "@pytest.mark" + ".gpu"  # in two: this file has no such test


def tracked() -> list[Path]:
    """Files that git tracks or would (new and not ignored)."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_tracked_file_is_large() -> None:
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in tracked()}
    assert not {name: size for name, size in sizes.items() if size > LARGEST}


def test_recipes_are_tracked_and_built_engines_are_not() -> None:
    ignored = ["git", "check-ignore", "-q"]
    tracked()
    assert subprocess.run([*ignored, "build/constraints.txt"], cwd=ROOT).returncode == 1
    assert subprocess.run([*ignored, "build/engines/a.plan"], cwd=ROOT).returncode == 0
    assert not (ROOT / "build" / "__init__.py").exists(), "it would shadow the package of that name"


def test_every_command_is_installed() -> None:
    scripts = PROJECT["scripts"]
    assert scripts == {f"dfkd-{name}": f"dfkd.cli.{name.replace('-', '_')}:main" for name in COMMANDS}
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_types_are_published() -> None:
    for package in ("dfkd", "engine/dfkd_engine", "kernels/dfkd_kernels"):
        assert (ROOT / package / "py.typed").exists()


def test_dependencies_are_pinned_together() -> None:
    lines = (ROOT / "build" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if line and not line.startswith("#")}
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    assert {name.split(">=")[0].lower() for name in asked} <= pinned


class TestApi:
    def test_every_public_name_is_there(self) -> None:
        assert {*dfkd._HOME, "load_student", "__version__"} == set(dfkd.__all__) <= set(dir(dfkd))
        for name in dfkd.__all__:
            value = getattr(dfkd, name)
            assert name == "__version__" or callable(value), f"dfkd.{name} is {value!r}"
        with pytest.raises(AttributeError, match="distil"):
            dfkd.distil  # noqa: B018

    def test_importing_it_loads_no_torch(self) -> None:
        code = "import sys, dfkd, dfkd.config; dfkd.GenerateConfig.preset('demo'); print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["False"]

    def test_a_student_is_loaded_without_diffusion(self, tmp_path: Path) -> None:
        save_classifier(tmp_path / "last")
        code = f"""
import sys, torch, dfkd
student = dfkd.load_student({str(tmp_path / "last")!r})
torch.save((student(torch.full((2, 3, 32, 32), 0.5)), student.class_names), {str(tmp_path / "logits.pt")!r})
print(*sorted({{"diffusers", "transformers", "sklearn", "scipy", "matplotlib", "onnx"}} & {{*sys.modules}}))
print(*[name for name in sys.modules if name.startswith(("dfkd.training", "dfkd.cli", "dfkd.evaluation"))])
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.split() == [], done.stdout + done.stderr
        logits, names = torch.load(tmp_path / "logits.pt")
        assert names == CLASS_NAMES and logits.shape == (2, 3)

    def test_the_embedded_prior_has_a_name(self) -> None:
        prior = dfkd.Prior.from_pretrained("demo")
        assert next(prior.denoiser.parameters()).dtype == torch.float32


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "ARGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def test_make_lists_its_targets() -> None:
    listed = {line.split()[1] for line in make().stdout.splitlines()}
    assert {"help", "demo", "test", "check", "fix", "engines", "bench", "gpu-test", "gpu-report", "clean"} <= listed
    for target in listed:
        assert make("-n", target).returncode == 0, target


def test_make_gpu_test_needs_torch_triton_and_pytest() -> None:
    """A bare machine collects every test that needs a GPU, but for the files that import diffusers."""
    pytest.importorskip("triton", reason="without it those of the kernels are skipped")
    command = make("-n", "gpu-test", f"PY={sys.executable}", "ARGS=--collect-only -q").stdout.splitlines()[-1]
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "benchmarks" / "bare_machine")}
    listed = subprocess.run(command, shell=True, cwd=ROOT, env=env, capture_output=True, text=True).stdout
    lacking = set(re.findall(r"^ERROR (\S+)", listed, re.MULTILINE))
    assert set(re.findall(r"^E +(.*)", listed, re.MULTILINE)) <= {"ModuleNotFoundError: No module named 'diffusers'"}
    tests = [path for path in tracked() if path.match("test_*.py")]
    marked = {str(path.relative_to(ROOT)) for path in tests if MARK in path.read_text(encoding="utf-8")}
    assert set(re.findall(r"^(tests/\S+)::", listed, re.MULTILINE)) == marked - lacking
    assert len(lacking) < len(marked)


def test_the_makefile_runs_modules_that_exist() -> None:
    modules = set(re.findall(r"-m ((?:dfkd|benchmarks)[\w.]*)", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert modules and all(importlib.util.find_spec(name) for name in modules)
