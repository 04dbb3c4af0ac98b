"""Which engines a run needs, and that whatever changes one changes its recipe, and no other's."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from dfkd.config import STORED_BACKENDS
from dfkd.compiled import digests, requests
from dfkd.compiled.digests import FileDigests
from dfkd.compiled.requests import needed, rows_per_call
from dfkd.errors import UsageError
from dfkd_engine.spec import cpu_architecture, differing
from tests.compiled.small_engines import TEACHER, nudge, options_of, recipes
from tests.test_layering import MODULES, reachable

ROOT = Path(__file__).resolve().parents[2]
SPLIT = ("unet", "decode", "image_moments", "image_gradient", "decode_vjp")


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", ("unet", "decode", "gradient")),
        ("--micro-batch 2", SPLIT),  # of a group of 6
        ("--batch 2 --micro-batch 2", SPLIT),
        ("--batch 2", ("unet", "decode", "gradient")),
        ("--group 20 --batch 2", ("unet", "decode", "gradient")),  # the group's gradient is one call
        ("--group 20 --batch 2 --gradient latent --micro-batch 16", SPLIT),
        ("--batch 6", ("unet", "decode", "gradient")),
        ("--batch 512", ("unet", "decode", "gradient")),
        ("--micro-batch 2 --bn-stats image", ("unet", "decode", "gradient")),
        ("--micro-batch 2 --bn-weight 0", ("unet", "decode", "gradient")),
        ("--refine-steps 3", ("unet", "decode", "gradient", "pixel_gradient")),
        ("--refine-steps 3 --micro-batch 2", SPLIT),  # images are cut as latents are
        ("--adv-weight 1 --student-checkpoint s", ("unet", "decode", "decode_vjp")),
        ("--adv-weight 1 --student-checkpoint s --micro-batch 2", ("unet", "decode", "image_moments", "decode_vjp")),
        ("--guidance-step 0", ("unet", "decode")),
        ("--guidance-step 0 --refine-steps 3", ("unet", "decode")),
        ("--bn-weight 0 --cls-weight 0", ("unet", "decode")),
        ("--gradient unet", ()),
        ("--gradient unet --guidance-step 0", ("unet", "decode")),
    ],
)
def test_networks_of_a_run(prior, teacher, flags, expected):
    assert needed(options_of(prior, teacher, *flags.split())) == expected


@pytest.mark.parametrize(
    "flags, rows",
    [
        ("", 40),
        ("--batch 512", 40),
        ("--batch 40", 40),
        ("--batch 39", 32),
        ("--batch 24", 16),  # rows of other numbers, and fewer, are computed otherwise in the last bits
        ("--batch 4", 16),
        ("--micro-batch 3 --batch 4", 3),
        ("--micro-batch 30 --batch 24", 16),
    ],
)
def test_one_engine_for_any_batch(prior, teacher, tmp_path, flags, rows):
    options = options_of(prior, teacher, "--group", 40, *flags.split())
    whole = recipes(options_of(prior, teacher, "--group", 40, "--batch", 40), "inductor", tmp_path)
    assert rows_per_call(options) == rows
    found = recipes(options, "inductor", tmp_path)
    assert found["decode"].batch == (1, 40, 40) and found["decode"].timed == rows
    assert "gradient" not in found or found["gradient"].timed == 40
    # with and without the prompt, side by side
    assert found["unet"].batch == (1, 80, 80) and found["unet"].timed == 2 * rows
    assert all(found[name].recipe == whole[name].recipe for name in ("unet", "decode"))
    plain = recipes(options_of(prior, teacher, "--group", 40, *flags.split(), "--cfg", 1), "inductor", tmp_path)
    assert plain["unet"].batch == (1, 40, 40) and plain["unet"].timed == rows


EVERYTHING = {"unet", "decode", "gradient", "pixel_gradient"}
OF_TEACHER = {"gradient", "pixel_gradient"}
LOSSES = ("losses.cls", "losses.bn", "losses.bn_stats", "losses.bn_loss")


def nudged(part):
    return lambda prior, teacher, monkeypatch: nudge(next((prior / part).glob("*.safetensors")))


def teacher_nudged(prior, teacher, monkeypatch):
    nudge(teacher / "model.safetensors")


def teacher_fact(name, value):
    def change(prior, teacher, monkeypatch):
        file = teacher / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))

    return change


def scaled_latents(prior, teacher, monkeypatch):
    file = prior / "vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.5}))


def of_version(package, number):
    def change(prior, teacher, monkeypatch):
        real = metadata.version
        for module in (requests, sys.modules["dfkd_engine.backends.packages"]):
            monkeypatch.setattr(module, "version", lambda name: number if name == package else real(name))

    return change


def other_source(file):
    """One more statement in a module of the project."""

    def change(prior, teacher, monkeypatch):
        copy = prior.parent / "project"
        shutil.copytree(ROOT, copy, ignore=lambda path, names: set(names) - SOURCES if Path(path) == ROOT else set())
        with (copy / file).open("a") as text:
            text.write("\nMORE = 1\n")
        monkeypatch.setattr(digests, "PROJECT", copy)

    return change


SOURCES = {"engine", "dfkd"}


def flags(*words):
    return words


def of_each(networks, fields):
    return dict.fromkeys(networks, fields)


BASE = ("--refine-steps", 2)


@pytest.fixture(scope="module")
def before(prior, teacher, tmp_path_factory):
    return recipes(options_of(prior, teacher, *BASE), "onnxruntime", tmp_path_factory.mktemp("digests"))


@pytest.mark.parametrize(
    "change, fields",
    [
        (nudged("unet"), {"unet": {"prior.unet"}}),
        (nudged("vae"), {"decode": {"prior.vae"}, "gradient": {"prior.vae"}}),
        (nudged("text_encoder"), {}),  # its embeddings are an engine's input
        (scaled_latents, {"unet": {"prior.shapes"}, "decode": {"prior.vae", "prior.shapes"},
                          "gradient": {"prior.vae", "prior.shapes"}, "pixel_gradient": {"prior.shapes"}}),
        (teacher_nudged, of_each(OF_TEACHER, {"teacher.weights"})),
        (teacher_fact("mean", [0.5, 0.5, 0.5]), of_each(OF_TEACHER, {"teacher.mean"})),
        (teacher_fact("input_size", 9), of_each(OF_TEACHER, {"teacher.input_size"})),
        (teacher_fact("accuracy", 0.5), {}),
        (flags("--size", 16), of_each(EVERYTHING, {"size"})),
        (flags("--dtype", "bf16"), of_each(EVERYTHING, {"dtype"})),
        (flags("--bn-weight", 0.3), of_each(OF_TEACHER, {"losses.bn"})),
        (flags("--cls-weight", 0.3), of_each(OF_TEACHER, {"losses.cls"})),
        (flags("--bn-loss", "relative"), of_each(OF_TEACHER, {"losses.bn_loss"})),
        (flags("--bn-stats", "image"), of_each(OF_TEACHER, {"losses.bn_stats"})),
        (flags("--normalisation", "cifar10"), of_each(OF_TEACHER, {"teacher.normalisation"})),
        (flags("--cfg", 1), {"unet": {"batch"}}),
        (flags("--group", 8), of_each(EVERYTHING, {"batch"})),
        (flags("--steps", 7, "--seed", 3, "--cfg", 5, "--guidance-step", 0.4, "--sampler", "ddpm", "--prompt", "an a"), {}),  # noqa: E501
        (of_version("torch", "9.9"), of_each(EVERYTHING, {"versions.torch"})),
        (of_version("diffusers", "9.9"), of_each(EVERYTHING, {"versions.diffusers"})),
        (of_version("onnxscript", "9.9"), of_each(EVERYTHING, {"versions.onnxscript"})),
        (of_version("numpy", "9.9"), {}),
        (other_source("engine/dfkd_engine/decompositions/norms.py"), of_each(EVERYTHING, {"sources"})),
        (other_source("engine/dfkd_engine/backends/onnxruntime.py"), of_each(EVERYTHING, {"sources"})),
        (other_source("engine/dfkd_engine/backends/inductor.py"), {}),
        (other_source("dfkd/synthesis/statistics.py"), of_each(OF_TEACHER, {"sources"})),
        (other_source("dfkd/cli/generate.py"), {}),
    ],
)  # fmt: skip
def test_one_change_concerns_exactly_its_engines(before, prior, teacher, copied, tmp_path, monkeypatch, change, fields):
    assert before.keys() == EVERYTHING
    more = change if isinstance(change, tuple) else ()
    if not more:
        prior, teacher = copied(prior), copied(teacher)
        change(prior, teacher, monkeypatch)
    after = recipes(options_of(prior, teacher, *BASE, *more), "onnxruntime", tmp_path)
    found = {
        network: {field for field, _, _ in differing(before[network].recipe, after[network].recipe)}
        for network in EVERYTHING
    }
    assert {network: names for network, names in found.items() if names} == fields


def test_every_module_that_writes_a_graph_counts():
    """An engine of the old program must not pass for one of the new."""
    listed = {file for place in (*requests._GRAPH, *requests._LOSSES) for file in python_files(ROOT / place)}
    assert all((ROOT / place).exists() for place in (*requests._GRAPH, *requests._LOSSES))
    needed = {MODULES[name] for start in ("dfkd_engine.graph", "engine.export") for name in reachable(start)}
    # what an error says, and the vocabulary of specs, which is in the engine's key itself
    plain = {"__init__.py", "errors.py", "spec.py"}
    assert not {file for file in needed - listed if not (file.parent.name == "engine" and file.name in plain)}


def python_files(place):
    return set(place.rglob("*.py")) if place.is_dir() else {place}


def test_backends_have_recipes_of_their_own(prior, teacher, tmp_path):
    options = options_of(prior, teacher)
    one, other = (recipes(options, name, tmp_path)["decode"] for name in ("inductor", "torch-tensorrt"))
    fields = {field for field, _, _ in differing(one.recipe, other.recipe)}
    assert {"backend", "sources"} <= fields and any(field.startswith("flags.") for field in fields)
    assert all(isinstance(value, str) for value in one.recipe.values())


def test_a_teachers_own_file_counts(prior, teacher, copied, tmp_path):
    source = Path(TEACHER.split(":")[1])
    mine = shutil.copy(source, tmp_path / "network.py")
    teacher = copied(teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"architecture": f"file:{mine}:teacher_network"}))
    before = recipes(options_of(prior, teacher), "inductor", tmp_path)["gradient"].recipe
    Path(mine).write_text(source.read_text() + "\n# other\n")
    after = recipes(options_of(prior, teacher), "inductor", tmp_path)["gradient"].recipe
    assert [field for field, _, _ in differing(before, after)] == ["teacher.file"]


def test_no_torch_is_needed(prior, teacher, tmp_path):
    script = f"""
import sys
from pathlib import Path
from dfkd.cli.generate_options import GenerateOptions
from dfkd.cli.options import parse
from dfkd.compiled.digests import FileDigests
from dfkd.compiled.requests import architecture_of, requests
from dfkd_engine.store import EngineStore
options = parse(GenerateOptions, {["--out", ".", "--prior", str(prior), "--teacher-checkpoint", str(teacher)]!r}, "x", {{}})
for backend in {STORED_BACKENDS!r}:
    found = requests(options, backend, architecture_of("cpu"), FileDigests(Path({str(tmp_path)!r}) / "digests"))
    store = EngineStore(Path({str(tmp_path)!r}))
    print(len(found), *(store.find(one.recipe) for one in found), *(store.explain(one.recipe)[0][0] for one in found))
print(*sorted({{"torch", "diffusers", "transformers", "onnx", "onnxruntime", "torch_tensorrt", "numpy"}} & {{*sys.modules}}))
"""  # noqa: E501
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    line = "3 None None None network network network"
    assert done.stdout.splitlines() == [*[line] * len(STORED_BACKENDS), ""]


@pytest.mark.parametrize(
    "words, message",
    [
        (("--prior", "no/such/folder"), "no such folder"),
        (("--teacher-checkpoint", "no-such-folder"), "cannot read the teacher's no-such-folder"),
    ],
)
def test_files_that_are_not_there(prior, teacher, tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        recipes(options_of(prior, teacher, *words), "inductor", tmp_path)


def test_a_teacher_is_asked_for_only_where_one_is_held(prior, tmp_path):
    with pytest.raises(UsageError, match=r"no teacher: .* give --teacher-checkpoint"):
        recipes(options_of(prior, None), "inductor", tmp_path)
    memory = FileDigests(tmp_path / "digests")
    options = options_of(prior, None)
    assert requests.request(options, "unet", "inductor", cpu_architecture(), memory).network == "unet"


def test_an_unreadable_teacher_folder_is_named(prior, teacher, copied, tmp_path):
    teacher = copied(teacher)
    (teacher / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"cannot read .*config\.json"):
        recipes(options_of(prior, teacher), "inductor", tmp_path)


class TestDigests:
    def test_a_file_is_read_once(self, tmp_path, monkeypatch):
        file = tmp_path / "weights"
        file.write_bytes(b"one")
        memory = FileDigests(tmp_path / "memory")
        first = memory.of(file)
        memory.save()
        again = FileDigests(tmp_path / "memory")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda *_, **__: pytest.fail("it was read again"))
            assert again.of(file) == first
        file.write_bytes(b"two, longer")
        assert FileDigests(tmp_path / "memory").of(file) != first

    def test_same_size_at_another_time_is_read_again(self, tmp_path):
        file = tmp_path / "weights"
        file.write_bytes(b"one")
        memory = FileDigests(tmp_path / "memory")
        first = memory.of(file)
        file.write_bytes(b"two")
        os.utime(file, ns=(1, 1))
        assert memory.of(file) != first

    @pytest.mark.parametrize("content", ["", "[1]", "{", '{"x": 3}', "null"])
    def test_a_damaged_memory_is_no_harm(self, tmp_path, content):
        file = tmp_path / "weights"
        file.write_bytes(b"one")
        (tmp_path / "memory").write_text(content)
        memory = FileDigests(tmp_path / "memory")
        assert memory.of(file) == FileDigests(tmp_path / "nowhere").of(file)
        memory.save()
        assert json.loads((tmp_path / "memory").read_text())

    def test_comments_and_docstrings_do_not_count(self, tmp_path, monkeypatch):
        monkeypatch.setattr(digests, "PROJECT", tmp_path)
        module = tmp_path / "module.py"
        module.write_text('"""One."""\n\n\ndef f(x):\n    """Doc."""\n    return x + 1\n')
        before = digests.of_sources("module.py")
        module.write_text('"""Two."""\ndef f(x):\n    # why\n    return (x + 1)\n')
        assert digests.of_sources("module.py") == before
        module.write_text('"""Two."""\ndef f(x):\n    return x + 2\n')
        assert digests.of_sources("module.py") != before
