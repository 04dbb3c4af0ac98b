"""What other programs call our options: diffusers', timm's and Hugging Face trainers' words for the flat names here.

The first name that the command has is the one that an error points to.
"""

import difflib
from collections.abc import Iterable

ALIASES: dict[str, tuple[str, ...]] = {
    # diffusers
    "guidance_scale": ("cfg",),
    "cfg_scale": ("cfg",),
    "num_inference_steps": ("steps",),
    "inference_steps": ("steps",),
    "num_steps": ("steps",),
    "num_images": ("count",),
    "num_samples": ("count",),
    "n_samples": ("count",),
    "num_images_per_prompt": ("count",),
    "height": ("size", "input_size"),
    "width": ("size", "input_size"),
    "resolution": ("size", "input_size"),
    "image_size": ("size", "input_size", "teacher_input_size"),
    "img_size": ("size", "input_size", "teacher_input_size"),
    "scheduler": ("sampler", "schedule"),
    "class": ("only",),
    "class_name": ("only",),
    "class_names": ("classes", "only"),
    "class_labels": ("only", "classes"),
    "label": ("only",),
    "labels": ("only", "classes"),
    "uncond_prompt": ("negative_prompt",),
    "torch_dtype": ("dtype",),
    "precision": ("dtype", "amp"),
    "mixed_precision": ("amp", "dtype"),
    "fp16": ("dtype", "amp"),
    "bf16": ("dtype", "amp"),
    "pretrained_model_name_or_path": ("prior", "architecture", "checkpoint"),
    "model_id": ("prior", "architecture", "teacher"),
    "model_path": ("prior", "checkpoint", "teacher_checkpoint"),
    "enable_xformers_memory_efficient_attention": ("attention",),
    "generator": ("seed",),
    # timm
    "model": ("architecture", "student", "teacher", "checkpoint"),
    "pretrained": ("checkpoint", "teacher_checkpoint", "teacher"),
    "pretrained_path": ("checkpoint", "teacher_checkpoint"),
    "initial_checkpoint": ("checkpoint", "teacher_checkpoint"),
    "weights": ("checkpoint", "teacher_checkpoint"),
    "ckpt": ("checkpoint", "teacher_checkpoint"),
    "checkpoint": ("teacher_checkpoint",),
    "checkpoint_path": ("checkpoint", "teacher_checkpoint"),
    "arch": ("architecture", "student", "teacher"),
    "num_classes": ("classes",),
    "interpolation": ("resize",),
    "resample": ("resize",),
    "antialias": ("resize",),
    "mean": ("teacher_mean",),
    "std": ("teacher_std",),
    "input_size": ("teacher_input_size",),
    "data_dir": ("data",),
    "dataset": ("data",),
    "data_path": ("data",),
    "val_data": ("test",),
    "opt": ("lr",),
    "sched": ("schedule",),
    "warmup_epochs": ("warmup",),
    "smoothing": ("label_smoothing",),
    "mixup": ("mix",),
    "cutmix": ("mix", "cutmix_every"),
    "aa": ("augment",),
    "clip_grad": ("clip_norm",),
    "model_ema": ("ema",),
    "model_ema_decay": ("ema",),
    "torchcompile": ("compile",),
    "log_wandb": ("wandb",),
    "bs": ("batch_size", "batch"),
    "b": ("batch_size", "batch"),
    "j": ("workers",),
    # Hugging Face trainers
    "output": ("out",),
    "output_dir": ("out",),
    "outdir": ("out",),
    "o": ("out",),
    "learning_rate": ("lr",),
    "batch_size": ("batch",),
    "train_batch_size": ("batch_size", "batch"),
    "per_device_train_batch_size": ("batch_size",),
    "num_train_epochs": ("epochs",),
    "max_train_steps": ("steps",),
    "max_steps": ("steps",),
    "lr_scheduler": ("schedule",),
    "lr_scheduler_type": ("schedule",),
    "lr_warmup_steps": ("warmup",),
    "warmup_steps": ("warmup",),
    "max_grad_norm": ("clip_norm",),
    "report_to": ("wandb", "tensorboard"),
    "dataloader_num_workers": ("workers",),
    "num_workers": ("workers",),
    "resume_from_checkpoint": ("resume",),
    "save_steps": ("checkpoint_every",),
    "validation_split": ("test_split",),
    "kd_temperature": ("temperature",),
    "tau": ("temperature",),
    "alpha": ("ce_weight",),
}


def dashed(word: str) -> str:
    """`--batch_size=3` -> `--batch-size=3`: both spellings are common."""
    head, equals, rest = word.partition("=")
    return head.replace("_", "-") + equals + rest if word.startswith("--") else word


def nearest(given: str, known: Iterable[str], prefix: str = "") -> str:
    """The known names that `given` may mean: by another program's word for one, else by spelling, else all of a few.

    given: a name or a flag, with or without its value. known: flat names. prefix: of the names as they are shown. A
    word of another program for something that is not known here is not matched by spelling: it means something else.
    """
    key, names = given.partition("=")[0].lstrip("-").replace("-", "_"), list(known)
    close = [name for name in ALIASES.get(key, ()) if name in names][:1]
    if key not in ALIASES:
        close = difflib.get_close_matches(key, names, n=3, cutoff=0.6)
    words = [prefix + name.replace("_", "-") for name in close or names]
    return "did you mean " + " or ".join(words) if close else "known are " + ", ".join(words) if len(words) < 10 else ""
