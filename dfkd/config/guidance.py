"""Settings of guidance: how the teacher's losses steer the samples, under which views, and what is mixed on the way."""

from dataclasses import dataclass

from dfkd.config.fields import Config, nested, option

ADV_LOSSES = ("kl", "entropy", "reference")


@dataclass(frozen=True, kw_only=True)
class ViewConfig(Config):
    """Views: how the images that guide are moved and recoloured, anew for every gradient and image"""

    EXAMPLE = "--guide-shift 4 --guide-flip"

    shift: int = option(
        0, "shift by up to so many, mirrored at the edges", unit="pixels of the teacher", low=0, flag="guide_shift"
    )
    flip: bool = option(False, "mirror one in two; not where left and right differ, as in digits", flag="guide_flip")
    crop: float = option(
        1.0, "least share of the side that is cut out and enlarged; 1: all of it", low=0.1, high=1, flag="guide_crop"
    )
    colour: float = option(
        0.0, "brightness, contrast and saturation times 1 - it to 1 + it", low=0, high=1, flag="guide_colour"
    )

    @property
    def acts(self) -> bool:
        """Whether the teacher sees anything else than the images as they are."""
        return self.shift > 0 or self.flip or self.crop < 1 or self.colour > 0


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig(Config):
    """Guidance: how the teacher's losses steer the samples"""

    EXAMPLE = "--guidance-step 0.12 --bn-weight 10 --bn-loss relative --guide-from 0.66"

    teaching: str = option(
        "joint",
        "of several --clients, joint: an image is guided by all that know its class, weighted; each: by one, the groups"
        " in turn, about its own classes (FedCADO)",
        choices=("joint", "each"),
    )
    gradient: str = option(
        "latent",
        "latent: the gradient stops at the clean latent, one UNet call a step; unet: it goes through the UNet, two"
        " calls and a backward pass (published)",
        choices=("latent", "unet"),
    )
    step: float = option(
        0.2,
        "length of a guidance step; 0: no teacher at all, and none of the options here acts",
        low=0,
        flag="guidance_step",
    )
    step_trials: int = option(
        0,
        "lengths tried on a few images before a run, each twice the one before, --guidance-step in their middle; taken"
        " is the one whose images the teacher reads best under other views; 0: --guidance-step as it is",
        unit="trials",
        low=0,
        high=20,
    )
    power: float = option(
        0.0,
        "length times (noise share)^it; the share is sigma of z = alpha z0 + sigma eps, the time of a rectified flow",
        low=0,
        high=4,
        flag="guidance_power",
    )
    repeats: int = option(1, "guidance steps at every denoising step", low=1, flag="guidance_repeats")
    decoder: str | None = option(
        None,
        "decoder that the gradient goes through instead of the prior's own, which still draws the image: a folder of"
        " dfkd-train-decoder, or a folder or hub id of an AutoencoderTiny for the same latents",
        flag="guidance_decoder",
        identity=False,
    )
    norm: str = option(
        "rms",
        "rms: gradient divided by its root mean square, per image; none: as it is",
        choices=("rms", "none"),
        flag="guidance_norm",
    )
    start: float = option(0.0, "share of the steps after which the teacher guides", low=0, high=1, flag="guide_from")
    stop: float = option(1.0, "share of the steps until which the teacher guides", low=0, high=1, flag="guide_to")
    bn_weight: float = option(0.1, "weight of the BatchNorm-statistics loss", low=0)
    cls_weight: float = option(1.0, "weight of the cross-entropy", low=0)
    adv_weight: float = option(0.0, "weight of the adversarial loss; needs --student-checkpoint", low=0)
    tv_weight: float = option(0.0, "weight of the total variation, the mean difference of neighbouring pixels", low=0)
    joint_temperature: float = option(
        1.0, "factor of the label's logit, and of all logits, in the cross-entropy (EluCD)", low=0.01
    )
    margin_discount: float = option(
        1.0, "factor more of all logits in its log-sum-exp; 0: the label's logit alone (EluCD: 0.5)", low=0, high=1
    )
    softplus_beta: float = option(
        0.0, "the gradient passes the teacher's ReLUs as those of softplus of this beta (EluCD: 3 to 5); 0: off", low=0
    )
    adv_loss: str = option(
        "kl",
        "kl: divergence from the teacher where both agree (published); entropy: of the student; reference: the"
        " student's cross-entropy less --adv-reference times the teacher's",
        choices=ADV_LOSSES,
    )
    adv_reference: float = option(1.0, "weight of the teacher's cross-entropy in --adv-loss reference", low=0)
    adv_clamp: float = option(
        0.0, "value of the adversarial loss above which an image gets no more of it; 0: none", low=0
    )
    bn_stats: str = option(
        "group", "statistics of every image alone, or of its whole group", choices=("image", "group")
    )
    bn_loss: str = option(
        "norm",
        "norm: un-squared 2-norms (published); relative: free of each layer's scale",
        choices=("norm", "relative"),
    )
    losses: tuple[str, ...] = option(
        (), "losses of your own beside these, each FILE.py:CLASS(weight=0.1, ...)", flag="loss"
    )
    noise_edit_steps: int = option(0, "gradient steps of the BN loss on the initial noise (FedCADO)", low=0)
    noise_edit_scale: float = option(0.1, "their length", low=0)
    refine_steps: int = option(0, "guidance steps on the finished image's pixels; needs guidance", low=0)
    refine_step: float = option(0.02, "rms of the first of them, of pixels in 0..1, falling to 0", low=0, high=1)
    refine_smooth: float = option(
        0.0, "deviation of the Gaussian that smooths their gradient; 0: off", unit="pixels", low=0, high=16
    )
    reencode: int = option(
        0, "times that the finished image is encoded, noised, denoised with guidance and refined again", low=0, high=100
    )
    reencode_level: float = option(0.3, "share of the denoising steps that each of them takes", low=0.001, high=1)
    view: ViewConfig = nested(ViewConfig)

    def validate(self) -> None:
        if self.start > self.stop:
            raise ValueError(f"--guide-from {self.start} lies after --guide-to {self.stop}")
        for flag, changed, acts, needed in (
            ("--adv-loss", self.adv_loss != "kl", self.adv_weight > 0, "--adv-weight above 0"),
            ("--adv-clamp", self.adv_clamp > 0, self.adv_weight > 0, "--adv-weight above 0"),
            ("--adv-reference", self.adv_reference != 1, self.adv_loss == "reference", "--adv-loss reference"),
            ("--joint-temperature", self.joint_temperature != 1, self.cls_weight > 0, "--cls-weight above 0"),
            ("--margin-discount", self.margin_discount != 1, self.cls_weight > 0, "--cls-weight above 0"),
            ("--refine-smooth", self.refine_smooth > 0, self.refine_steps > 0, "--refine-steps above 0"),
            ("--reencode-level", self.reencode_level != 0.3, self.reencode > 0, "--reencode above 0"),
        ):
            if changed and not acts:
                raise ValueError(f"{flag} needs {needed}: it does not act otherwise")
        if self.step_trials == 1:
            raise ValueError("--step-trials 1 has nothing to choose from: use 3 or 5, or leave it out")
        if self.noise_edit_steps and not self.step:
            raise ValueError("--noise-edit-steps needs guidance: --guidance-step above 0")

    @property
    def acts(self) -> bool:
        """Whether a teacher guides at all."""
        return self.step > 0 and bool(max(self._weights) > 0 or self.losses)

    @property
    def _weights(self) -> tuple[float, ...]:
        return self.bn_weight, self.cls_weight, self.adv_weight, self.tv_weight


@dataclass(frozen=True, kw_only=True)
class CutMixConfig(Config):
    """Latent CutMix: boxes pasted from another image of the class"""

    EXAMPLE = "--cutmix-every 10 --cutmix-repair 2"

    every: int = option(0, "at every so many steps, but not at the last; 0: never", low=0, flag="cutmix_every")
    form: str = option(
        "paper",
        "paper: after the step, lam ~ Beta(alpha, alpha); code: as the published program has it, before the step's UNet"
        " call, lam ~ Beta(u, u) of a u ~ Beta(alpha, alpha)",
        choices=("paper", "code"),
        flag="cutmix_as",
    )
    alpha: float = option(1.0, "its Beta(alpha, alpha)", low=1e-3, flag="cutmix_alpha")
    mix: str = option(
        "box",
        "box: pasted; mixup: whole latents lam to 1 - lam, at the noise's own variance",
        choices=("box", "mixup"),
        flag="cutmix_mix",
    )
    repair: int = option(
        0,
        "times that the box, or what mixup mixed, is noised back by a step and denoised again (RePaint)",
        low=0,
        high=1000,
        flag="cutmix_repair",
    )

    def validate(self) -> None:
        for flag, given in (("mix", self.mix != "box"), ("repair", self.repair > 0)):
            if given and not self.every:
                raise ValueError(f"--cutmix-{flag} needs Latent CutMix: --cutmix-every above 0")
