"""Data-free knowledge distillation: a frozen teacher and a frozen diffusion prior make a student's training set.

    teacher = dfkd.Classifier.from_pretrained("timm:resnet50")
    pipe = dfkd.GuidedPipeline(dfkd.Prior.from_pretrained("demo"), teacher, dfkd.GenerateConfig.preset("demo"))
    data = dfkd.generate(pipe, "runs/mine/synthetic", count=64)
    student = dfkd.distill(data, teacher, dfkd.DistillConfig.preset("demo"), out="runs/mine/student")

Each name is imported when it is first used, so that `import dfkd` loads no torch.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dfkd.priors  # noqa: F401  (makes the embedded prior known by its name)

if TYPE_CHECKING:
    from dfkd.config import DecoderTrainConfig, DistillConfig, GenerateConfig, PriorTrainConfig, TeacherTrainConfig
    from dfkd.errors import UsageError
    from dfkd.evaluation import Evaluation, evaluate
    from dfkd.synthesis.diffusers_guidance import TeacherGuidance, guided
    from dfkd.synthesis.methods import make_method
    from dfkd.synthesis.pipeline import GuidedPipeline
    from dfkd.synthesis.run import generate
    from dfkd.teachers import Classifier
    from dfkd.teachers.committee import Committee
    from dfkd.training.decoder import train_decoder
    from dfkd.training.distill import distill
    from dfkd.training.prior import train_prior
    from dfkd.training.teacher import train_teacher
    from dfkd_engine.priors.prior import Prior

__version__ = "0.1.0"

_HOME = {
    "Classifier": "dfkd.teachers",
    "Committee": "dfkd.teachers.committee",
    "DecoderTrainConfig": "dfkd.config",
    "DistillConfig": "dfkd.config",
    "Evaluation": "dfkd.evaluation",
    "GenerateConfig": "dfkd.config",
    "GuidedPipeline": "dfkd.synthesis.pipeline",
    "Prior": "dfkd_engine.priors.prior",
    "PriorTrainConfig": "dfkd.config",
    "TeacherGuidance": "dfkd.synthesis.diffusers_guidance",
    "TeacherTrainConfig": "dfkd.config",
    "UsageError": "dfkd.errors",
    "distill": "dfkd.training.distill",
    "evaluate": "dfkd.evaluation",
    "generate": "dfkd.synthesis.run",
    "guided": "dfkd.synthesis.diffusers_guidance",
    "make_method": "dfkd.synthesis.methods",
    "train_decoder": "dfkd.training.decoder",
    "train_prior": "dfkd.training.prior",
    "train_teacher": "dfkd.training.teacher",
}

__all__ = [
    "Classifier",
    "Committee",
    "DecoderTrainConfig",
    "DistillConfig",
    "Evaluation",
    "GenerateConfig",
    "GuidedPipeline",
    "Prior",
    "PriorTrainConfig",
    "TeacherGuidance",
    "TeacherTrainConfig",
    "UsageError",
    "__version__",
    "distill",
    "evaluate",
    "generate",
    "guided",
    "load_student",
    "make_method",
    "train_decoder",
    "train_prior",
    "train_teacher",
]


def load_student(path: str | Path) -> "Classifier":
    """A student of dfkd-distill (OUT/last), or a teacher of dfkd-train-teacher, in evaluation mode on the CPU.

    Called with images [B, 3, H, W] in 0..1, or PIL images, it gives logits [B, C]. Neither diffusers nor transformers
    is loaded. Raises dfkd.UsageError: no such folder, or weights that do not fit.
    """
    from dfkd.teachers import Classifier

    return Classifier.from_pretrained(Path(path))


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dfkd' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
