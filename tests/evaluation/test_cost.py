"""What a network costs: counted by hand for one convolution and one linear layer."""

import torch
from torch import nn

from dfkd.evaluation.cost import costs
from dfkd.teachers import Classifier


def test_parameters_flops_and_bytes_by_hand() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module.append(nn.Linear(4, 2))
    one = Classifier(module.eval(), ("a", "b"), (0.0,) * 3, (1.0,) * 3, 8, "tiny")
    half = one.replace(module=nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2)).eval(), architecture="")
    found = costs({"teacher": one, "student": half})
    teacher = found["teacher"]
    assert teacher.parameters == (3 * 4 * 9 + 4) + 2 * 4 + (4 * 2 + 2)
    assert teacher.flops == 2 * (8 * 8 * 3 * 4 * 9 + 4 * 2)
    assert teacher.bytes == 4 * teacher.parameters + 4 * 2 * 4 + 8  # running mean and variance, and a counter
    assert (teacher.architecture, found["student"].architecture) == ("tiny", "Sequential")
    assert teacher.milliseconds > 0 and teacher.device == f"cpu, {torch.get_num_threads()} threads".replace(
        " 1 threads", " 1 thread"
    )
