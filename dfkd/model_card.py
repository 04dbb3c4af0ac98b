"""A model card: what a network is, what it was made from, how good it was found to be, and how to load it.

    facts = read_facts(Path("runs/mine/student/last"))        # of what the commands left beside it
    text = card(facts, load_folder("runs/mine/student/last"))

The card says what is on record, and "not stated" of what is not.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfkd.files import replace_text
from dfkd_engine import EMBEDDED

OURS = "<!-- Written by dfkd from what its run has on record. -->"
NOT_STATED = "not stated"
MOST_CLASSES = 20  # that are named
MANIFEST, RESULT, CONFIG, EVALUATION = "manifest.json", "result.json", "config.json", "evaluation.json"
# Settings of the images and of the training that the card shows, where they are on record.
IMAGES = (
    "method",
    "prompt",
    "sampler",
    "steps",
    "cfg",
    "guidance_step",
    "guidance_repeats",
    "bn_weight",
    "cls_weight",
    "refine_steps",
)
TRAINING = ("data", "epochs", "steps", "batch_size", "lr", "augment", "mix", "temperature", "seed")


@dataclass(frozen=True)
class Facts:
    """What a card says.

    network: of `Classifier.config`. teacher: of a student, name and digest; "" of a teacher.
    prior, licence: source and licence of the diffusion prior. images: how many, and settings by name. training:
    settings by name. tests: accuracy in 0..1 by who was tested. tested_on: with which images. agreement: with the
    teacher on held-out synthetic images.
    """

    network: Mapping[str, Any]
    teacher: str = ""
    prior: str = NOT_STATED
    licence: str = NOT_STATED
    images: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    tests: Mapping[str, float] = field(default_factory=dict)
    tested_on: str = ""
    agreement: float | None = None


def read_facts(folder: Path, network: Mapping[str, Any] | None = None) -> Facts:
    """The facts of a network in the folder of its run: OUT/last or OUT/best of a student, or a teacher's own.

    Its images are looked for in RUN/synthetic, and the tests of its controls in RUN/evaluation.json, where RUN holds
    OUT. network: what `Classifier.config` says; the folder's config.json where it is not given.
    """
    network = network or _read(folder / CONFIG)
    home = folder.parent if folder.name in ("last", "best") else folder
    result = _read(home / RESULT)
    if not isinstance(run := result.get("run"), dict):
        return Facts(network)
    training = {name: run[name] for name in TRAINING if run.get(name) is not None}
    training |= {"data": placeless(training["data"])} if "data" in training else {}
    if "teacher" not in run:
        accuracy = result.get("accuracy")
        found = {} if accuracy is None else {"this network": accuracy}
        tested = f"{result.get('test_images')} images of the test split of {training.get('data')}" if found else ""
        return Facts(network, training=training, tests=found, tested_on=tested)
    training.pop("data", None)  # a digest
    manifest = _read(home.parent / "synthetic" / MANIFEST)
    made, found = manifest.get("settings", {}), manifest.get("run", {})
    if "guidance_step" in found:  # by --step-trials
        made = {**made, "guidance_step": found["guidance_step"]}
    images = {name: made[name] for name in IMAGES if made.get(name) not in (None, "")}
    prior = str(found.get("prior") or NOT_STATED) if "prior_digests" in made else "none"
    tests, tested_on = _tests(result, _read(home.parent / EVALUATION), of_last=folder.name != "best")
    return Facts(
        network,
        teacher=str(run["teacher"]),
        prior=placeless(prior),
        licence=licence_of(prior),
        images={"count": manifest.get("count"), **images} if manifest else {},
        training=training,
        tests=tests,
        tested_on=tested_on,
        agreement=result.get("agreement" if folder.name != "best" else "best_agreement"),
    )


def licence_of(prior: str) -> str:
    """What a prior's README.md says at its top as `license`, else the first line of its LICENSE."""
    folder = EMBEDDED.get(prior) or Path(prior)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(prior, "model_index.json") if prior.count("/") == 1 else None
        if not isinstance(cached, str):
            return NOT_STATED
        folder = Path(cached).parent
    if (readme := folder / "README.md").is_file():
        top = re.match(r"---\n(.*?\n)---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        if top and (stated := re.search(r"^license: *[\"']?([\w.-]+)", top[1], re.MULTILINE)):
            return stated[1]
    for name in ("LICENSE", "LICENSE.md", "LICENSE.txt"):
        if (file := folder / name).is_file():
            return next((line.strip("# ") for line in file.read_text(encoding="utf-8").splitlines() if line), name)
    return NOT_STATED


def card(facts: Facts, load: str) -> str:
    """The card in Markdown, its top in YAML as the Hugging Face hub reads it. load: Python that loads the network."""
    network, student = facts.network, bool(facts.teacher)
    names = [str(name) for name in network.get("class_names", ())]
    side, name = network.get("input_size"), network.get("architecture") or "a network of its author's own"
    kind = "distilled from a teacher on synthetic images alone" if student else "trained on labelled images"
    channels = [", ".join(f"{value:.4g}" for value in network.get(key, ())) for key in ("mean", "std")]
    rows = {
        "classes": shown_names(names),
        "input": f"RGB, {side} x {side} pixels; mean {channels[0]}, std {channels[1]}",
    }
    if student:
        rows |= {"teacher": facts.teacher, "prior": f"{facts.prior}; licence: {facts.licence}"}
        rows |= {"images": listed(facts.images)}
    rows |= {"training": listed(facts.training)}
    title = f"{name}, {len(names)} classes"
    lines = [
        "---",
        _yaml(facts, title),
        "---",
        OURS,
        "",
        f"# {title}",
        "",
        f"An image classifier, {kind} with dfkd.",
        "",
    ]
    lines += [*table(rows), "", "## Accuracy", ""]
    if facts.tests:
        lines += [f"| | accuracy on {_cell(facts.tested_on)} |", "|---|---|"]
        lines += [f"| {_cell(who)} | {100 * share:.1f} % |" for who, share in facts.tests.items()]
    else:
        lines += ["Not measured on real images."]
    if facts.agreement is not None:
        share = f"{100 * facts.agreement:.1f} %"
        lines += ["", f"It answers as its teacher does on {share} of synthetic images that it did not learn from."]
    lines += ["", "## How to load it", "", load.rstrip(), "", "## Licence", ""]
    if student:
        lines += [f"Of this network: {NOT_STATED}. Of the prior that drew its images: {facts.licence}."]
    else:
        lines += [f"Of this network: {NOT_STATED}."]
    return "\n".join(lines) + "\n"


def write(file: Path, text: str) -> Path | None:
    """Put a card in place; a file of that name that is no card of ours stays, and None says so."""
    if file.exists() and OURS not in file.read_text(encoding="utf-8", errors="replace"):
        return None
    replace_text(file, text)
    return file


def write_beside(export: Path, facts: Facts, dtype: str) -> Path | None:
    """MODEL.md in the folder of an exported file, which keeps how others that are there are loaded; None as `write`."""
    file = export.parent / "MODEL.md"
    known = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    others = [block for block in re.findall(r"```python\n.*?\n```", known, re.DOTALL) if repr(export.name) not in block]
    load = load_file(export.name, int(facts.network["input_size"]), dtype)
    return write(file, card(facts, "\n\n".join([load, *others])))


def load_folder(folder: str, architecture: str) -> str:
    """Five lines that load a folder of `save_pretrained`, and answer a photo. architecture: "" where it has no name."""
    return _python(["import dfkd", "from PIL import Image", "", _loaded(repr(folder), architecture), *_ANSWER])


def load_hub(repo: str, architecture: str) -> str:
    """Lines that load a network from the Hugging Face hub, and answer a photo. architecture: "" without a name."""
    lines = ["import dfkd", "from huggingface_hub import snapshot_download", "from PIL import Image", ""]
    return _python([*lines, _loaded(f"snapshot_download({repo!r})", architecture), *_ANSWER])


def _loaded(folder: str, architecture: str) -> str:
    if architecture:
        return f"network = dfkd.load_student({folder})"
    return f'network = dfkd.Classifier.from_pretrained({folder}, architecture="file:YOUR.py:FUNCTION")'


_ANSWER = ['logits = network(Image.open("photo.png"))', "print(network.class_names[int(logits.argmax())])"]


def load_file(file: str, side: int, dtype: str) -> str:
    """Lines that run an exported file (.onnx or .pt2), which need no dfkd. dtype: of the images."""
    pixels = [f'pixels = np.asarray(Image.open("photo.png").convert("RGB").resize(({side}, {side})))']
    scaled = "" if dtype == "uint8" else ".astype(np.float32) / 255"
    pixels += [f"images = pixels.transpose(2, 0, 1)[None]{scaled}"]
    head = ["import json", "", "import numpy as np"]
    if file.endswith(".onnx"):
        lines = [
            *head,
            "import onnxruntime",
            "from PIL import Image",
            "",
            f"session = onnxruntime.InferenceSession({file!r})",
        ]
        lines += [*pixels, '(logits,) = session.run(None, {"images": images})']
        lines += ['names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])']
    else:
        lines = [*head, "import torch", "from PIL import Image", "", 'facts = {"dfkd.json": ""}']
        lines += [f"program = torch.export.load({file!r}, extra_files=facts).module()", *pixels]
        lines += ["logits = program(torch.tensor(images))"]
        lines += ['names = json.loads(json.loads(facts["dfkd.json"])["class_names"])']
    return _python([*lines, "print(names[int(logits[0].argmax())])"])


def _python(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _tests(result: Mapping[str, Any], evaluation: Mapping[str, Any], of_last: bool) -> tuple[dict[str, float], str]:
    """Accuracies by who was tested, and on which images: those of the whole run, else of dfkd-distill --test."""
    ours = evaluation.get("student", {})
    if of_last and ours.get("accuracy") is not None:
        tests = {"this network": ours["accuracy"], "its teacher": ours.get("teacher_accuracy")}
        for name, test in evaluation.get("baselines", {}).items():
            tests[f"control: the same student on images of `{name}`"] = test.get("accuracy")
        where = f"{evaluation.get('images')} images of {placeless(evaluation.get('data'))} ({evaluation.get('split')})"
        return {who: share for who, share in tests.items() if share is not None}, where
    accuracy = result.get("accuracy" if of_last else "best_accuracy")
    where = f"{result.get('test_images')} images of {placeless(result.get('test'))} ({result.get('test_split')})"
    return ({}, "") if accuracy is None else ({"this network": accuracy}, where)


def _yaml(facts: Facts, title: str) -> str:
    """No data sets are named: a student has seen none."""
    from huggingface_hub import EvalResult, ModelCardData

    tests = [
        EvalResult("image-classification", "private", facts.tested_on, "accuracy", facts.tests["this network"])
        for _ in facts.tests.keys() & {"this network"}
    ]
    tags = ["image-classification", *(["data-free", "knowledge-distillation"] if facts.teacher else [])]
    data = ModelCardData(
        license="unknown",
        library_name="dfkd",
        pipeline_tag="image-classification",
        tags=tags,
        metrics=["accuracy"],
        model_name=title,
        eval_results=tests or None,
    )
    return data.to_yaml()


def placeless(name: object) -> str:
    """A name of data or of a prior; where it is a path of this machine, its last two parts alone."""
    kind, colon, path = ("", "", str(name)) if str(name).startswith("/") else str(name).partition(":")
    return f"{kind}{colon}{'/'.join(Path(path).parts[-2:]) if path.startswith('/') else path}"


def shown_names(names: Sequence[str]) -> str:
    """The first names, and how many there are."""
    return ", ".join(names[:MOST_CLASSES]) + (f", ... ({len(names)})" if len(names) > MOST_CLASSES else "")


def table(rows: Mapping[str, object]) -> list[str]:
    """Lines of a table with a row for each entry."""
    return ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows.items())]


def listed(values: Mapping[str, Any]) -> str:
    """Settings in words, by name."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items()) or NOT_STATED


def _cell(value: object) -> str:
    """Text of one cell: a bar would end it, and a line break the table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none that can be read: a card is no reason to stop."""
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
