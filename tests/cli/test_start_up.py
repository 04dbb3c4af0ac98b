"""Commands start without the libraries that take seconds to load: --help and a wrong option answer at once."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("accelerate", "diffusers", "jinja2", "matplotlib", "mlxtend", "scipy", "sklearn", "transformers")


@pytest.mark.parametrize("module", ["train_teacher", "generate", "distill", "report", "engines", "export"])
def test_a_command_starts_light(module: str) -> None:
    code = f"import sys, dfkd.cli.{module}; print(*sorted({{*sys.modules}} & {{*{HEAVY!r}}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_engines_are_answered_for_without_torch() -> None:
    """Which engines are current is asked often, and is a matter of files."""
    code = "import sys, dfkd.cli.engines; print(*sorted({*sys.modules} & {'torch', 'numpy', 'onnxruntime', 'onnx'}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
