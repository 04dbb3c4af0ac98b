"""Published settings as typed values; each key is an option of the command that it is listed under.

Sources: DiffDFKD (arXiv:2504.00870) for the DomainNet and CIFAR rows, FedCADO (arXiv:2311.08870) for its own.
They fix the loss, the sampler, the prompt and the amount; the path of the gradient stays an option
(``--gradient unet`` is the published one).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """Overrides of the defaults of ``dfkd-train-teacher``, ``dfkd-generate`` and ``dfkd-distill``."""

    description: str
    train_teacher: Mapping[str, object] = field(default_factory=dict)
    generate: Mapping[str, object] = field(default_factory=dict)
    distill: Mapping[str, object] = field(default_factory=dict)

    def overrides(self, command: str) -> Mapping[str, object]:
        """The overrides for ``command`` ("dfkd-generate" or "generate"); empty for a command without any."""
        by_command = {"train-teacher": self.train_teacher, "generate": self.generate, "distill": self.distill}
        return by_command.get(command.removeprefix("dfkd-").replace("_", "-"), {})


_SD15 = {
    "prior": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "size": 512,
    "sampler": "ddpm",
    "bn_stats": "image",  # the published batch is one image
    "bn_loss": "norm",
}
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_DOMAINNET = (
    *("airplane", "clock", "axe", "basketball", "bicycle"),
    *("bird", "strawberry", "flower", "pizza", "bracelet"),
)
_SGD = {"batch_size": 256, "momentum": 0.9, "temperature": 30.0, "schedule": "multistep"}
_DISTILL_CIFAR = {
    **_SGD,
    "lr": 0.2,
    "epochs": 240,
    "milestones": ("150/240", "180/240", "210/240"),
    "weight_decay": 5e-4,
    "augment": "crop-flip",
}
_DISTILL_DOMAINNET = {
    **_SGD,
    "lr": 0.1,
    "epochs": 220,
    "milestones": ("150/220", "180/220", "210/220"),
    "weight_decay": 1e-4,
    "augment": "rrc-flip",
}
_TEACHER_CIFAR = {
    "lr": 0.1,
    "epochs": 200,
    "batch_size": 256,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": "multistep",
    "augment": "crop-flip",
}
_TEACHER_DOMAINNET = {
    "architecture": "resnet34_imagenet",
    "lr": 0.01,
    "epochs": 120,
    "batch_size": 128,
    "momentum": 0.9,
    "weight_decay": 2e-4,
    "schedule": "multistep",
    "augment": "rrc-flip",
}
_CLASS_FREE = "a realistic photo"


PRESETS: dict[str, Preset] = {
    "demo": Preset(
        "digits on photos with the embedded prior: a few minutes on two CPU cores",
        train_teacher={
            "data": "digits-on-photos",
            "architecture": "resnet8_half",
            "epochs": 20,
            "batch_size": 64,
            "lr": 0.1,
            "schedule": "onecycle",
            "augment": "affine",
            "loader": "resident",  # the same bits with DALI and without
        },
        generate={
            "count": 400,
            "group": 200,
            "batch": 200,
            "sampler": "ddim",
            "steps": 8,
            "cfg": 4.0,
            "cfg_to": 0.5,
            "prompt": "a photo of the digit {label}",
            "guidance_step": 0.12,
            "guidance_repeats": 2,
            "guide_from": 0.66,
            "refine_steps": 20,
            "bn_weight": 10.0,
            "cls_weight": 1.0,
            "bn_stats": "group",
            "bn_loss": "relative",
            "shard_size": 200,
        },
        distill={
            "student": "resnet8_half",
            "steps": 260,
            "batch_size": 128,
            "lr": 0.2,
            "schedule": "cosine",
            "warmup": 40,
            "temperature": 4.0,
            "augment": "affine",
            "mix": "cutmix",
        },
    ),
    "cifar10": Preset(
        "CIFAR-10, WRN-40-2 to WRN-16-2, class-free prompt, 50 000 images",
        train_teacher={**_TEACHER_CIFAR, "architecture": "wrn40_2"},
        generate={
            **_SD15,
            "teacher": "wrn40_2",
            "classes": _CIFAR10,
            "count": 50_000,
            "steps": 50,
            "cfg": 3.0,
            "prompt": _CLASS_FREE,
            "bn_weight": 0.1,
            "cls_weight": 1.0,
            "adv_weight": 0.0,
            "cutmix_every": 10,
        },
        distill={**_DISTILL_CIFAR, "teacher": "wrn40_2", "student": "wrn16_2"},
    ),
    "cifar10-label": Preset(
        "CIFAR-10, ResNet-34 to ResNet-18, class names in the prompt and the class loss alone, 50 000 images",
        train_teacher={**_TEACHER_CIFAR, "architecture": "resnet34"},
        generate={
            **_SD15,
            "teacher": "resnet34",
            "classes": _CIFAR10,
            "count": 50_000,
            "steps": 10,
            "cfg": 3.0,
            "prompt": "A realistic photo of {label}",
            "bn_weight": 0.0,
            "cls_weight": 1.0,
            "adv_weight": 0.0,
            "cutmix_every": 0,
        },
        distill={**_DISTILL_CIFAR, "teacher": "resnet34", "student": "resnet18"},
    ),
    "domainnet-sketch": Preset(
        "DomainNet sketch, ResNet-34 to ResNet-18 at 224, 200 rounds of 10 classes; needs --student-checkpoint",
        train_teacher=_TEACHER_DOMAINNET,
        generate={
            **_SD15,
            "teacher": "resnet34_imagenet",
            "classes": _DOMAINNET,
            "count": 2_000,
            "steps": 70,
            "cfg": 7.0,
            "prompt": "an image.",
            "bn_weight": 0.1,
            "cls_weight": 1.0,
            "adv_weight": 1.0,
            "cutmix_every": 14,
        },
        distill={**_DISTILL_DOMAINNET, "teacher": "resnet34_imagenet", "student": "resnet18_imagenet"},
    ),
    "domainnet-quickdraw": Preset(
        "DomainNet quickdraw, ResNet-34 to ResNet-18 at 224, class-free prompt, 4 500 images a class",
        train_teacher=_TEACHER_DOMAINNET,
        generate={
            **_SD15,
            "teacher": "resnet34_imagenet",
            "classes": _DOMAINNET,
            "count": 45_000,
            "steps": 70,
            "cfg": 3.0,
            "prompt": _CLASS_FREE,
            "bn_weight": 0.1,
            "cls_weight": 1.0,
            "adv_weight": 0.0,
            "cutmix_every": 14,
        },
        distill={**_DISTILL_DOMAINNET, "teacher": "resnet34_imagenet", "student": "resnet18_imagenet"},
    ),
    "fedcado": Preset(
        "FedCADO, once per client's classifier: 10 noise-editing steps; give --count 30 x the client's classes",
        generate={
            **_SD15,
            "steps": 50,
            "cfg": 3.0,
            "prompt": "an image of {label}",
            "bn_weight": 0.1,
            "cls_weight": 1.0,
            "adv_weight": 0.0,
            "cutmix_every": 0,
            "noise_edit_steps": 10,
            "noise_edit_scale": 0.1,
        },
    ),
}
