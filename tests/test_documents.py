"""Every command and every piece of Python in README.md and docs/ is run, in the order in which a reader meets it.

A document's ```sh, ```python and ```toml blocks run in a folder of its own, beside a small teacher and a folder of
images; a block whose first line is a comment with a file's name is that file. Commands are shortened (fewer images,
steps and epochs), and run in this process. ```console blocks need what is not here (a GPU, a hub, an hour): their
commands are checked as far as their options.
"""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import dfkd
from dfkd.config import DistillCommand, GenerateCommand, RunCommand, TrainPriorCommand, TrainTeacherCommand
from dfkd.synthesis.prompts import labels_of

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CLASSES = ("zero", "one")
# What a command is shortened by, where its own words do not say otherwise; of three steps the demo guides the last.
SHORT = {
    "train-teacher": ["--steps", "2"],
    "train-prior": ["--steps", "2"],
    "train-decoder": ["--steps", "2", "--images", "16", "--sample-steps", "2"],
    "generate": ["--steps", "3", "--refine-steps", "1", "--guidance-repeats", "1"],
    "distill": ["--steps", "2"],
    "evaluate": ["--limit", "20"],
    "report": ["--judged", "20"],
}
LESS = {"--epochs": "1", "--autoencoder-steps": "2"}  # where its own words say so


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents take to be there: runs/demo/teacher and my-images/."""
    folder = tmp_path_factory.mktemp("world")
    config = dfkd.TeacherTrainConfig.preset("demo", steps=4)
    dfkd.train_teacher("digits-on-photos", config, folder / "runs/demo/teacher", architecture="resnet8_half")
    generator = torch.Generator().manual_seed(0)
    for number, label in enumerate(labels_of(torch.arange(40), range(len(CLASSES))).tolist()):
        place = folder / "my-images" / CLASSES[label] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place)
    return folder


def blocks(document: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """The words of every line; comments are left out."""
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def shortened(name: str, words: list[str]) -> list[str]:
    """The same command on less work."""
    given = {word for word in words if word.startswith("--")}
    own, more = list(words), []
    for flag, value in zip(SHORT.get(name, [])[::2], SHORT.get(name, [])[1::2], strict=True):
        if flag in given:
            own[own.index(flag) + 1] = value
        elif not (flag == "--steps" and "--epochs" in given):
            more += [flag, value]
    for flag in given & LESS.keys():
        own[own.index(flag) + 1] = LESS[flag]
    if name == "generate" and any("noise" in word or "blank" in word for word in words):
        more = []
    cut = own.index("--") if "--" in own else len(own)
    return own[:cut] + more + own[cut:]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of a shell block."""
    program, rest = words[0], words[1:]
    if program.startswith("dfkd-"):
        name = program.removeprefix("dfkd-")
        module = importlib.import_module("dfkd.cli." + name.replace("-", "_"))
        with pytest.raises(SystemExit) as done:
            module.main(shortened(name, rest))
        assert not done.value.code, words
    elif program == "rm":
        for file in rest:
            Path(file).unlink()
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file(), words  # its own test rehearses it
    else:
        assert program in ("make", "pip"), words
        check(words)


def check(words: list[str]) -> None:
    """A line that is not run: the options of our commands and the targets of make are known."""
    words = [word for word in words if "=" not in word or word.startswith("-")]
    if words[:1] == ["torchrun"]:
        words = words[words.index("--no-python") + 1 :]
    if words[0] == "make":
        known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(known), words
    elif words[0].startswith("dfkd-"):
        from dfkd.cli.parse import parse

        classes = {
            "dfkd-generate": GenerateCommand,
            "dfkd-distill": DistillCommand,
            "dfkd-train-teacher": TrainTeacherCommand,
            "dfkd-train-prior": TrainPriorCommand,
            "dfkd-run": RunCommand,
        }
        parse(classes[words[0]], words[1:], words[0])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_runs(document: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "build", tmp_path / "build", ignore=shutil.ignore_patterns("engines"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for language, text in blocks(document):
        if named := re.match(r"# (\S+\.(?:py|toml))\n", text):
            Path(named[1]).write_text(shorter_job(text) if language == "toml" else text, encoding="utf-8")
        elif language == "python":
            exec(compile(shorter_python(text), document, "exec"), {"__name__": "__main__"})
        elif language == "sh":
            for words in commands(text):
                run(words, monkeypatch)
        elif language == "console":
            for words in commands(text):
                check(words)


def shorter_python(text: str) -> str:
    """README's ten lines on less work; what the words say stays."""
    text = text.replace('GenerateConfig.preset("demo")', 'GenerateConfig.preset("demo", steps=3, refine_steps=1)')
    text = text.replace('preset("demo", steps=40)', 'preset("demo", steps=2)')
    return text.replace("teacher=teacher).accuracy", "teacher=teacher, limit=20).accuracy")


def shorter_job(text: str) -> str:
    """A run file on less work."""
    text = re.sub(r"epochs = \d+", "epochs = 1", text)
    text = re.sub(r"group = \d+", "group = 16\nshard-size = 16", text)  # as small as the phases of rounds become
    return re.sub(r"count = \d+", "count = 64\nsteps = 3", text)


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert ((ROOT / document).parent / target).exists(), (document, target)


def test_readme_fits_on_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
