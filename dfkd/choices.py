"""What options may name: values that the commands list in --help, and that no torch is needed to know."""

Channels = tuple[float, float, float]

DTYPES = ("fp32", "bf16", "fp16")  # of the networks
STORED_BACKENDS = ("inductor", "onnxruntime", "tensorrt", "tensorrt-rtx", "torch-tensorrt")  # of engines on disk
BACKEND_NAMES = ("auto", "eager", *STORED_BACKENDS)
QUANTISE_NAMES = ("none", "int8", "fp8")  # of the UNet, beside --dtype
QUANTISING_BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")  # those of the stored that take 8-bit graphs
ATTENTION_NAMES = ("auto", "sdpa", "xformers")
KERNEL_NAMES = ("auto", "triton", "torch")  # of the fused kernels
IMAGE_FORMATS = ("png", "jpg", "npy")  # of stored images
BN_LOSSES = ("norm", "relative")  # dfkd.synthesis.statistics.bn_loss

# Samplers and the diffusers scheduler that each follows.
SAMPLERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp2m": "DPMSolverMultistepScheduler",
}

# Mean and standard deviation of the channels, of images in 0..1.
NORMALISATIONS: dict[str, tuple[Channels, Channels]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "domainnet": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
