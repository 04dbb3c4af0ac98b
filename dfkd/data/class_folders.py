"""Class folders, ROOT/CLASS/IMAGE, as people have them.

Images may lie deeper (Tiny-ImageNet's CLASS/images/IMAGE). Hidden folders, those that begin with a dot, and __MACOSX
are no classes. Tiny-ImageNet's val/ has no class folders but val_annotations.txt. Folders named by WordNet numbers
(n01440764) are called by the package's words where they are those of ImageNet or Tiny-ImageNet, as teachers are; others
take theirs from words.txt or LOC_synset_mapping.txt, where it lies in ROOT or beside it.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dfkd.config.lists import names_in
from dfkd.data.image_files import Listing, some_names
from dfkd.errors import UsageError

SUFFIXES = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif"}
SUFFIXES |= {".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"}
ANNOTATIONS = "val_annotations.txt"
# Number of classes, the first and the last of them, sorted -> the package's list of their words.
KNOWN = {(1000, "n01440764", "n15075141"): "imagenet", (200, "n01443537", "n12267677"): "tiny-imagenet"}
WORDS = ("words.txt", "LOC_synset_mapping.txt")
NO_IMAGES = {".json", ".jsonl", ".txt", ".csv", ".md", ".db", ".ini", ""}  # beside images, and missed by nobody


def list_folder(root: Path, complete: bool = True) -> Listing:
    """Images root/<class>/<image>, classes in the order of root/classes.json if there is one, else sorted by name,
    numbers by value (10 after 9).

    classes.json: a list of names, or {name: label}. complete: refuse classes without an image. Raises UsageError,
    naming them; for folders that classes.json lacks, and where there is no image at all.
    """
    if not root.is_dir():
        raise UsageError(f"no folder {root}", todo="give a folder that holds one folder of images per class")
    if (root / ANNOTATIONS).is_file():
        return _annotated(root)
    folders = class_folders(root)
    ordered = root / "classes.json"
    names = list(read_names(ordered).values()) if ordered.exists() else sorted(folders, key=_natural)
    if unknown := sorted(set(folders) - set(names)):
        why = f"but there are folders {', '.join(unknown)}"
        raise UsageError(f"{ordered} names {', '.join(names)}", why, "make them agree")
    images: list[Path] = []
    labels: list[int] = []
    others: Counter[str] = Counter(f"{file.suffix.lower()} beside the class folders" for file in _loose(root))
    lacking = []
    for label, name in enumerate(names):
        files = list(_files(root / name)) if name in folders else []
        found = [file for file in files if file.suffix.lower() in SUFFIXES]
        unread = Counter(file.suffix.lower() for file in files) - Counter(file.suffix.lower() for file in found)
        others += Counter({suffix: count for suffix, count in unread.items() if suffix not in NO_IMAGES})
        images += found
        labels += [label] * len(found)
        if not found:
            lacking.append(name + (f" (but {_counts(unread)})" if unread else ""))
    if not images:
        beside = f"; there are {_counts(others)}" if others else ""
        wanted = f"wanted are {root}/CLASS/IMAGE.png (or {' '.join(sorted(SUFFIXES))}){beside}"
        raise UsageError(f"no image in {root}", wanted)
    if complete and lacking:
        why = "every folder in it is a class"
        raise UsageError(f"{root} has no image of {some_names(lacking)}", why, "add images, or move those folders out")
    return Listing(images, labels, words_of(root, names), place=str(root), passed_over=others)


def images_below(root: Path) -> list[Path]:
    """Every image file below a folder, however deep, sorted. Raises UsageError where there is none."""
    found = [file for file in _files(root) if file.suffix.lower() in SUFFIXES]
    if not found:
        raise UsageError(f"no image in {root}", f"wanted are files {' '.join(sorted(SUFFIXES))}", "correct the path")
    return found


def class_folders(root: Path) -> list[str]:
    """Names of the folders in root that stand for classes."""
    return [entry.name for entry in root.iterdir() if entry.is_dir() and not _hidden(entry.name)]


def words_of(root: Path, names: Sequence[str]) -> tuple[str, ...]:
    """The classes' names: words for WordNet numbers where they are known, else the folders' own.

    Of several words in a file the first; where two classes share it (ImageNet's two cranes), the number stands behind.
    """
    if not names or not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return tuple(names)
    if known := KNOWN.get((len(names), names[0], names[-1])):
        return names_in(known)
    file = next((place / name for place in (root, root.parent) for name in WORDS if (place / name).is_file()), None)
    if file is None:
        return tuple(names)
    lines = (line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines())
    words = {line[0]: line[1].split(",")[0].strip() for line in lines if len(line) == 2}
    times = Counter(words.get(name, name) for name in names)
    found = (words.get(name, name) for name in names)
    return tuple(word if times[word] == 1 else f"{word} ({name})" for word, name in zip(found, names, strict=True))


def read_names(file: Path) -> dict[int, str]:
    """Class names by label, in the order of the labels, from a JSON list or {name: label}.

    Raises UsageError for a file of something else, and for two names of one label.
    """
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
        pairs = listed.items() if isinstance(listed, dict) else ((name, label) for label, name in enumerate(listed))
        names = {int(label): str(name) for name, label in pairs}
    except (ValueError, TypeError) as error:
        raise UsageError(f"{file} cannot be read", str(error), "wanted is a list of class names") from None
    if len(names) < len(listed):
        raise UsageError(f"{file} gives several names one label", todo="number them apart")
    return dict(sorted(names.items()))


def natural_order(names: set[str]) -> list[str]:
    """Sorted by name, numbers by value (10 after 9)."""
    return sorted(names, key=_natural)


def _annotated(root: Path) -> Listing:
    """Tiny-ImageNet's val/: images/ and, in val_annotations.txt, lines of file name, class and box."""
    rows = [line.split("\t") for line in (root / ANNOTATIONS).read_text(encoding="utf-8").splitlines() if line.strip()]
    if bad := [row for row in rows if len(row) < 2]:
        raise UsageError(f"{root / ANNOTATIONS}: '{bad[0][0]}'", "a line is file, class and box, with tabs between")
    names = natural_order({row[1] for row in rows})
    images = [root / "images" / row[0] for row in rows]
    labels = [names.index(row[1]) for row in rows]
    return Listing(images, labels, words_of(root, names), place=str(root))


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder that is not hidden, sorted."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        yield from (Path(place, name) for name in sorted(files) if not _hidden(name))


def _loose(root: Path) -> list[Path]:
    return [
        file for file in root.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file() and not _hidden(file.name)
    ]


def _counts(found: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in sorted(found.items()))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _natural(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)
