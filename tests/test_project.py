"""The repository as a whole: what is tracked, what is installed, what make offers."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dfkd

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


def test_build_does_not_shadow_the_package_of_that_name() -> None:
    assert not (ROOT / "build" / "__init__.py").exists()


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "build/constraints.txt"])
def test_a_newcomer_finds(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


@pytest.mark.parametrize(("script", "target"), PROJECT["scripts"].items())
def test_console_scripts_resolve(script: str, target: str) -> None:
    module, function = target.split(":")
    assert callable(getattr(importlib.import_module(module), function)), script


@pytest.mark.parametrize(("script", "target"), PROJECT["scripts"].items())
def test_every_command_has_help_and_refuses_what_it_does_not_know(
    script: str, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, function = target.split(":")
    main = getattr(importlib.import_module(module), function)
    for argument, status in (("--help", 0), ("--no-such-option", 2)):
        monkeypatch.setattr(sys, "argv", [script, argument])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == status
    shown = capsys.readouterr()
    assert shown.out.startswith(f"usage: {script} ")
    assert "default" in shown.out
    assert shown.err.startswith("error: unknown argument --no-such-option")


def test_versions_agree() -> None:
    import dfkd_kernels

    assert dfkd.__version__ == kernels.__version__


def test_dependencies_are_pinned_together() -> None:
    lines = (ROOT / "build" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if line and not line.startswith("#")}
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    assert {name.split(">=")[0].lower() for name in asked} <= pinned


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "ARGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def test_make_lists_its_targets() -> None:
    done = make()
    wanted = "help demo test check fix engines bench tables guidance-paths waterfall gpu-test gpu-report clean"
    assert [line.split()[1] for line in done.stdout.splitlines()] == wanted.split()


def test_make_gpu_report_is_one_command() -> None:
    assert make("-n", "gpu-report").stdout.splitlines()[-1].endswith("-m benchmarks.gpu_report ")


def test_make_gpu_test_needs_torch_triton_and_pytest() -> None:
    """Of the tests that need a GPU, wherever they lie, a bare machine lacks those alone that import diffusers."""
    pytest.importorskip("triton", reason="without it those of the kernels are skipped")
    command = make("-n", "gpu-test", f"PY={sys.executable}", "ARGS=--collect-only -q").stdout.splitlines()[-1]
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "benchmarks" / "bare_machine")}
    listed = subprocess.run(command, shell=True, cwd=ROOT, env=env, capture_output=True, text=True).stdout
    lacking = {"tests/engine/test_backends.py", "tests/engine/test_footprint.py"}
    assert set(re.findall(r"^ERROR (\S+)", listed, re.MULTILINE)) == lacking, listed
    assert re.findall(r"^E +(.*)", listed, re.MULTILINE) == ["ModuleNotFoundError: No module named 'diffusers'"] * 2
    tests = [path for path in tracked() if path.match("test_*.py")]
    marked = {str(path.relative_to(ROOT)) for path in tests if MARK in path.read_text(encoding="utf-8")}
    assert set(re.findall(r"^(tests/\S+)::", listed, re.MULTILINE)) == marked - lacking


def test_make_engines_trains_the_demo_teacher_first_and_builds_its_set() -> None:
    done = make("-n", "engines")
    assert done.returncode == 0
    assert "build --set demo\n" in done.stdout.replace("demo \n", "demo\n") and "build --set demo-rtx" in done.stdout
    if not (ROOT / "runs" / "demo" / "teacher" / "result.json").exists():
        assert "--preset demo --seed 0 --out runs/demo/teacher" in done.stdout


def test_the_second_make_has_nothing_to_set_up() -> None:
    if not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("this environment was not made by make")
    assert make("-q", ".venv/.installed").returncode == 0
