"""What every engine promises its caller, whatever runs it: arguments checked by name, results that are the caller's."""

from dataclasses import replace

import pytest
import torch

from dfkd_engine import compiled
from dfkd_engine.architecture import architecture
from dfkd_engine.backends import BACKENDS
from dfkd_engine.compiled import Engine, load
from dfkd_engine.errors import EngineError
from dfkd_engine.spec import EngineSpec, TensorSpec, pairs
from dfkd_engine.store import EngineStore

SPEC = EngineSpec(
    network="gradient",
    graph="a",
    weights="b",
    inputs=(
        TensorSpec("z0", (None, 4, 2, 2), "float32"),
        TensorSpec("labels", (None,), "int64"),
        TensorSpec("scale", (1,), "float32"),
    ),
    outputs=(TensorSpec("gradient", (None, 4, 2, 2), "float32"), TensorSpec("cls", (None,), "float32")),
    batch=(1, 4, 6),
    dtype="float32",
    backend="eager",
    versions=(),
    device="cpu",
    flags=(),
)


def compute(z0, labels, scale):
    return z0 * scale + labels[:, None, None, None], z0.sum((1, 2, 3)) + labels


def arguments(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, 2, 2, generator=generator), torch.arange(rows), torch.tensor([3.0])


@pytest.fixture
def engine():
    return Engine(SPEC, compute)


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_every_batch_gives_the_function(engine, rows):
    got, want = engine(*arguments(rows)), compute(*arguments(rows))
    assert len(got) == 2 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_backend_sees_plain_tensors_and_two_rows_or_more():
    seen = []

    def spy(*tensors):
        seen.extend(tensors)
        assert not torch.is_grad_enabled()
        return compute(*tensors)

    z0, labels, scale = arguments(5)
    strided = z0.to(memory_format=torch.channels_last)[::2], labels[1:4], scale  # labels: eight bytes off the grid
    got = Engine(SPEC, spy)(*strided)
    assert all(x.is_contiguous() and x.data_ptr() % 16 == 0 and not x.requires_grad for x in seen)
    assert torch.equal(got[0], compute(*strided)[0])
    seen.clear()
    Engine(SPEC, spy)(z0[:1], labels[:1], scale)
    assert [len(x) for x in seen] == [2, 2, 1] and torch.equal(seen[0][0], seen[0][1])


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda z, y, s: (z, y), TypeError, r"got 2 arguments; it wants 3: z0: float32 \[B, 4, 2, 2\], labels: int64"),
        (lambda z, y, s: (z.double(), y, s), TypeError, "z0 is float64; wanted is float32"),
        (lambda z, y, s: (z, y.float(), s), TypeError, "labels is float32; wanted is int64"),
        (
            lambda z, y, s: (z, list(y), s),
            TypeError,
            r"labels is of type list; wanted is a tensor, labels: int64 \[B\]",
        ),
        (lambda z, y, s: (z[:, :3], y, s), ValueError, r"z0 has shape \[4, 3, 2, 2\]; wanted is \[B, 4, 2, 2\]"),
        (lambda z, y, s: (z[0], y, s), ValueError, r"z0 has shape \[4, 2, 2\]"),
        (lambda z, y, s: (z, y, s[0]), ValueError, r"scale has shape \[\]; wanted is \[1\]"),
        (lambda z, y, s: (z, y[:3], s), ValueError, "labels has 3 rows and z0 has 4"),
        (lambda z, y, s: (z.to("meta"), y, s), ValueError, "z0 is on meta; wanted is cpu"),
        (
            lambda z, y, s: (z.requires_grad_(), y, s),
            TypeError,
            "z0 requires a gradient, and an engine has no backward",
        ),
    ],
)
def test_a_wrong_argument_is_refused_by_name(engine, spoil, error, message):
    with pytest.raises(error, match=f"gradient.*{message}"):
        engine(*spoil(*arguments(4)))


def test_a_gradient_that_nobody_records_is_no_obstacle(engine):
    z0, labels, scale = arguments(2)
    with torch.no_grad():
        assert not engine(z0.requires_grad_(), labels, scale)[0].requires_grad


@pytest.mark.parametrize("rows", [0, 7])
def test_a_batch_out_of_range_is_refused(engine, rows):
    with pytest.raises(ValueError, match=f"z0 has {rows} rows; this engine takes 1 to 6 at a time"):
        engine(*arguments(rows))


def test_a_smallest_batch_is_kept():
    with pytest.raises(ValueError, match="z0 has 1 rows; this engine takes 2 to 6"):
        Engine(replace(SPEC, batch=(2, 4, 6)), compute)(*arguments(1))


def test_results_share_no_memory():
    buffer = torch.empty(3, 6, 4, 2, 2)

    def careless(z0, labels, scale):
        """Writes into one buffer, returns a view of it, and an argument."""
        torch.mul(z0, 2, out=buffer[0, : len(z0)])
        return buffer[0, : len(z0)], scale.expand(len(z0))

    for rows in (1, 2, 6):
        engine = Engine(SPEC, careless)
        first = engine(*arguments(rows))
        kept = [x.clone() for x in first]
        z0, labels, scale = arguments(rows, seed=1)
        second = engine(z0, labels, scale)
        assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
        places = [x.untyped_storage().data_ptr() for x in (*first, *second, z0, labels, scale)]
        assert len(set(places)) == len(places)


def test_an_identity_gives_a_copy():
    z0, labels, scale = arguments(3)
    engine = Engine(SPEC, lambda z, y, s: (z, z.flatten(1)[:, 0]))
    assert engine(z0, labels, scale)[0].data_ptr() != z0.data_ptr()


@pytest.mark.parametrize("rows", [1, 4])
def test_out_is_filled(engine, rows):
    out = torch.full((rows, 4, 2, 2), 7.0).to(memory_format=torch.channels_last), torch.full((rows,), 7.0)
    got = engine(*arguments(rows), out=out)
    assert all(a is b for a, b in zip(got, out, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(out, compute(*arguments(rows)), strict=True))


def test_out_may_be_an_argument(engine):
    z0, labels, scale = arguments(3)
    want = compute(z0, labels, scale)
    engine(z0, labels, scale, out=(z0, torch.empty(3)))
    assert torch.equal(z0, want[0])


def test_a_wrong_out_is_refused_by_name(engine):
    image = torch.empty(4, 4, 2, 2)
    with pytest.raises(TypeError, match="got 1 tensors in out; it wants 2: gradient"):
        engine(*arguments(4), out=(image,))
    with pytest.raises(ValueError, match="out's cls has 3 rows; wanted are 4"):
        engine(*arguments(4), out=(image, torch.empty(3)))
    with pytest.raises(TypeError, match="gradient is float16; wanted is float32"):
        engine(*arguments(4), out=(image.half(), torch.empty(4)))


def test_a_result_without_a_batch_cannot_be_cut():
    outputs = (TensorSpec("sum", (4,), "float32"),)
    with pytest.raises(EngineError, match=r"cannot allow a batch of 1: .* sum has no batch to cut"):
        Engine(replace(SPEC, outputs=outputs), compute)
    engine = Engine(replace(SPEC, outputs=outputs, batch=(2, 4, 6)), lambda z, y, s: (z.sum((0, 2, 3)),))
    assert engine(*arguments(4))[0].shape == (4,)


def test_a_backend_that_returns_too_little_is_noticed():
    with pytest.raises(EngineError, match="returned 1 results and its spec has 2"):
        Engine(SPEC, lambda z, y, s: (z,))(*arguments(4))


class Doubling:
    """A backend of one file."""

    name, stored = "doubling", True

    def __init__(self, why=None):
        self.why = why

    def unusable(self, device, dtype="float32"):
        return self.why

    def versions(self):
        return {"doubling": "2"}

    def flags(self, device):
        return {}

    def load(self, folder, spec, device):
        assert (folder / "engine").read_text() == "two"
        return lambda z, y, s: (2 * z, y.float())


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """(store, build): build(**changes) stores an engine of the spec with these changes and returns its key."""
    monkeypatch.setitem(BACKENDS, "doubling", Doubling())
    store = EngineStore(tmp_path / "engines")

    def make(folder):
        (folder / "engine").write_text("two")
        return {}

    def build(**changes):
        changes = {"device": architecture("cpu"), "versions": pairs({"doubling": "2", "torch": "1"})} | changes
        spec = replace(SPEC, backend="doubling", **changes)
        return store.build(spec, {"network": spec.network, "test": spec.key()}, make).key

    return store, build


def test_an_engine_from_the_store_runs(stored):
    store, build = stored
    z0, labels, scale = arguments(3)
    engine = load(store, build(), "cpu")
    assert torch.equal(engine(z0, labels, scale)[0], 2 * z0) and engine.spec.backend == "doubling"


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"device": "cpu x86_64 of tomorrow"}, "it was built for cpu x86_64 of tomorrow, this is cpu"),
        ({"versions": (("doubling", "1"),)}, "it was built with doubling 1, here is 2"),
    ],
)
def test_an_engine_of_another_machine_or_version_is_not_loaded(stored, changes, why):
    store, build = stored
    with pytest.raises(EngineError, match=f"cannot run here: {why}.*dfkd-engines build"):
        load(store, build(**changes), "cpu")


def test_an_altered_engine_is_not_loaded(stored):
    store, build = stored
    key = build()
    file = next(store.root.glob(f"{key}/payload/engine"))
    file.chmod(0o644)
    file.write_text("six")
    with pytest.raises(EngineError, match=r"damaged.*dfkd-engines build"):
        load(store, key, "cpu")


def test_a_backend_that_cannot_run_says_why(stored, monkeypatch):
    store, build = stored
    key = build()
    monkeypatch.setitem(BACKENDS, "doubling", Doubling("it wants two hands"))
    with pytest.raises(EngineError, match="cannot run here: it wants two hands"):
        load(store, key, "cpu")


def test_a_missing_engine_names_what_builds_it(stored):
    with pytest.raises(EngineError, match=r"missing.*dfkd-engines build"):
        load(stored[0], "0" * 24, "cpu")


def test_nothing_but_the_store_is_loaded_from():
    """No function here takes a path."""
    assert "Path" not in compiled.__dict__
