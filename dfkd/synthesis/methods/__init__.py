"""Ways to make labelled images, by name. A method of your own is FILE.py:NAME; see `make_method`."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from dfkd.config import CandidatesConfig, FilterConfig, GenerateConfig, leaves, plain
from dfkd.config.synthesis import ADVERSARIAL_METHODS
from dfkd.errors import UsageError
from dfkd.extension import resolve, settings_of
from dfkd.runtime import own_rank, resolve_device
from dfkd.synthesis.candidates import Candidates
from dfkd.synthesis.each import EachTeacher
from dfkd.synthesis.filter import Filter
from dfkd.synthesis.intermediates import Intermediates
from dfkd.synthesis.methods.cmi import CMI
from dfkd.synthesis.methods.deepinversion import DeepInversion
from dfkd.synthesis.methods.fast import Fast
from dfkd.synthesis.methods.folder import Folder
from dfkd.synthesis.methods.generative import Generative
from dfkd.synthesis.methods.noise import Noise
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd.synthesis.synthesizer import Synthesizer
from dfkd.teachers import Classifier
from dfkd.teachers.committee import Committee
from dfkd_engine.priors.prior import Prior

METHODS: dict[str, Callable[..., Synthesizer]] = {
    "guided": GuidedPipeline,
    "deepinversion": DeepInversion,
    "fast": Fast,
    "cmi": CMI,
    "generative": Generative,
    "folder": Folder,
    "noise": Noise,
}
ADVERSARIAL = tuple(METHODS[name] for name in ADVERSARIAL_METHODS)  # which say themselves whether they go by a student
AROUND = (*leaves(CandidatesConfig), *leaves(FilterConfig))
# What the run of any method goes by.
COMMON = ("method", "batch", "device", "threads", "shard_size", "image_format", *AROUND)


def needs_prior(config: GenerateConfig) -> bool:
    """Whether the method samples from a diffusion prior, which need not be loaded otherwise. Raises UsageError."""
    return bool(getattr(resolve(config.method, METHODS, "method")[0], "needs_prior", True))


def unread(synthesizer: Synthesizer, config: GenerateConfig) -> tuple[str, ...]:
    """Settings, by flat name, that are not at their defaults and that the method does not go by.

    () for a method without an attribute `reads`, the names of those that it goes by beside COMMON.
    """
    reads, views = getattr(synthesizer, "reads", None), ("guide_flip",) if config.filter.views else ()
    return () if reads is None else tuple(name for name in config.changed() if name not in {*COMMON, *views, *reads})


def make_method(
    config: GenerateConfig, prior: Prior | None, teacher: Classifier, student: Classifier | None = None
) -> Synthesizer:
    """The synthesizer that `config.method` names, such as "deepinversion(steps=200)" or "my.py:Blank(level=0.2)".

    The name stands for a class or a function, called as `factory(prior, teacher, config, **settings)` with the settings
    in the parentheses, and with `student=` where there is one. The prior is None for a factory whose attribute
    `needs_prior` is False. A whole method of one's own:

        class Blank:
            name, group, needs_prior = "blank", 1, False

            def __init__(self, prior, teacher, config, level=0.5):
                self.class_names, self.image_size, self.level = teacher.class_names, teacher.input_size, level

            def identity(self):
                return {"level": self.level}

            def __call__(self, ids, labels=None, seed=0):
                labels = torch.tensor(labels or [i % len(self.class_names) for i in ids])
                images = torch.full((len(ids), 3, self.image_size, self.image_size), int(255 * self.level)).byte()
                return Sample(images, labels, records_of(ids, labels, self.class_names, seed))

    The settings are kept as its `method_settings`, which `dfkd.synthesis.run.identity_of` adds to the identity of a
    method of one's own. Around the method comes what the settings ask for: --keep-intermediates,
    --candidates, --filter-views.

    Raises UsageError: an unknown name, settings that it does not take, an object that is no synthesizer, or a method
    that cannot have around it what is asked for; what the factory raises itself comes through.
    """
    factory, settings = resolve(config.method, METHODS, "method")
    goes_by_one = config.guidance.adv_weight or settings.get("adv_weight") or factory in ADVERSARIAL
    own = None if config.candidates.takes_student and not goes_by_one else student
    given: dict[str, Any] = settings if own is None else {"student": own, **settings}
    with settings_of(f"method {config.method!r}"):
        inspect.signature(factory).bind(prior, teacher, config, **given)
    if isinstance(teacher, Committee):
        check_several(config)
    made: Any
    if isinstance(teacher, Committee) and config.guidance.teaching == "each" and factory is GuidedPipeline:
        made = EachTeacher(partial(_guided, prior), config, teacher, own)
    else:
        made = factory(prior, teacher, config, **given)
    if not isinstance(made, Synthesizer):
        lacking = [name for name in (*Synthesizer.__annotations__, "identity") if not hasattr(made, name)]
        what = f"method {config.method!r} makes a {type(made).__name__}, which is no synthesizer"
        raise UsageError(what, f"it lacks {', '.join(lacking) or '__call__'}", "see dfkd/synthesis/synthesizer.py")
    if settings:
        object.__setattr__(made, "method_settings", plain(settings))  # also of a frozen dataclass
    return _around(made, config, teacher, student)


def check_several(config: GenerateConfig) -> None:
    """Raise UsageError for what goes by one teacher, where there are several."""
    if not getattr(resolve(config.method, METHODS, "method")[0], "takes_clients", False):
        what, todo = f"method {config.method!r} with several --clients", "use guided, noise or folder, or"
        raise UsageError(what, "it goes by one teacher", f"{todo} give one --teacher-checkpoint")
    trials, words = config.guidance.step_trials, config.sampling.class_words
    for flag, given in (("--step-trials", trials), ("--class-words", words)):
        if given:
            why = "what it finds before the first image is of one teacher"
            raise UsageError(f"{flag} with several --clients", why, "leave it out, or find it with each teacher alone")


def _guided(prior: Any, config: GenerateConfig, teacher: Classifier, student: Classifier | None) -> Synthesizer:
    """Guided diffusion by one of several teachers."""
    made = GuidedPipeline(prior, teacher, config, student)
    return Intermediates(made, kept) if (kept := config.sampling.keep_intermediates) else made


def _around(made: Synthesizer, config: GenerateConfig, teacher: Classifier, student: Classifier | None) -> Synthesizer:
    """A method within what the settings ask for around it."""
    if (kept := config.sampling.keep_intermediates) and not isinstance(made, EachTeacher):
        made = Intermediates(made, kept)
    if config.candidates.count > 1 or config.filter.views:
        judge, rows = teacher.freeze(resolve_device(config.compute.device, own_rank())), config.batching.batch
        if config.candidates.count > 1:
            made = Candidates(made, config.candidates, judge, student, rows)
        if config.filter.views:
            made = Filter(made, config.filter, judge, config.guidance.view.flip, rows)
    return made
