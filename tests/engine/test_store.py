"""The store: an engine is built once, found by its spec, explained, verified and pruned; damage and disks are borne."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dfkd_engine.files
from dfkd_engine.errors import EngineError
from dfkd_engine.store import EngineStore, Manifest
from tests.engine.small_store import FILES, OTHER, SPEC, make, never

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


@pytest.fixture
def built(store: EngineStore) -> Manifest:
    return store.build(SPEC, make)


def test_an_empty_store_is_read_without_being_made(store: EngineStore) -> None:
    assert store.find(SPEC) is None and store.get(SPEC.key()) is None
    assert store.problem(SPEC.key()) == "it is missing"
    assert (store.list(), store.verify(), store.prune(set())) == ((), [], 0)
    assert store.explain(SPEC) == [("network", "(absent)", "decode")]
    assert not store.root.exists()


def test_built_once_then_found(store: EngineStore, built: Manifest) -> None:
    assert built.facts == {"parity": {"relative": 1e-6}, "seconds": 0.5}
    assert built.bytes == sum(map(len, FILES.values()))
    assert store.build(SPEC, never) == built
    again = EngineStore(store.root)
    assert again.find(SPEC) == again.get(SPEC.key()) == built
    assert again.list() == (built,) and again.explain(SPEC) == []
    assert again.verify() == [(SPEC.key(), "decode", None)]
    folder = again.payload(built)
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")} == FILES
    assert sorted(path.name for path in store.root.iterdir()) == sorted([SPEC.key(), "locks", "partial"])
    assert not list((store.root / "partial").iterdir()) and not list((store.root / "locks").iterdir())
    with pytest.raises(EngineError, match="no engine's key"):
        store.get("../elsewhere")


def test_explain_is_the_difference_to_the_nearest_engine_of_the_network(store: EngineStore, built: Manifest) -> None:
    store.build(replace(OTHER, device="cpu x86_64 avx512"), make)
    store.build(replace(SPEC, network="unet", sources="s2"), make)
    assert store.explain(replace(SPEC, sources="s1", flags={})) == [
        ("flags.freezing", "1", "(absent)"),
        ("sources", "s0", "s1"),
    ]
    assert store.explain(replace(OTHER, device="cuda sm_90")) == [("device", "cpu x86_64 avx512", "cuda sm_90")]


def test_engines_that_differ_only_in_the_device(store: EngineStore) -> None:
    here = "cuda sm_89 NVIDIA L4"
    ahead = store.build(replace(SPEC, device="cuda sm_89+sm_120"), make)
    store.build(replace(SPEC, device="cuda sm_75", sources="s1"), make)
    damaged = store.build(replace(SPEC, device="cuda sm_90"), make)
    (store.root / damaged.key / "payload" / "model.pt2").unlink()
    store.build(replace(SPEC, device=here), make)
    assert store.differing_only(replace(SPEC, device=here), "device") == (ahead,)


def test_prune(store: EngineStore, built: Manifest) -> None:
    gone = store.build(OTHER, make)
    leftover = store.root / "partial" / f"{gone.key}.0123" / "payload"
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(bytes(1000))
    assert store.prune({built.key}, older_than=timedelta(hours=1)) == 1000
    assert {manifest.key for manifest in store.list()} == {built.key, gone.key}
    assert store.prune({built.key}) > gone.bytes
    assert store.list() == (built,) and store.prune({built.key}) == 0


def test_every_file_is_hashed_before_the_first_load_only(store, built, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    hashed: list[str] = []
    real = dfkd_engine.files.sha256
    monkeypatch.setattr(dfkd_engine.files, "sha256", lambda path: hashed.append(path.name) or real(path))
    for _ in range(3):
        store.payload(built)
    assert sorted(hashed) == ["model.pt2", "weights.bin"]
    (store.root / built.key / "payload" / "model.pt2").touch()  # the same bytes, but who knows
    store.payload(built)
    assert hashed[2:] == ["model.pt2"]


def _linked(folder: Path) -> Mapping[str, Any]:
    (folder / "model").symlink_to(sys.executable)
    return {}


def _not_json(folder: Path) -> Mapping[str, Any]:
    return {**make(folder), "parity": float("nan")}


def _no_compiler(folder: Path) -> Mapping[str, Any]:
    make(folder)
    raise FileNotFoundError(2, "No such file or directory", "g++")


@pytest.mark.parametrize(
    "wrong, word",
    [(lambda folder: {}, "no file"), (_linked, "is a link"), (_not_json, "JSON"), (_no_compiler, r"g\+\+")],
)
def test_a_builder_that_fails_leaves_nothing(store: EngineStore, wrong: Any, word: str) -> None:
    with pytest.raises((EngineError, FileNotFoundError), match=word):
        store.build(SPEC, wrong)
    assert [path for path in store.root.rglob("*") if path.name not in ("partial", "locks")] == []


# --- damage ---------------------------------------------------------------------------------------------------------
def _replace_by_link(folder: Path) -> None:
    (folder / "payload" / "model.pt2").rename(folder.parent / "away")
    (folder / "payload" / "model.pt2").symlink_to(folder.parent / "away")


def _link_away(path: Path) -> None:
    path.rename(path.parent.parent / "away")
    path.symlink_to(path.parent.parent / "away")


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: os.truncate(f / "payload" / "model.pt2", 7), "model.pt2 has 7 bytes, on record are 4000"),
    "altered": (lambda f: (f / "payload" / "model.pt2").write_bytes(b"c" * 4000), "model.pt2 was altered"),
    "missing": (lambda f: (f / "payload" / "data" / "weights.bin").unlink(), "data/weights.bin is missing"),
    "extra": (lambda f: (f / "payload" / "more.so").touch(), "more.so does not belong"),
    "a link": (_replace_by_link, "model.pt2 is a link"),
    "a pipe": (lambda f: os.mkfifo(f / "payload" / "pipe"), "pipe is no plain file"),
    "payload a link": (lambda f: _link_away(f / "payload"), "payload is a link"),
    "an engine that is a link": (_link_away, "is a link"),
    "no payload": (lambda f: shutil.rmtree(f / "payload"), "payload is no folder"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is not JSON"),
    "no object": (lambda f: (f / "manifest.json").write_text("[]"), "holds no manifest"),
    "version": (lambda f: _edit(f, version=1), "version 1, this program reads 2"),
    "edited": (lambda f: _edit(f, facts={"relative": 0}), "manifest.json was altered"),
    "another's manifest": (
        lambda f: shutil.copy(f.parent / OTHER.key() / "manifest.json", f / "manifest.json"),
        f"is that of {OTHER.key()}",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_never_loaded_and_mended(store: EngineStore, built: Manifest, name: str) -> None:
    other = store.build(OTHER, make)
    store.payload(built)  # verified once already: damage that comes later counts too
    damage, word = DAMAGES[name]
    damage(store.root / built.key)

    with pytest.raises(EngineError) as caught:
        store.payload(built)
    assert word in str(caught.value) and "damaged" in caught.value.what and "dfkd-engines build" in caught.value.todo
    problems = {verdict.key: verdict.problem for verdict in store.verify()}
    assert word in (problems[built.key] or "") and problems[other.key] is None
    ((field, there, _),) = store.explain(SPEC)
    assert field == "engine" and word in there

    with pytest.raises(AssertionError):
        store.build(SPEC, never)
    assert word in (store.problem(built.key) or "")  # the damaged one stays until its successor is whole

    mended = store.build(SPEC, make)
    assert mended.files == built.files
    assert [verdict.problem for verdict in store.verify()] == [None, None]
    assert store.find(SPEC) == mended and store.payload(mended).is_dir()
    assert not list((store.root / "partial").iterdir())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineStore, Manifest]]:
    store = EngineStore(tmp_path_factory.mktemp("shared"))
    yield store, store.build(SPEC, make)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["manifest.json", *(f"payload/{name}" for name in FILES)]),
    st.integers(0, 10**6),
    st.sampled_from(["flip", "cut", "insert"]),
    st.integers(1, 255),
)
def test_no_changed_byte_passes(
    shared: tuple[EngineStore, Manifest], name: str, position: int, change: str, byte: int
) -> None:
    store, built = shared
    path = store.root / built.key / name
    whole = path.read_bytes()
    at = position % len(whole)
    changed = {
        "flip": whole[:at] + bytes([whole[at] ^ byte]) + whole[at + 1 :],
        "cut": whole[:at],
        "insert": whole[:at] + bytes([byte]) + whole[at:],
    }[change]
    try:
        path.write_bytes(changed)
        if store.problem(built.key) is None:  # white space between JSON values says nothing
            assert name == "manifest.json" and store.get(built.key) == built
    finally:
        path.write_bytes(whole)


# --- rival and killed builders --------------------------------------------------------------------------------------
RIVAL = """
import sys, time
from pathlib import Path
from dfkd_engine.store import EngineStore
from tests.engine.small_store import SPEC, make

folder = Path(sys.argv[1])


def say(line):
    print(line, file=sys.stderr, flush=True)
    (folder / "someone waits").touch()


def slow(place):
    with open(folder / "log", "a") as log:
        log.write("built\\n")
    (place / "half").write_bytes(bytes(5000))
    print("inside", flush=True)
    while not (folder / "someone waits").exists() or len(sys.argv) > 2:
        time.sleep(0.01)
    (place / "half").unlink()
    return make(place)


store = EngineStore(folder / "engines", say=say)
manifest = store.build(SPEC, slow)
store.payload(manifest)
print(manifest.key, flush=True)
"""


def _rival(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", RIVAL, str(folder), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_two_builders_one_builds_and_one_waits(store: EngineStore, tmp_path: Path) -> None:
    first = _rival(tmp_path)
    assert first.stdout is not None and first.stdout.readline() == "inside\n"
    assert store.prune(set()) == 0  # an engine under construction stays
    second = _rival(tmp_path)
    printed = [process.communicate(timeout=120) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], printed
    assert (tmp_path / "log").read_text() == "built\n"
    assert all(out == f"{SPEC.key()}\n" for out, _ in printed)
    waits = f"waiting for process {first.pid}, which is at work on the engine decode {SPEC.key()}\n"
    assert [err for _, err in printed] == ["", waits]


def test_who_waits_for_a_killed_builder_builds(store: EngineStore, tmp_path: Path) -> None:
    first = _rival(tmp_path, "for ever")
    assert first.stdout is not None and first.stdout.readline() == "inside\n"
    second = _rival(tmp_path)
    assert second.stderr is not None and second.stderr.readline().startswith(f"waiting for process {first.pid},")
    assert (store.find(SPEC), store.list(), store.verify()) == (None, (), [])
    first.send_signal(signal.SIGKILL)
    out, _ = second.communicate(timeout=120)
    first.communicate(timeout=60)
    assert second.returncode == 0 and out == f"inside\n{SPEC.key()}\n"
    assert store.verify() == [(SPEC.key(), "decode", None)]
    assert not list((store.root / "partial").iterdir())


# Runs builds with the n-th call to the file system killed or refused, for every n; forks, for it never loads torch.
EVERY_CALL = """
import errno, os, shutil, signal, sys
from pathlib import Path

import dfkd_engine.files
from dfkd_engine.errors import EngineError
from dfkd_engine.store import EngineStore
from tests.engine.small_store import SPEC, make

folder, fault, start = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
CALLS = ["mkdir", "open", "rename", "replace", "fsync", "unlink", "rmdir"]
os.fsync = lambda file: None  # a killed process takes nothing from the kernel's memory; only time is saved


def arm(nth):
    count, refused = 0, None

    def wrap(real):
        def call(*args, **kwargs):
            nonlocal count, refused
            count += 1
            if count == nth and fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if count == nth:
                refused = real.__name__
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))
    dfkd_engine.files.open = wrap(open)
    return lambda: refused


def fresh():
    shutil.rmtree(folder, ignore_errors=True)
    store = EngineStore(folder)
    if start == "damaged":
        store.build(SPEC, make)
        os.truncate(folder / SPEC.key() / "payload" / "model.pt2", 7)
    return store


for nth in range(1, 1000):
    store = fresh()
    child = os.fork()
    if not child:
        refused = arm(nth)
        try:
            store.build(SPEC, make)
            os._exit(1 if refused() else 0)
        except EngineError as error:
            # where the removal itself was refused, something stays: the next build sweeps it
            removing = refused() in ("open", "unlink", "rmdir")
            left = (folder / "partial").is_dir() and list((folder / "partial").iterdir())
            os._exit(2 if "No space left on device" in str(error) and (removing or not left) else 3)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(4)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in ((0, -signal.SIGKILL) if fault == "kill" else (0, 1, 2)), (nth, status)
    problem = store.problem(SPEC.key())
    allowed = {None, "it is missing", "model.pt2 has 7 bytes, on record are 4000"}
    assert problem in allowed, (nth, problem)
    if status in (0, 1):
        assert problem is None and store.find(SPEC) is not None, nth
    manifest = store.build(SPEC, make)
    assert store.verify() == [(SPEC.key(), "decode", None)], nth
    assert store.find(SPEC) == manifest and store.payload(manifest), nth
    assert not list((folder / "partial").iterdir()) and not list(folder.rglob("*.partial")), nth
    if status == 0:
        break
print(nth)
"""


@pytest.mark.parametrize("fault", ["kill", "full"])
def test_any_call_to_the_file_system_may_be_the_last(tmp_path: Path, fault: str) -> None:
    command = [sys.executable, "-c", EVERY_CALL, str(tmp_path / "engines"), fault, "damaged"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20  # calls were counted at all


# --- disks ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "No space left.*MB are left.*Make room, for instance with dfkd-engines prune"),
        (errno.EROFS, "Read-only file system.*Make the folder writable"),
        (errno.EFBIG, r"File too large.*ulimit -f"),
        (errno.EIO, "Input.output error.*See to the disk"),
    ],
)
def test_a_disk_that_refuses_is_told_in_words(store: EngineStore, built: Manifest, number: int, words: str) -> None:
    def refused(folder: Path) -> Mapping[str, Any]:
        raise OSError(number, os.strerror(number), str(folder))

    with pytest.raises(EngineError, match=f"cannot write the engine decode .*: {words}"):
        store.build(OTHER, refused)
    assert store.list() == (built,) and not list((store.root / "partial").iterdir())


def test_a_compiler_that_stops_where_nothing_fits(store: EngineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(folder: Path) -> Mapping[str, Any]:
        raise EngineError("decode cannot be compiled", "PytorchStreamWriter failed writing file", "report it")

    with pytest.raises(EngineError, match=r"^decode cannot be compiled"):
        store.build(SPEC, stopped)
    monkeypatch.setattr(dfkd_engine.files, "free_bytes", lambda folder: 100)
    with pytest.raises(EngineError, match=r"100 bytes are left where .*PytorchStreamWriter.*Make room"):
        store.build(SPEC, stopped)


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "engines"):
        store = EngineStore(root)
        assert store.find(SPEC) is None
        with pytest.raises(EngineError, match="cannot write the engine"):
            store.build(SPEC, never)
