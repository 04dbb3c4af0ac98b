"""Text files of lines `path label`, as DomainNet's, and what the numbers of labels are called."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dfkd.data.image_files import Listing, Source
from dfkd.errors import UsageError

MOST = 1_000_000  # classes; a larger label is no class number


def list_file(file: Path) -> Listing:
    """Lines `path label`, paths relative to the file's folder.

    Classes are named after the folders of their images where each has one for itself, else by number. Numbers that no
    line has are no classes (Listing.compact). Raises UsageError for a line that is none.
    """
    if not file.is_file():
        raise UsageError(f"no list file {file}", todo="give a text file of lines `path label`")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is no list of images", str(error), "give a text file of lines `path label`") from None
    images: list[Path] = []
    labels: list[int] = []
    folders: dict[int, set[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, _, label = line.strip().replace("\t", " ").rpartition(" ")
        if path and label.removeprefix("-").isdecimal():
            images.append(file.parent / path.strip())
            labels.append(int(label))
            folders.setdefault(int(label), set()).add(Path(path).parent.name)
        else:
            raise UsageError(f"{file}, line {number}: '{line}'", "a line is `path label`, the label a number from 0")
    own = {label: next(iter(names)) for label, names in folders.items() if len(names) == 1}
    apart = len(own) == len(folders) == len(set(own.values())) and "" not in own.values()
    return numbered(images, labels, own if apart else {}, str(file))


def numbered(images: Sequence[Source], labels: Sequence[int], names: Mapping[int, str], place: str) -> Listing:
    """A listing of labels that are numbers. names: of the numbers; where none are known, numbers are names.

    Raises UsageError for hidden labels (-1), labels beyond the names, and numbers that no classes have.
    """
    low, high = min(labels, default=0), max(labels, default=-1)
    if low < 0:
        count = sum(label < 0 for label in labels)
        what = f"{place}: {count} of {len(labels)} labels are {low}"
        raise UsageError(
            what, "labels below 0 are hidden ones, as of a test split without answers", "give another split"
        )
    if names and high > (most := max(names)):
        raise UsageError(f"{place} has the label {high}", f"it names {len(names)} classes, 0 to {most}", "correct it")
    if high > MOST:
        raise UsageError(
            f"{place} has the label {high}", "classes are numbered from 0 without large gaps", "correct it"
        )
    if names:
        return Listing(images, labels, tuple(names.get(label, "") for label in range(max(names) + 1)), place=place)
    used = set(labels)
    spoken = tuple(str(label) if label in used else "" for label in range(high + 1))
    return Listing(images, labels, spoken, numbered=True, place=place)
