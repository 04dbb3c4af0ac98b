"""What would make a run fail or mean nothing, found before it begins."""

import torch
from torch import nn

from dfkd.training.cached_logits import check_cache
from dfkd.training.compiled import check_compile
from dfkd.training.cuda_graph import check_cuda_graph
from dfkd.training.logs import check_logs
from dfkd.training.normalisation import check_sync_bn
from dfkd.training.settings import DistillSettings
from dfkd.training.world import World
from dfkd.errors import UsageError
from dfkd.data.loader import Images, Order
from dfkd.teachers.classifier import Classifier

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check(data: Images, teacher: Classifier, student: nn.Module, settings: DistillSettings, world: World) -> None:
    """Raise UsageError where classes disagree, there is too little data, or what is asked for cannot work there."""
    check_computation(settings, world)
    if teacher.class_names != data.class_names:
        raise UsageError(
            "teacher and images disagree about the classes",
            _difference(teacher.class_names, data.class_names),
            "use the teacher that the images were made for",
        )
    if len(data.ids) < 2:
        raise UsageError(f"the data has {len(data.ids)} images", "training and held-out images need one each at least")
    answers = _classes_of(student, teacher.input_size)
    if answers != len(data.class_names):
        raise UsageError(
            f"the student has {answers} classes and the images {len(data.class_names)}",
            todo="build the student with the number of classes of the images",
        )


def check_last_batch(order: Order) -> None:
    """Raise UsageError where the run's last, shorter batch has no image for some process."""
    last = order.size(order.steps - 1)
    if last < order.world:
        raise UsageError(
            f"the last batch of the run has {last} images",
            f"each of {order.world} processes needs one",
            "give the length in --steps, or start fewer processes",
        )


def check_computation(settings: DistillSettings, world: World) -> None:
    """What can be said of the settings before anything is read."""
    device = world.device
    if settings.amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 on a CPU", "float16 is for GPUs", "use --amp bf16 or --amp off")
    if settings.batch_size < world.size:
        raise UsageError(
            f"--batch-size {settings.batch_size} with {world.size} processes",
            "it is of all processes together, and each needs an image",
            "raise it, or start fewer processes",
        )
    check_compile(settings.compile, device)
    check_cuda_graph(settings, device, world.size)
    check_sync_bn(settings.sync_bn, world)
    check_cache(settings)
    check_logs(settings)


def _difference(teacher: tuple[str, ...], data: tuple[str, ...]) -> str:
    if len(teacher) != len(data):
        return f"it has {len(teacher)}, the images have {len(data)}"
    label = next(i for i, (mine, theirs) in enumerate(zip(teacher, data, strict=True)) if mine != theirs)
    return f"label {label} is {teacher[label]!r} to the teacher and {data[label]!r} in the images"


def _classes_of(student: nn.Module, size: int) -> int:
    device = next(student.parameters()).device
    training = student.training
    with torch.no_grad():
        try:
            answers: int = student.eval()(torch.zeros(2, 3, size, size, device=device)).shape[1]
        except RuntimeError as error:
            what = f"the student cannot take images of the teacher's size, {size}x{size}"
            raise UsageError(what, str(error).splitlines()[0], "choose another --student") from None
        finally:
            student.train(training)
    return answers
