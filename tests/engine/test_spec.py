"""The key changes with every field and with nothing else, and a spec survives its way through JSON."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfkd_engine.errors import EngineError
from dfkd_engine.spec import (
    DTYPES,
    EngineSpec,
    TensorSpec,
    canonical_json,
    cpu_architecture,
    describe_cpu,
    differences,
    pairs,
)
from tests.engine.small_store import SPEC

# Other processes may take the core for as long as they like.
quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
letters = 'ab.1 "\\é\n\ud800'  # what JSON escapes, and half a surrogate pair
words = st.text(letters, min_size=1, max_size=3)
sizes = st.integers(1, 3)
shapes = st.tuples(st.sampled_from([(), (None,)]), st.lists(sizes, max_size=3).map(tuple)).map(lambda x: x[0] + x[1])
tensors = st.builds(TensorSpec, st.sampled_from(["z", "t", "context"]), shapes, st.sampled_from(DTYPES))
arguments = st.lists(tensors, min_size=1, max_size=3, unique_by=lambda tensor: tensor.name).map(tuple)
options = st.dictionaries(words, words, max_size=2).map(pairs)
specs = st.builds(
    EngineSpec,
    network=words,
    graph=words,
    weights=words,
    inputs=arguments,
    outputs=arguments,
    batch=st.tuples(sizes, sizes, sizes).map(sorted).map(tuple),
    dtype=st.sampled_from(DTYPES),
    backend=words,
    versions=options,
    device=words,
    flags=options,
)


@quick
@given(specs)
def test_round_trip_through_json(spec: EngineSpec) -> None:
    again = EngineSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert again.key() == spec.key()


@quick
@given(specs, specs, st.sampled_from([field.name for field in fields(EngineSpec)]))
def test_every_field_changes_the_key_and_is_named(a: EngineSpec, b: EngineSpec, field: str) -> None:
    changed = replace(a, **{field: getattr(b, field)})
    named = [name for name, _, _ in differences(a, changed)]
    same = getattr(a, field) == getattr(b, field)
    assert (changed.key() == a.key()) == (not named) == same
    assert all(name.split(".")[0] == field for name in named)


@quick
@given(specs, specs)
def test_no_differences_exactly_between_equals(a: EngineSpec, b: EngineSpec) -> None:
    assert (differences(a, b) == []) == (a == b) == (a.key() == b.key())
    assert differences(a, a) == []
    assert {(name, here, there) for name, there, here in differences(b, a)} == set(differences(a, b))


def test_the_key_is_24_digits_that_do_not_depend_on_the_process() -> None:
    script = "from tests.engine.small_store import SPEC; print(SPEC.key())"
    done = subprocess.run([sys.executable, "-c", script], cwd=_root(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == SPEC.key()
    assert len(SPEC.key()) == 24 and int(SPEC.key(), 16) >= 0


def test_differences_name_fields_inside_fields() -> None:
    other = replace(
        SPEC,
        inputs=(TensorSpec("z", (None, 4, 16, 16), "float32"), TensorSpec("t", (None,), "int64")),
        batch=(2, 4, 16),
        versions=(("onnx", "1.23"), ("torch", "2.14.0")),
        flags=(),
    )
    assert differences(SPEC, other) == [
        ("inputs", "z", "z, t"),
        ("inputs.z.shape", "[B, 4, 8, 8]", "[B, 4, 16, 16]"),
        ("batch.planned", "8", "4"),
        ("versions.torch", "2.13.0", "2.14.0"),
        ("flags.freezing", "1", "(absent)"),
        ("inputs.t.shape", "(absent)", "[B]"),
        ("inputs.t.dtype", "(absent)", "int64"),
        ("versions.onnx", "(absent)", "1.23"),
    ]


def test_the_order_of_arguments_counts() -> None:
    two = (TensorSpec("a", (None,), "float32"), TensorSpec("b", (None,), "float32"))
    one, other = replace(SPEC, inputs=two), replace(SPEC, inputs=two[::-1])
    assert one.key() != other.key()
    assert differences(one, other) == [("inputs", "a, b", "b, a")]


@pytest.mark.parametrize(
    "field, value, word",
    [
        ("network", "", "not empty"),
        ("weights", None, "not empty"),
        ("inputs", (), "one TensorSpec"),
        ("outputs", (SPEC.inputs[0], SPEC.inputs[0]), "once"),
        ("batch", (2, 1, 4), "smallest <= planned"),
        ("batch", (0, 1, 4), "1 <= smallest"),
        ("batch", [1, 1, 4], "three sizes"),
        ("dtype", "fp16", "float16"),
        ("versions", (("b", "1"), ("a", "1")), "sorted"),
        ("flags", (("a", 1),), "strings"),
        ("flags", (("a", "1"), ("a", "2")), "once"),
    ],
)
def test_values_that_no_engine_can_have(field: str, value: Any, word: str) -> None:
    with pytest.raises(EngineError, match=word) as caught:
        replace(SPEC, **{field: value})
    assert field in caught.value.what


@pytest.mark.parametrize(
    "name, shape, dtype",
    [("1z", (None,), "float32"), ("z", (3, None), "float32"), ("z", (0,), "float32"), ("z", (None,), "float64")],
)
def test_tensors_that_cannot_be(name: str, shape: Any, dtype: str) -> None:
    with pytest.raises(EngineError, match=r"cannot be used"):
        TensorSpec(name, shape, dtype)


@pytest.mark.parametrize(
    "change",
    [
        {"graph": None},
        {"inputs": [{"name": "z"}]},
        {"inputs": "z"},
        {"versions": [["torch"]]},
        {"versions": {"torch": "2.13.0"}},
        {"batch": 8},
        {"unknown": 1},
    ],
)
def test_json_that_is_no_spec(change: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        EngineSpec.from_json(SPEC.to_json() | change)


def test_json_that_lacks_a_field() -> None:
    with pytest.raises(EngineError, match="fields are"):
        EngineSpec.from_json({"network": "unet"})


def test_canonical_json_has_one_text() -> None:
    assert canonical_json({"b": [1, None], "a": "é"}) == '{"a":"\\u00e9","b":[1,null]}'
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_cpu_architecture_is_of_this_machine() -> None:
    assert cpu_architecture() == cpu_architecture()
    assert cpu_architecture().startswith("cpu ")


@pytest.mark.parametrize(
    "machine, cpuinfo, wanted",
    [
        ("x86_64", "flags\t\t: sse4_2 ssse3 popcnt cx16 smep svm", "cpu x86_64 sse4_2"),
        ("x86_64", "flags : avx avx2 bmi1 bmi2 f16c fma abm movbe smep", "cpu x86_64 avx2"),
        # a virtual machine that hides fma: code for avx2 as compilers understand it would die there
        ("x86_64", "flags : sse4_2 ssse3 popcnt cx16 avx avx2 bmi1 bmi2 f16c abm movbe", "cpu x86_64 sse4_2"),
        (
            "x86_64",
            "processor : 0\nflags : avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16 amx_tile fma\nflags : none",
            "cpu x86_64 avx512 amx_tile avx512_bf16",
        ),
        ("aarch64", "Features\t: fp asimd aes asimdhp sve bf16", "cpu aarch64 asimdhp bf16 sve"),
        ("riscv64", "", "cpu riscv64"),
    ],
)
def test_describe_cpu(machine: str, cpuinfo: str, wanted: str) -> None:
    assert describe_cpu(machine, cpuinfo) == wanted


def test_torch_is_not_loaded() -> None:
    script = "import sys, dfkd_engine.spec, dfkd_engine.store; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=_root(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def _root() -> Path:
    return Path(__file__).resolve().parents[2]
