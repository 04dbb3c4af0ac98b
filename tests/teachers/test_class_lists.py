"""Names from files: what `@FILE` and the lists of the package give, and what is no list of names."""

import json

import pytest

from dfkd.config import GenerateCommand, TeacherConfig
from dfkd.config.lists import LISTS, names_in
from dfkd.errors import SettingError

WANTED = ("tench, Tinca tinca", "cat", "The Mona Lisa")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.txt", "tench, Tinca tinca\n\n  cat\r\nThe Mona Lisa"),
        ("names", "\ufefftench, Tinca tinca\ncat\nThe Mona Lisa\n"),
        ("names.json", json.dumps(WANTED)),
        ("names.JSON", json.dumps({"cat": 1, "The Mona Lisa": 2, "tench, Tinca tinca": 0})),
        ("names.json", json.dumps({"2": "The Mona Lisa", "0": "tench, Tinca tinca", "1": "cat"})),
        ("names.toml", 'classes = ["tench, Tinca tinca", "cat", "The Mona Lisa"]'),
    ],
)
def test_every_layout_gives_the_names_in_their_order(tmp_path, file, text):
    (tmp_path / file).write_text(text, encoding="utf-8")
    config = TeacherConfig.of(classes=f"@{tmp_path / file}")
    assert config.classes == WANTED
    assert TeacherConfig.of(**config.flat()) == config  # as settings.json takes them back
    assert GenerateCommand.of(out="x", only=f"@{tmp_path / file}").generate.sampling.only == WANTED


def test_the_lists_of_the_package():
    counts = {"cifar10": 10, "cifar100": 100, "domainnet": 345, "imagenet": 1000, "tiny-imagenet": 200}
    found = {path.stem: names_in(path.stem) for path in LISTS.glob("*.txt")}
    assert {name: len(names) for name, names in found.items()} == counts
    assert all(len(set(names)) == len(names) for names in found.values())
    places = {
        ("cifar10", 3): "cat",
        ("cifar100", 99): "worm",
        ("imagenet", 0): "tench",
        ("imagenet", 134): "crane bird",
        ("imagenet", 999): "toilet tissue",
        ("tiny-imagenet", 0): "goldfish",
        ("domainnet", 66): "cello",
        ("domainnet", 344): "zigzag",
    }
    assert {place: found[place[0]][place[1]] for place in places} == places


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("a.txt", "\n", "holds no name"),
        ("a.json", "{", "no list of names"),
        ("a.json", '{"cat": 1, "dog": 2}', "numbered 0 to 1"),
        ("a.json", '{"cat": "x", "dog": 2}', "no list of names"),
        ("a.json", "[1, 2]", "list of text"),
        ("a.toml", "a = 1", "0 lists"),
    ],
)
def test_no_list_of_names(tmp_path, file, text, words):
    (tmp_path / file).write_text(text)
    with pytest.raises(SettingError, match=words):
        TeacherConfig.of(classes=f"@{tmp_path / file}")


def test_an_absent_file_names_the_lists_that_need_none():
    with pytest.raises(SettingError, match=r"cannot read cifar11.*cifar10, cifar100, domainnet"):
        TeacherConfig.of(classes="@cifar11")
