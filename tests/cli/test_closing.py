"""The last lines: what was made, and a command to go on with that its program takes."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from dfkd.cli.closing import closing
from dfkd.cli.parse import parse
from dfkd.config import (
    Config,
    DistillCommand,
    EvaluateCommand,
    ExportCommand,
    GenerateCommand,
    RunCommand,
    TrainTeacherCommand,
)

NEXT = {
    "dfkd-generate": GenerateCommand,
    "dfkd-distill": DistillCommand,
    "dfkd-evaluate": EvaluateCommand,
    "dfkd-export": ExportCommand,
}
OUT = Path("runs/my pets/part")
TRAINED = {"accuracy": 0.9634, "test_images": 1000}
MADE = {"images": 400, "class_names": ["cat", "dog"]}


@pytest.mark.parametrize(
    ("asked", "result", "told", "command"),
    [
        (
            TrainTeacherCommand.of(data="imagefolder:x", architecture="resnet8", out=OUT),
            {**TRAINED, "class_names": ["cat", "dog"]},
            f"made: {OUT}, a resnet8 of accuracy 96.3 % on 1000 test images",
            f"dfkd-generate --teacher-checkpoint '{OUT}' --prior YOUR_PRIOR --out 'runs/my pets/synthetic'",
        ),
        (
            TrainTeacherCommand.of(data="digits-on-photos", architecture="resnet8", out=OUT),
            {**TRAINED, "class_names": ["zero", "nine"]},
            "of accuracy 96.3 %",
            f"dfkd-generate --teacher-checkpoint '{OUT}' --out 'runs/my pets/synthetic'",
        ),
        (
            GenerateCommand.of(out=OUT, teacher_checkpoint="t.pth", teacher="wrn40_2", teacher_mean=(0.5, 0.4, 0.3)),
            {**MADE, "image_size": 32},
            f"made: {OUT}, 400 images of 2 classes",
            f"dfkd-distill --data '{OUT}' --teacher wrn40_2 --teacher-checkpoint t.pth --teacher-mean 0.5,0.4,0.3"
            " --student resnet18 --out 'runs/my pets/student'",
        ),
        (
            GenerateCommand.of(out="a/b", teacher="timm:vit", classes=("cat", "dog")),
            {**MADE, "image_size": 512},
            "preview.png",
            "dfkd-distill --data a/b --teacher timm:vit --student resnet18_imagenet --out a/student",
        ),
        (
            DistillCommand.of(data=("a",), out="a/s", student="wrn16_1", teacher="timm:vit"),
            {"agreement": 0.931, "accuracy": None},
            "made: a/s/last, a wrn16_1; agrees with its teacher on 93.1 % of held-out images",
            "dfkd-evaluate --checkpoint a/s/last --data imagefolder:YOUR_IMAGES",
        ),
        (
            DistillCommand.of(data=("a",), out="a/s", student="wrn16_1", teacher="timm:vit"),
            {"agreement": None, "accuracy": 0.5, "test_images": 10},
            "made: a/s/last, a wrn16_1; accuracy 50.0 % on 10 real images",
            "dfkd-export --checkpoint a/s/last",
        ),
        (
            RunCommand.of(preset="demo"),
            {"out": "runs/demo", "report": "runs/demo/report/report.html", "accuracy": 0.843},
            "made: runs/demo/report/report.html, to be opened in a browser; its student has an accuracy of 84.3 %",
            "dfkd-export --checkpoint runs/demo/student/last",
        ),
    ],
)
def test_what_was_made_and_how_to_go_on(asked: Config, result: dict[str, Any], told: str, command: str) -> None:
    made, following = closing(asked, result)
    assert told in made and following == f"next: {command}"
    program, *words = shlex.split(command)
    parse(NEXT[program], words, program)


def test_commands_that_end_a_run(tmp_path: Path) -> None:
    result = {"out": "m.onnx", "bytes": 420_000, "error": 3.2e-7, "card": "MODEL.md"}
    asked = ExportCommand.of(checkpoint="x")
    assert closing(asked, result) == ["made: m.onnx, 0.4 MB, within 3e-07 of torch; MODEL.md says how it is loaded"]
    assert "MODEL" not in closing(asked, {**result, "card": None})[0]
    tested = {"accuracy": 0.5, "images": 7}
    assert closing(EvaluateCommand.of(data="x", checkpoint="net.pth"), tested) == ["accuracy 50.0 % on 7 images"]
    assert len(closing(EvaluateCommand.of(data="x", checkpoint=tmp_path), tested)) == 2
    assert "without --plan-only" in closing(GenerateCommand.of(out="x", plan_only=True), {})[0]
