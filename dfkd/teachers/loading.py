"""The teacher that settings describe."""

from collections.abc import Sequence

from dfkd.config import NORMALISATIONS, TeacherConfig
from dfkd.errors import UsageError
from dfkd.teachers.classifier import Classifier
from dfkd.teachers.committee import Committee
from dfkd.teachers.sources import own_names, read_source


def load_teacher(config: TeacherConfig, class_names: Sequence[str] = ()) -> Classifier:
    """The classifier that the settings describe, in evaluation mode, on the CPU.

    class_names: names for a source that states none, where `config.classes` is empty too (those of the images).
    Raises UsageError: nothing is given, what `Classifier.from_pretrained` raises, or --classes that a folder of dfkd
    contradicts: its order of logits is its own.
    """
    if config.clients:
        named = [config.client(text) for text in config.clients]
        classifiers = [Classifier.from_pretrained(source, resize=config.resize) for source, _ in named]
        return Committee.of(classifiers, [weight for _, weight in named])
    source = config.checkpoint or config.teacher
    if source is None:
        todo = "give --teacher-checkpoint FOLDER, --clients FOLDER FOLDER, or --teacher timm:NAME"
        raise UsageError("no teacher is given", "labels come from it", todo)
    own = own_names(config.checkpoint)
    if own is not None and config.classes and config.classes != own:
        raise UsageError(
            f"--classes names {len(config.classes)} classes: {', '.join(config.classes[:10])}",
            f"the teacher has {len(own)}: {', '.join(own[:10])}",
            "leave --classes out, or give the teacher's in its order",
        )
    mean, std = NORMALISATIONS[config.normalisation] if config.normalisation else (config.mean, config.std)
    fed = {"mean": mean, "std": std, "input_size": config.input_size, "resize": config.resize}
    given = {"class_names": config.classes or None, **fed}
    parts = read_source(source, config.teacher, given, class_names)
    return Classifier(**parts, source=str(source)).tried()
