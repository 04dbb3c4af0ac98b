"""Run for run: neither dfkd-generate nor dfkd-distill loads a module that can read real data."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WATCHED = ("dfkd.evaluation", "mlxtend", "sklearn.datasets", "pyarrow.parquet")

SCRIPT = """
import importlib.abc, json, sys

WATCHED = {watched!r}
asked = []


class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == watched or name.startswith(watched + ".") for watched in WATCHED):
            asked.append(name)
        return None


sys.meta_path.insert(0, Watch())
from dfkd.cli import distill, generate

for main, argv in ((generate.main, {generate!r}), (distill.main, {distill!r})):
    try:
        main(argv)
    except SystemExit as done:
        assert done.code == 0, (argv, done.code)
loaded = [name for name in sys.modules if any(name == w or name.startswith(w + ".") for w in WATCHED)]
print(json.dumps([asked, loaded]))
"""


def test_no_real_data_between_teacher_and_student(small_prior, small_teacher, tmp_path):
    teacher = ["--teacher-checkpoint", str(small_teacher), "--device", "cpu"]
    generate = [*teacher, "--prior", str(small_prior), "--out", str(tmp_path / "data")]
    generate += ["--count", "12", "--group", "6", "--steps", "1"]
    distill = [*teacher, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "student"), "--student", "resnet8"]
    distill += ["--steps", "2", "--batch-size", "4", "--augment", "none", "--lr", "0.01"]
    script = SCRIPT.format(watched=WATCHED, generate=generate, distill=distill)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "student/last/model.safetensors").is_file()
    assert json.loads(done.stdout.splitlines()[-1]) == [[], []]
