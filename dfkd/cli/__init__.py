"""The commands: thin shells that turn flags into settings and call the library; each has a `main(argv)`."""

COMMANDS = {
    "run": "the whole job from one file: teacher, images, student, test, baselines, report",
    "train-teacher": "real images -> a classifier to learn from",
    "train-prior": "images -> a small diffusion prior, or one that exists fine-tuned on them",
    "train-decoder": "a prior -> a tiny decoder of its latents, for quicker guidance",
    "generate": "teacher and diffusion prior -> labelled images",
    "distill": "images and teacher -> a student",
    "evaluate": "a classifier on labelled real images -> accuracy, calibration, agreement",
    "report": "the folders of a run -> one page to read",
    "export": "a classifier -> one file for others: ONNX or torch.export",
    "engines": "networks compiled ahead of time: build, list, explain, verify, prune",
}
