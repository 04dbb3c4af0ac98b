"""The store in bad order: damage, killed and rival builders, disks that refuse. The next build mends it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfkd_engine.errors import EngineError
from dfkd_engine.storage.manifest import Manifest
from dfkd_engine.store import EngineStore
from tests.engine.small_store import FILES, OTHER, RECIPE, SPEC, counted, make, never

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


@pytest.fixture
def built(store: EngineStore) -> Manifest:
    return store.build(SPEC, RECIPE, make)


def _replace_by_link(folder: Path) -> None:
    shutil.copy(folder / "payload" / "model.pt2", folder.parent / "copy")
    (folder / "payload" / "model.pt2").unlink()
    (folder / "payload" / "model.pt2").symlink_to(folder.parent / "copy")


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
    "no payload": (lambda f: shutil.rmtree(f / "payload"), "payload is no folder"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "no JSON": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is not JSON"),
    "no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is not JSON"),
    "no object": (lambda f: (f / "manifest.json").write_text("[]"), "holds no manifest"),
    "version": (lambda f: _edit(f, version=2), "version 2, this program reads 1"),
    "edited": (lambda f: _edit(f, facts={"relative": 0}), "manifest.json was altered"),
    "another's manifest": (
        lambda f: shutil.copy(f.parent / OTHER.key() / "manifest.json", f / "manifest.json"),
        f"is that of {OTHER.key()}",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_never_loaded_and_mended(store: EngineStore, built: Manifest, name: str) -> None:
    other = store.build(OTHER, RECIPE | {"prior": "p1"}, make)
    store.payload(built)  # verified once already: damage that comes later counts too
    damage, word = DAMAGES[name]
    damage(store.root / built.key)

    for take in (lambda: store.payload(built), lambda: store.payload(store.get(built.key) or built)):
        with pytest.raises(EngineError) as caught:
            take()
        assert word in str(caught.value) and "damaged" in caught.value.what
        assert "dfkd-engines build" in caught.value.todo
    verdicts = {verdict.key: verdict for verdict in store.verify()}
    assert word in (verdicts[built.key].problem or "") and verdicts[built.key].network == "decode"
    assert verdicts[other.key].problem is None
    ((field, there, _),) = store.explain(RECIPE)
    assert field == "engine" and word in there

    with pytest.raises(AssertionError):
        store.build(SPEC, RECIPE, never)
    assert word in (store.problem(built.key) or "")  # the damaged one stays until its successor is whole

    mended = store.build(SPEC, RECIPE, make)
    assert mended.files == built.files
    assert [verdict.problem for verdict in store.verify()] == [None, None]
    assert store.find(RECIPE) == mended and store.payload(mended).is_dir()
    assert not list((store.root / "partial").iterdir())


def test_an_engine_that_is_a_link_is_refused(store: EngineStore, built: Manifest, tmp_path: Path) -> None:
    (store.root / built.key).rename(tmp_path / built.key)
    (store.root / built.key).symlink_to(tmp_path / built.key)
    assert store.find(RECIPE) is None
    with pytest.raises(EngineError, match="is a link"):
        store.payload(built)
    store.build(SPEC, RECIPE, make)
    assert store.verify()[0].problem is None
    assert (tmp_path / built.key / "manifest.json").is_file()  # only the link was taken away


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineStore, Manifest]]:
    store = EngineStore(tmp_path_factory.mktemp("shared"))
    yield store, store.build(SPEC, RECIPE, make)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


RIVAL = """
import sys, time
from pathlib import Path
from dfkd_engine.store import EngineStore
from tests.engine.small_store import RECIPE, SPEC, counted, make

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
manifest = store.build(SPEC, RECIPE, slow)
store.payload(manifest)
print(manifest.key, flush=True)
"""


def _rival(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", RIVAL, str(folder), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_two_builders_one_builds_and_one_waits(tmp_path: Path) -> None:
    both = [_rival(tmp_path), _rival(tmp_path)]
    printed = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert (tmp_path / "log").read_text() == "built\n"
    assert all(out.endswith(f"{SPEC.key()}\n") for out, _ in printed)
    builder, waiter = sorted(range(2), key=lambda i: len(printed[i][1]))
    assert printed[builder][1] == ""
    assert printed[waiter][1] == (
        f"waiting for process {both[builder].pid}, which is at work on the engine decode {SPEC.key()}\n"
    )


def test_threads_of_one_process_wait_as_well(store: EngineStore, tmp_path: Path) -> None:
    quiet = EngineStore(store.root, say=lambda line: None)
    builds = counted(tmp_path / "log", seconds=0.2)
    threads = [threading.Thread(target=quiet.build, args=(SPEC, RECIPE, builds)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "log").read_text() == "built\n"


def test_killed_inside_the_builder(store: EngineStore, tmp_path: Path) -> None:
    process = _rival(tmp_path, "for ever")
    assert process.stdout is not None and process.stdout.readline() == "inside\n"
    process.kill()
    process.communicate(timeout=60)
    assert list((store.root / "partial").rglob("half"))
    assert (store.find(RECIPE), store.get(SPEC.key()), store.list(), store.verify()) == (None, None, (), [])

    store.build(OTHER, RECIPE | {"prior": "p1"}, make)  # even the next build of another engine tidies up
    assert not list((store.root / "partial").iterdir())
    manifest = store.build(SPEC, RECIPE, make)
    assert store.payload(manifest).is_dir() and store.find(RECIPE) == manifest
    assert not list((store.root / "locks").iterdir())


def test_who_waits_for_a_killed_builder_builds(store: EngineStore, tmp_path: Path) -> None:
    first = _rival(tmp_path, "for ever")
    assert first.stdout is not None and first.stdout.readline() == "inside\n"
    second = _rival(tmp_path)
    assert second.stderr is not None and second.stderr.readline().startswith(f"waiting for process {first.pid},")
    first.send_signal(signal.SIGKILL)
    out, _ = second.communicate(timeout=120)
    first.communicate(timeout=60)
    assert second.returncode == 0 and out == f"inside\n{SPEC.key()}\n"
    assert store.verify() == [(SPEC.key(), "decode", None)]
    assert not list((store.root / "partial").iterdir())


def test_prune_leaves_an_engine_under_construction_alone(store: EngineStore, tmp_path: Path) -> None:
    process = _rival(tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "inside\n"
    assert store.prune(set()) == 0
    (tmp_path / "someone waits").touch()
    process.communicate(timeout=60)
    assert process.returncode == 0 and store.verify()[0].problem is None


# Runs builds with the n-th call to the file system killed or refused, for every n; forks, for it never loads torch.
EVERY_CALL = """
import errno, os, shutil, signal, sys
from pathlib import Path

import dfkd_engine.files
from dfkd_engine.errors import EngineError
from dfkd_engine.store import EngineStore
from tests.engine.small_store import RECIPE, SPEC, make

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
        store.build(SPEC, RECIPE, make)
        os.truncate(folder / SPEC.key() / "payload" / "model.pt2", 7)
    return store


for nth in range(1, 1000):
    store = fresh()
    child = os.fork()
    if not child:
        refused = arm(nth)
        try:
            store.build(SPEC, RECIPE, make)
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
        assert problem is None and store.find(RECIPE) is not None, nth
    manifest = store.build(SPEC, RECIPE, make)
    assert store.verify() == [(SPEC.key(), "decode", None)], nth
    assert store.find(RECIPE) == manifest and store.payload(manifest), nth
    assert not list((folder / "partial").iterdir()) and not list(folder.rglob("*.partial")), nth
    if status == 0:
        break
print(nth)
"""


@pytest.mark.parametrize("start", ["empty", "damaged"])
@pytest.mark.parametrize("fault", ["kill", "full"])
def test_any_call_to_the_file_system_may_be_the_last(tmp_path: Path, fault: str, start: str) -> None:
    command = [sys.executable, "-c", EVERY_CALL, str(tmp_path / "engines"), fault, start]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20  # calls were counted at all


def test_a_limit_of_file_sizes(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from dfkd_engine.errors import EngineError
from dfkd_engine.store import EngineStore
from tests.engine.small_store import RECIPE, SPEC, make

store = EngineStore(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (4500, resource.RLIM_INFINITY))
try:
    store.build(SPEC, RECIPE, make)
except EngineError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert not list((store.root / "partial").iterdir()) and store.verify() == []
store.payload(store.build(SPEC, RECIPE, make))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot write the engine decode" in done.stdout and "File too large" in done.stdout
    assert "ulimit -f" in done.stdout


# In a mount name space of its own, so that the kernel takes the file system back however the test ends.
OWN_DISK = """
import errno, os, subprocess, sys
from pathlib import Path
from dfkd_engine.errors import EngineError
from dfkd_engine.store import EngineStore
from tests.engine.small_store import OTHER, RECIPE, SPEC, make, never

disk = Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode:
    sys.exit(77)
store = EngineStore(disk / "engines")


def refused(build, *words):
    try:
        build()
    except EngineError as error:
        assert all(word in str(error) for word in words), str(error)
        print(error)
    else:
        raise AssertionError("the disk did not refuse")
    partial = store.root / "partial"
    assert not partial.exists() or not list(partial.iterdir())


def large(folder):
    (folder / "model").write_bytes(bytes(4_000_000))


def stopped(folder):
    try:
        large(folder)
    except OSError:
        raise RuntimeError("PytorchStreamWriter failed writing file") from None


refused(lambda: store.build(SPEC, RECIPE, large), "cannot write the engine decode", "No space left", "make room")
refused(lambda: store.build(SPEC, RECIPE, stopped), "PytorchStreamWriter", "bytes are left", "make room")
assert store.verify() == []
manifest = store.build(SPEC, RECIPE, make)

# room for an engine's removal, though nothing is left
with open(disk / "ballast", "wb", buffering=0) as ballast:
    try:
        while True:
            ballast.write(bytes(4096))
    except OSError as error:
        assert error.errno == errno.ENOSPC
refused(lambda: store.build(OTHER, RECIPE | {"prior": "p1"}, make), "No space left")
assert store.verify() == [(SPEC.key(), "decode", None)]
assert store.prune(set()) > manifest.bytes and store.list() == ()
(disk / "ballast").unlink()
manifest = store.build(SPEC, RECIPE, make)

subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
assert store.find(RECIPE) == manifest and store.payload(manifest) and store.explain(RECIPE) == []
assert store.verify() == [(SPEC.key(), "decode", None)]
other = RECIPE | {"prior": "p1"}
words = ("Read-only file system", "make the folder writable")
refused(lambda: store.build(OTHER, other, never), *words)
refused(lambda: store.adopt(other, SPEC.key()), *words)
refused(lambda: store.prune(set()), *words)
refused(lambda: EngineStore(disk / "new" / "engines").build(SPEC, RECIPE, never), "Read-only file system")
"""


def test_a_full_and_a_read_only_disk(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no unshare")
    own = [unshare, "--mount"] if os.geteuid() == 0 else [unshare, "--map-root-user", "--mount"]
    if subprocess.run([*own, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine grants no mount name space")
    command = [*own, sys.executable, "-c", OWN_DISK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this machine lets nobody mount")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "engines"):
        store = EngineStore(root)
        assert store.find(RECIPE) is None
        with pytest.raises(EngineError, match="cannot write the engine"):
            store.build(SPEC, RECIPE, never)
