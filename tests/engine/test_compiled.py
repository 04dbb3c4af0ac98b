"""What every engine promises its caller, whatever runs it: arguments checked by name, results that are the caller's."""

from dataclasses import replace

import pytest
import torch

from dfkd_engine.backends import BACKENDS, compile_graph
from dfkd_engine.compiled import Engine, load
from dfkd_engine.devices import architecture
from dfkd_engine.errors import EngineError
from dfkd_engine.spec import EngineSpec, TensorSpec
from dfkd_engine.store import EngineStore

SPEC = EngineSpec(
    network="gradient",
    config={},
    components={},
    inputs=(
        TensorSpec("z0", (None, 4, 2, 2), "float32"),
        TensorSpec("labels", (None,), "int64"),
        TensorSpec("scale", (1,), "float32"),
    ),
    outputs=(TensorSpec("gradient", (None, 4, 2, 2), "float32"), TensorSpec("cls", (None,), "float32")),
    rows=(1, 4, 6),
    dtype="float32",
    backend="doubling",
    versions={},
    device="cpu",
    flags={},
    sources="test",
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
        (lambda z, y, s: (z[:0], y[:0], s), ValueError, "z0 has 0 rows; this engine takes 1 to 6 at a time"),
        (lambda z, y, s: (z.repeat(2, 1, 1, 1), y.repeat(2), s), ValueError, "z0 has 8 rows; this engine takes 1 to 6"),
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


def test_a_result_without_a_batch_cannot_be_cut():
    outputs = (TensorSpec("sum", (4,), "float32"),)
    with pytest.raises(EngineError, match=r"cannot allow a batch of 1: .* sum has no batch to cut"):
        Engine(replace(SPEC, outputs=outputs), compute)
    engine = Engine(replace(SPEC, outputs=outputs, rows=(2, 4, 6)), lambda z, y, s: (z.sum((0, 2, 3)),))
    assert engine(*arguments(4))[0].shape == (4,)


def test_a_backend_that_returns_too_little_is_noticed():
    with pytest.raises(EngineError, match="returned 1 results and its spec has 2"):
        Engine(SPEC, lambda z, y, s: (z,))(*arguments(4))


class Doubling:
    """A backend of one file."""

    name, fixed_rows, targets = "doubling", False, ()

    def __init__(self, why=None, fails=None):
        self.why, self.fails = why, fails

    def unusable(self, device, dtype="float32"):
        return self.why

    def versions(self):
        return {"doubling": "2"}

    def flags(self, device):
        return {}

    def compile(self, graph, spec, folder):
        if self.fails:
            raise self.fails
        (folder / "engine").write_text("two")

    def load(self, folder, spec, device):
        assert (folder / "engine").read_text() == "two"
        return lambda z, y, s: (2 * z, y.float())


@pytest.fixture
def store(tmp_path):
    return EngineStore(tmp_path / "engines")


def stored(store, **changes):
    """The key of an engine of the spec with these changes, built now."""
    own = replace(SPEC, **({"device": architecture("cpu"), "versions": {"doubling": "2", "torch": "1"}} | changes))
    return store.build(own, lambda folder: compile_graph(Doubling(), None, own, folder) or {}).key


def test_an_engine_from_the_store_runs(store, monkeypatch):
    key, (z0, labels, scale) = stored(store), arguments(3)
    assert torch.equal(load(store, key, "cpu", Doubling())(z0, labels, scale)[0], 2 * z0)
    with pytest.raises(EngineError, match="'doubling' is unknown: known are inductor, onnxruntime, tensorrt"):
        load(store, key, "cpu")
    monkeypatch.setitem(BACKENDS, "doubling", Doubling())
    assert load(store, key, "cpu").spec.backend == "doubling"


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"device": "cpu x86_64 of tomorrow"}, "it was built for cpu x86_64 of tomorrow, this is cpu"),
        ({"versions": {"doubling": "1"}}, "it was built with doubling 1, here is 2"),
    ],
)
def test_an_engine_of_another_machine_or_version_is_not_loaded(store, changes, why):
    with pytest.raises(EngineError, match=f"cannot run here: {why}.*dfkd-engines build"):
        load(store, stored(store, **changes), "cpu", Doubling())


def test_what_is_missing_altered_or_cannot_run_is_not_loaded(store):
    key = stored(store)
    with pytest.raises(EngineError, match="cannot run here: it wants two hands"):
        load(store, key, "cpu", Doubling("it wants two hands"))
    (store.root / key / "payload" / "engine").write_text("six")
    with pytest.raises(EngineError, match=r"damaged.*dfkd-engines build"):
        load(store, key, "cpu", Doubling())
    with pytest.raises(EngineError, match=r"missing.*dfkd-engines build"):
        load(store, "0" * 24, "cpu", Doubling())


def test_what_a_compiler_raises_is_told_in_a_line(tmp_path):
    broken = Doubling(fails=RuntimeError("no converter for aten.x\nand a page of graph"))
    with pytest.raises(EngineError) as caught:
        compile_graph(broken, None, SPEC, tmp_path)
    assert caught.value.what == "gradient cannot be compiled by doubling"
    assert caught.value.why == "its compiler stopped (RuntimeError: no converter for aten.x)"
    with pytest.raises(OSError, match="the disk"):  # the store knows what to say of it
        compile_graph(Doubling(fails=OSError("the disk")), None, SPEC, tmp_path)
    with pytest.raises(EngineError, match="cannot be compiled by doubling: it wants two hands"):
        compile_graph(Doubling("it wants two hands"), None, SPEC, tmp_path)
