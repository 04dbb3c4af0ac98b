"""GuidedPipeline: a diffusion prior steered by a teacher. Image ids in, labelled images out.

    pipe = GuidedPipeline(prior, teacher, GenerateConfig.preset("demo"))
    sample = pipe(ids=range(8), seed=7)          # images uint8 [8, 3, H, W], labels int64 [8], records

An image follows from the run's seed and its id: label, prompt, noise and, within its group, CutMix partner and box.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfkd.compiled.choose import Choice, choose, load_engines
from dfkd.compiled.choose import describe as describe_choices
from dfkd.compiled.functions import Function
from dfkd.config import GenerateConfig
from dfkd.data import Record
from dfkd.errors import UsageError
from dfkd.extension import described
from dfkd.runtime import choose_kernels, own_rank, resolve_device
from dfkd.synthesis import class_words
from dfkd.synthesis.batching import cuts
from dfkd.synthesis.checks import (
    build_command,
    cfg_of,
    copy_student,
    idle,
    latent_size,
    open_decoder,
    patches_of,
    prepare_prior,
    require_guided_step,
    require_losses,
    require_restart,
    try_teacher,
)
from dfkd.synthesis.functions import EngineGuidance, dtype_of, functions_of
from dfkd.synthesis.guidance import Decode, Guidance, identity
from dfkd.synthesis.joint import JointGuidance, guide_by
from dfkd.synthesis.losses import BatchNormLoss, GuidanceLoss, losses_of
from dfkd.synthesis.pack import Pack
from dfkd.synthesis.prompts import chosen_classes, labels_of, prompt_of, unknown_labels, unread_words, unused_tokens
from dfkd.synthesis.sampler import begun, edit_noise, refine, sample, sample_through_unet
from dfkd.synthesis.schedule import SAMPLERS, build_table, find_sampler
from dfkd.synthesis.synthesizer import Sample, counted, label_probability
from dfkd.synthesis.teacher_precision import narrowed
from dfkd.synthesis.trials import try_steps
from dfkd.synthesis.views import draw, most_shift
from dfkd.teachers import Classifier
from dfkd.teachers.committee import Committee
from dfkd_engine.compiled import Engine
from dfkd_engine.group_norms import group_norms
from dfkd_engine.priors.prior import Prior
from dfkd_engine.store import EngineStore
from dfkd_kernels.guided_step import GUIDED_STEPS

FOUND_BY = {"class_words": "--class-words", "guidance_step": "--step-trials"}  # what comes before the first image

# (pipe, step, timestep, {"latents", "clean"}) -> replacements for some of them, or None; as in diffusers.
Callback = Callable[["GuidedPipeline", int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]


class GuidedPipeline:
    """A synthesizer: guided diffusion sampling.

    Args:
        prior: moved to the device of `config.compute`; its dtype must be that of the settings.
        teacher: frozen and moved there.
        config: all other settings. What is around a method is `dfkd.synthesis.methods.make_method`'s to add, such as
            --keep-intermediates.
        student: of the adversarial loss, copied; must name the teacher's classes.
        losses: guidance losses beside those that the settings name.

    Attributes:
        class_names, image_size: the teacher's, and the images' side in pixels.
        prompt, cfg: template and scale of classifier-free guidance, of the settings or else of the prior.
        group: images that interact, 1 where they do not; image i belongs to group i // group.
        call_size: images per network call, `--batch` at first; may be set between calls.
        prepared: whether what comes before the first image is found out; `prepare` sets it.
        guidance_step: length of a guidance step, that of the settings until `prepare` has found or taken up another.
        words: what stands for {label}, by label: the classes' names, or the words that `prepare` has learned.
        on_progress: called after every step with the share, in 0..1, of a call's steps that are done; None: nobody.
        guidance: of latents, None where no teacher guides; pixel_guidance: of the refinement; statistics: of noise
            editing, L_bn alone; None without these.

    Raises UsageError, before any work: settings, prior, teacher and losses that do not fit one another, and a named
    backend without its engines. Warns of classes whose words the prior does not know.
    """

    name = "guided"
    takes_clients = True
    guidance: Guidance | None
    pixel_guidance: Guidance | None
    statistics: Guidance | None

    def __init__(
        self,
        prior: Prior,
        teacher: Classifier,
        config: GenerateConfig | None = None,
        student: Classifier | None = None,
        losses: Sequence[GuidanceLoss] = (),
    ) -> None:
        self.config = config = config or GenerateConfig()
        compute, sampling = config.compute, config.sampling
        if isinstance(teacher, Committee) and config.guidance.teaching == "each":
            why = "a pipeline guides all images of a call by the same teachers"
            raise UsageError("--teaching each in one pipeline", why, "use dfkd.make_method, which makes one for each")
        self.device = resolve_device(compute.device, own_rank())
        chosen = choose_kernels(compute.kernels, self.device)
        self.kernels, self._kernels_why = chosen.name, chosen.why
        self.prior = prepare_prior(prior, config, self.device, self.kernels)
        self.guidance_decoder = open_decoder(prior, config, self.device, self.kernels)
        self.teacher = teacher.freeze(self.device).tried()
        self.class_names = teacher.class_names
        self.classes = chosen_classes(self.class_names, sampling.only)
        self.prompt = prior.prompt if sampling.prompt is None else sampling.prompt
        prompts = [prompt_of(self.prompt, self.class_names[i]) for i in self.classes]
        prior.family.check(prompts)
        known = prior.labels if prior.family.texts else ()  # names of classes have been looked up
        texts = [unknown_labels(self.prompt, [self.class_names[i] for i in self.classes], known)]
        texts += [unread_words(read, prior.family.readers) for read in (prompts, [sampling.negative_prompt])]
        texts += [unused_tokens(prior.tokens, [*prompts, sampling.negative_prompt]), *idle(config, prior)]
        for text in filter(None, texts):
            warnings.warn(text, stacklevel=2)
        self.latent_size = latent_size(sampling.size, prior)
        self.image_size = self.latent_size[0] * prior.vae_scale_factor
        self.cfg = cfg_of(sampling, prior)
        patches = patches_of(prior, self.latent_size)
        self.table = build_table(
            prior.scheduler_config, sampling.sampler, sampling.steps, pixels=prior.pixels, tokens=patches
        )
        self.losses = (*losses_of(config.guidance), *losses) if config.guidance.step > 0 else ()
        require_losses(config.guidance, self.losses)
        self.choices: tuple[Choice, ...] = ()
        self.prepared = False
        self._engines: dict[str, Engine] | None = None
        self.student, self._resting = student and copy_student(student, self.teacher), False
        self._guide()
        require_guided_step(config.guidance, len(self.table), self.guided_steps)
        require_restart(config.guidance, len(self.table))
        if self.guidance is not None:
            most_shift(config.guidance.view, self.image_size, teacher.input_size)
        self.group = config.batching.group if self._images_interact() else 1
        self.call_size = config.batching.batch
        self.guidance_step, self.words = config.guidance.step, list(self.class_names)
        if sampling.class_words:
            class_words.require_words(self)
        self.on_progress: Callable[[float], object] | None = None
        try_teacher(self.teacher, self.guidance, self.image_size)

    @torch.no_grad()
    def __call__(
        self,
        ids: Sequence[int],
        labels: Sequence[int] | None = None,
        seed: int = 0,
        callback_on_step_end: Callback | None = None,
    ) -> Sample:
        """Synthesise the images `ids`, in that order.

        ids: different numbers >= 0. Where images interact, their whole groups are sampled and the asked ones returned.
        labels: overrides the label of each id; classes come in turn otherwise.
        callback_on_step_end: (pipe, step, timestep, tensors) after every denoising step of every pack of images, with
            the tensors "latents" and "clean" [B, C, h, w]; a dict that it returns replaces them.

        Raises NotFinite, a FloatingPointError: images are not finite (names their ids, what was so first, and what
        helps). ShortMemory: a network call found too little memory; a smaller call_size may do. UsageError: wrong ids
        or labels.
        """
        asked = self.checked(ids, labels)
        images: dict[int, Tensor] = {}
        records: dict[int, Record] = {}
        for pack in self.packs(asked, seed, callback_on_step_end):
            pixels, found = self.finished(pack)
            kept = [i for i, record in enumerate(found) if record.id in asked]
            images |= {found[i].id: pixels[i] for i in kept}
            records |= {found[i].id: found[i] for i in kept}
        ordered = tuple(records[i] for i in asked)
        stacked = torch.stack([images[i] for i in asked])
        return Sample(stacked, torch.tensor([record.label for record in ordered]), ordered)

    def packs(self, asked: Mapping[int, int | None], seed: int, callback: Callback | None = None) -> Iterator[Pack]:
        """The groups of the asked images, as many at a time as a call holds. asked: as of `checked`."""
        if self.prepares and not self.prepared:
            flags = " and ".join(FOUND_BY[name] for name in self.prepares)
            todo = "call dfkd.generate, which does, or prepare() first"
            raise UsageError(f"{flags} cannot act yet", "what they find out comes before the first image", todo)
        self.ready_engines()
        members = torch.arange(self.group)
        starts = torch.tensor(list(dict.fromkeys(i // self.group for i in asked)), dtype=torch.int64) * self.group
        every = (starts[:, None] + members).flatten()
        parts = list(cuts(len(every), max(self.call_size // self.group, 1) * self.group))
        stepped = counted(len(parts) * self.steps, self.on_progress)
        for cut in parts:
            pack = self.pack(every[cut], seed, asked, callback)
            pack.stepped = stepped
            yield pack

    def pack(
        self, ids: Tensor, seed: int, given: Mapping[int, int | None] | None = None, callback: Callback | None = None
    ) -> Pack:
        """What the sampler takes for images that are sampled at once. given: labels by id, where not their own."""
        labels = labels_of(ids, self.classes, self.group if self.config.cutmix.every else 0)
        for place, image in enumerate(ids.tolist()):
            if (label := (given or {}).get(image)) is not None:
                labels[place] = label
        prompts = [prompt_of(self.prompt, self.words[label]) for label in labels.tolist()]
        return Pack(self, ids, labels, prompts, seed, callback)

    def latents(self, pack: Pack) -> Tensor:
        """Sample the latents [B, C, h, w] of a pack."""
        config, z = self.config.guidance, pack.start()
        rows = self.table.coefficients(z, self.cfg)
        if self.statistics:
            along = pack.noise_gradient(rows, self.statistics)
            z = edit_noise(z, along, config.noise_edit_steps, config.noise_edit_scale)
        loop = sample_through_unet if self.guidance and config.gradient == "unet" else sample
        mixing = pack.cutmix
        return loop(z, rows, pack.denoise, pack.guide, repeats=self.repeats_at, noise=pack.noise, mix=mixing.mix,
                    enter=mixing.enter, leave=mixing.leave, repair=mixing.repair,
                    after=pack.after, step=GUIDED_STEPS[self.kernels], clip=self.table.clip)  # fmt: skip

    def repeats_at(self, step: int) -> int:
        """Guidance steps at a denoising step; 0 where the teacher does not guide."""
        config = self.config.guidance
        guided = self.guidance is not None and config.start <= step / len(self.table) < config.stop
        return config.repeats if guided else 0

    @property
    def guided_steps(self) -> int:
        """Denoising steps that the teacher guides."""
        return sum(self.repeats_at(step) > 0 for step in range(len(self.table)))

    @property
    def steps(self) -> int:
        """Steps of an image: edits of its noise, denoising, and refinements of its pixels."""
        config = self.config.guidance
        edits = config.noise_edit_steps if self.statistics else 0
        refinements = config.refine_steps if self.pixel_guidance else 0
        again = self.reencodings * (len(self.table) - self.restart + refinements)
        return len(self.table) + edits + refinements + again

    @property
    def reencodings(self) -> int:
        """Times that an image is encoded, noised and denoised again; 0 where the teacher does not guide."""
        return self.config.guidance.reencode if self.guidance is not None else 0

    @property
    def restart(self) -> int:
        """The number of the denoising step at which it goes on then."""
        return len(self.table) - round(self.config.guidance.reencode_level * len(self.table))

    def view(self, seed: int, ids: Tensor, number: int) -> Tensor | None:
        """How the images `ids`, int64 [B], are seen at gradient `number` of their trajectories; None: as they are."""
        own = self.config.guidance.view
        return draw(own, seed, ids, number, self.image_size, self.teacher.input_size) if own.acts else None

    @property
    def prepares(self) -> tuple[str, ...]:
        """What a folder has on record once `prepare` is through; () where the settings ask for nothing."""
        tries = self.config.guidance.step_trials and self.guided_steps
        asked = {"class_words": self.config.sampling.class_words, "guidance_step": tries}
        return tuple(name for name, given in asked.items() if given)

    def prepare(self, out: Path, known: Mapping[str, Any], seed: int, say: Callable[[str], object]) -> dict[str, Any]:
        """Take up what the folder `out` has on record of a run's preparations; find out and return the rest.

        Raises UsageError, ShortMemory and NotFinite as `class_words` and `trials` do.
        """
        found: dict[str, Any] = {}
        self.prepared = True
        if "class_words" in self.prepares:
            engines, self._engines = self._engines, {}  # which have no gradient in the prompt
            if "class_words" in known:
                class_words.take_up(self, out, str(known["class_words"]))
            else:
                found |= class_words.learn(self, out, seed, say)
            self._engines = engines
        if "guidance_step" in self.prepares and "guidance_step" in known:
            self.guidance_step = float(known["guidance_step"])
        elif "guidance_step" in self.prepares:
            found |= try_steps(self, seed, say)
        return found

    @property
    def lengths(self) -> list[float]:
        """The length of a guidance step at each denoising step: falling with its noise, by --guidance-power."""
        config = self.config.guidance
        return [self.guidance_step * share**config.power for share in self.table.sigma.tolist()]

    def denoise(self, z: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """One call of the denoiser, or of the engine in its place: the prediction, like z."""
        engine = (self._engines or {}).get("unet")
        if engine is None:
            return self.prior.denoise(z, t, *conditions)
        return engine(z.to(self.prior.dtype), t.reshape(1), *conditions)[0].to(z.dtype)

    def decode(self, z0: Tensor) -> Tensor:
        """One call of the decoder, or of the engine in its place: images in 0..1."""
        engine = (self._engines or {}).get("decode")
        return self.prior.decode(z0) if engine is None else engine(z0)[0]

    @property
    def guidance_decode(self) -> Decode:
        """What the gradient of guidance goes through, by autograd: the decoder of the settings, or the prior's own."""
        return self.guidance_decoder or self.prior.decode

    def finished(self, pack: Pack) -> tuple[Tensor, list[Record]]:
        """A pack's images uint8 [B, 3, H, W] on the CPU, and their records."""
        z = self.latents(pack)
        images = self._refined(pack, pack.decode(z))
        for _ in range(self.reencodings):
            z = self._again(pack, images)
            images = self._refined(pack, pack.decode(z))
        return self.stored(pack, z, images)

    def stored(self, pack: Pack, z: Tensor, images: Tensor, step: int | None = None) -> tuple[Tensor, list[Record]]:
        """Images [B, 3, H, W] in 0..1 as uint8 on the CPU, and their records.

        z: their latents. step: of which they are the clean estimates; None: they are finished. Raises NotFinite.
        """
        finite = (z.isfinite().flatten(1).all(1) & images.isfinite().flatten(1).all(1)).cpu()
        if not finite.all():
            half = [name for name in ("unet", "decode") if dtype_of(name, self.prior) == "float16"]
            raise pack.faults.error(pack.named, finite, half)
        stored = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        sure = label_probability(self.teacher, stored, pack.labels, self.call_size)
        return stored.cpu(), pack.records(sure, step)

    def _refined(self, pack: Pack, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] after guidance on their pixels, where the settings ask for it."""
        config, pixels = self.config.guidance, self.pixel_guidance
        if pixels is None:
            return images
        own = config.refine_steps, config.refine_step, config.refine_smooth
        return refine(images, lambda x: pack.stepping(pixels, x, "a refinement"), *own)

    def _again(self, pack: Pack, images: Tensor) -> Tensor:
        """Latents of images that are noised to the level of --reencode-level, and denoised with guidance (SDEdit, arXiv
        2108.01073): what pixel steps drew comes back to what the prior draws. Without CutMix."""
        z, first = pack.restart(images, self.restart), self.restart
        rows = begun(self.table.coefficients(z, self.cfg)[first:])
        loop = sample_through_unet if self.config.guidance.gradient == "unet" else sample
        return loop(z, rows, pack.denoise, pack.guide, repeats=self.repeats_at, noise=pack.noise, after=pack.after,
                    step=GUIDED_STEPS[self.kernels], clip=self.table.clip, first=first)  # fmt: skip

    def use_engines(self, before: Mapping[str, str] | None) -> dict[str, str]:
        """Load the engines that `config.compute` and the store come to.

        before: those that a folder of images was begun with, {network: key}; None: as chosen here.
        Returns {network: key} of those in use. Raises UsageError: one is gone, or is not what the settings ask for.
        EngineError: one is damaged.
        """
        if before is not None or self.config.compute.backend != "eager":
            self.choices = self.choose_engines(before)
        store = EngineStore(self.config.compute.engines)
        self._engines = load_engines(self.choices, store, self.device) if self.choices else {}
        if self._engines:
            self._guide()
        return {choice.network: choice.key for choice in self.choices if choice.key is not None}

    def ready_engines(self) -> None:
        """`use_engines(None)`, unless engines were loaded or done without before."""
        if self._engines is None:
            self.use_engines(None)

    def without_engines(self) -> None:
        """Let every network run eagerly from now on."""
        self._engines, self.choices = {}, ()

    @property
    def backends(self) -> dict[str, dict[str, str]]:
        """What runs each function, and why: {name: {"backend", "why"}}."""
        return {choice.network: {"backend": choice.backend, "why": choice.why} for choice in self.choices}

    def functions(self) -> tuple[Function, ...]:
        """The parts that compilers can take over; empty where none can."""
        return functions_of(self)

    def update(self, student: Classifier | None) -> None:
        """Replace the student of the losses that need one; they rest where there is none yet.

        Raises UsageError where its classes are not the teacher's.
        """
        self.student = student and copy_student(student, self.teacher)
        self._resting = student is None
        self._guide()

    @property
    def needs_student(self) -> bool:
        """Whether some loss goes by a student, also while there is none."""
        return any("student" in loss.needs for loss in self.losses)

    @property
    def uses_cfg(self) -> bool:
        """Whether classifier-free guidance doubles the rows of the denoiser at any step."""
        return any(self.cfg_rows(i) == 2 for i in range(len(self.table)))

    def cfg_rows(self, step: int) -> int:
        """Rows of the denoiser an image at a denoising step: 2 where classifier-free guidance takes an unconditional
        one."""
        return 2 if self.prior.family.cfg == "rows" and self.config.sampling.cfg_acts(step, self.cfg) else 1

    def identity(self) -> dict[str, Any]:
        """What the images follow from, beside seed and ids, in JSON's types."""
        found = {key: value for key, value in self.config.identity().items() if key != "loss"}
        if (sampler := self.config.sampling.sampler) not in SAMPLERS:  # in a file, wherever that lies
            found["sampler"] = [sampler.partition(".py:")[2], described(find_sampler(sampler).update)]
        return found | {
            "prompt": self.prompt,
            "cfg": self.cfg,
            "size": self.image_size,
            "group": self.group,
            "losses": [described(loss) for loss in self.losses],
            "prior_digests": dict(self.prior.digests),
            "teacher_digest": self.teacher.digest(),
            "student_digest": self.student.digest() if self.student else None,
            **({} if self.guidance_decoder is None else {"guidance_decoder_digest": self.guidance_decoder.digest}),
        }

    def describe(self) -> list[str]:
        """Lines for people: kernels, and what runs which network."""
        lines = [f"kernels: {self.kernels} ({self._kernels_why})"]
        if self.kernels == "triton":
            for part, network in (("denoiser", self.prior.denoiser), ("VAE", self.prior.vae)):
                if network is not None:
                    lines.append(f"  where the {part} is eager: {group_norms(network)}")
        if self.guidance and self.guidance.fused:
            lines.append(f"  where the teacher is eager: {self.guidance.fused.describe()}")
        encoder = ["encode: eager (of an encoder there is no engine)"] if self.reencodings and self._engines else []
        return lines + describe_choices(self.choices) + encoder

    def checked(self, ids: Sequence[int], labels: Sequence[int] | None) -> dict[int, int | None]:
        """The asked ids in order, with their labels where they are given. Raises UsageError."""
        asked = [int(i) for i in ids]
        if not asked or len(set(asked)) < len(asked) or min(asked) < 0:
            raise UsageError(f"ids {asked[:10]}", "an image has one number >= 0", "give different ones, at least one")
        if labels is None:
            return dict.fromkeys(asked)
        given = [int(label) for label in labels]
        if len(given) != len(asked) or not all(0 <= label < len(self.class_names) for label in given):
            why = f"the teacher has {len(self.class_names)} classes"
            raise UsageError(f"labels {given[:10]} for {len(asked)} ids", why, "give one label of them for every id")
        return dict(zip(asked, given, strict=True))

    def _guide(self) -> None:
        """Make the guidance, by autograd or with engines where they are loaded. Raises UsageError."""
        self.guidance = self.pixel_guidance = self.statistics = None
        losses = [loss for loss in self.losses if not (self._resting and "student" in loss.needs)]
        if not losses:
            return
        config, narrow = self.config.guidance, self.prior.dtype == torch.float16
        beta = config.softplus_beta
        teacher = narrowed(self.teacher, self.config.compute.teacher_dtype)
        own = guide_by(self.guidance_decode, teacher, losses, self.student, narrow, self.kernels, beta)
        self.guidance = own
        if config.refine_steps:
            self.pixel_guidance = own.with_(identity)
        if config.noise_edit_steps:
            statistics = BatchNormLoss(1.0, config.bn_stats, config.bn_loss)
            self.statistics = own.with_(self.guidance_decode, (statistics,))
        if self._engines:
            decoding = "decode" if self.guidance_decoder is None else "guidance_decode"
            if isinstance(own, JointGuidance):
                self.guidance = own.by(self._engines, decoding)
                return
            by_engines = EngineGuidance(own, self._engines, decoding=decoding)
            self.guidance, self.pixel_guidance = by_engines, self.pixel_guidance and by_engines.in_pixels

    def _images_interact(self) -> bool:
        shared = any("group" in guidance.needs for guidance in (self.guidance, self.statistics) if guidance)
        return shared or self.config.cutmix.every > 0

    def choose_engines(self, before: Mapping[str, str] | None = None) -> tuple[Choice, ...]:
        """What would compute each function, nothing loaded. Arguments and errors as of `use_engines`."""
        compute = self.config.compute
        return choose(
            self.functions(),
            compute,
            EngineStore(compute.engines),
            before,
            build_command(self.config.replace(batch=self.call_size), self.prior, self.teacher),
        )
