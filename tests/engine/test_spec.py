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

from dfkd_engine.devices import covers, describe_cpu, family, targets_of
from dfkd_engine.errors import EngineError
from dfkd_engine.spec import DTYPES, EngineSpec, TensorSpec, differences
from tests.engine.small_store import SPEC

ROOT = Path(__file__).resolve().parents[2]

# Other processes may take the core for as long as they like.
quick = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
letters = 'ab1 "\\é\n\ud800'  # what JSON escapes, and half a surrogate pair
words = st.text(letters, min_size=1, max_size=3)
sizes = st.integers(1, 3)
shapes = st.tuples(st.sampled_from([(), (None,)]), st.lists(sizes, max_size=3).map(tuple)).map(lambda x: x[0] + x[1])
tensors = st.builds(TensorSpec, st.sampled_from(["z", "t", "context"]), shapes, st.sampled_from(DTYPES))
arguments = st.lists(tensors, min_size=1, max_size=3, unique_by=lambda tensor: tensor.name).map(tuple)
options = st.dictionaries(words, words, max_size=2)
values = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | words
nested = st.dictionaries(words, values | st.dictionaries(words, st.lists(values, max_size=2), max_size=2), max_size=2)
specs = st.builds(
    EngineSpec,
    network=words,
    config=nested,
    components=options,
    inputs=arguments,
    outputs=arguments,
    rows=st.tuples(sizes, sizes, sizes).map(sorted).map(tuple),
    dtype=st.sampled_from(DTYPES),
    backend=words,
    versions=options,
    device=words,
    flags=options,
    sources=words,
)


@quick
@given(specs)
def test_round_trip_through_json(spec: EngineSpec) -> None:
    again = EngineSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec and again.key() == spec.key()


@quick
@given(specs, specs, st.sampled_from([field.name for field in fields(EngineSpec)]))
def test_every_field_changes_the_key_and_is_named(a: EngineSpec, b: EngineSpec, field: str) -> None:
    changed = replace(a, **{field: getattr(b, field)})
    named = [name for name, _, _ in differences(a, changed)]
    # as text: JSON tells 1 from 1.0 and from true
    same = json.dumps(a.to_json()[field], sort_keys=True) == json.dumps(b.to_json()[field], sort_keys=True)
    assert (changed.key() == a.key()) == (not named) == same
    assert all(name.split(".")[0] == field for name in named)


def test_the_key_is_24_digits_that_do_not_depend_on_the_process_nor_on_torch() -> None:
    script = "import sys; from tests.engine.small_store import SPEC; import dfkd_engine.store"
    script += "; print(SPEC.key(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [SPEC.key(), "False"]
    assert len(SPEC.key()) == 24 and int(SPEC.key(), 16) >= 0


def test_differences_name_fields_inside_fields() -> None:
    other = replace(
        SPEC,
        config={"size": 128, "losses": {"bn": {"weight": 0.2}, "own": {"weight": 1}}},
        inputs=(TensorSpec("z", (None, 4, 16, 16), "float32"), TensorSpec("t", (None,), "int64")),
        rows=(2, 4, 16),
        versions={"torch": "2.14.0", "onnx": "1.23"},
    )
    assert differences(SPEC, other) == [
        ("config.losses.bn.weight", "0.1", "0.2"),
        ("config.size", "64", "128"),
        ("inputs.1", "z: float32 [B, 4, 8, 8]", "z: float32 [B, 4, 16, 16]"),
        ("rows.planned", "8", "4"),
        ("versions.torch", "2.13.0", "2.14.0"),
        ("config.losses.own.weight", "(absent)", "1"),
        ("inputs.2", "(absent)", "t: int64 [B]"),
        ("versions.onnx", "(absent)", "1.23"),
    ]


@pytest.mark.parametrize(
    "field, value, word",
    [
        ("network", "", "not empty"),
        ("inputs", (), "one TensorSpec"),
        ("outputs", (SPEC.inputs[0], SPEC.inputs[0]), "once"),
        ("rows", (2, 1, 4), "smallest <= planned"),
        ("rows", [1, 1, 4], "three sizes"),
        ("dtype", "fp16", "float16"),
        ("components", {"unet": 1}, "strings"),
        ("config", {"weight": float("nan")}, "JSON"),
        ("config", {"loss": object()}, "JSON"),
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
    "change", [{"sources": None}, {"inputs": [{"name": "z"}]}, {"versions": ["torch"]}, {"rows": 8}, {"unknown": 1}]
)
def test_json_that_is_no_spec(change: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        EngineSpec.from_json(SPEC.to_json() | change)


@pytest.mark.parametrize(
    "machine, cpuinfo, wanted",
    [
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


def test_a_family_of_targets_covers_its_gpus() -> None:
    built_for = family(["sm_120", "sm_89", "sm_89"])
    assert built_for == "cuda sm_89+sm_120" and targets_of(built_for) == ("sm_89", "sm_120")
    assert covers(built_for, "cuda sm_89 NVIDIA L4") and not covers(built_for, "cuda sm_90 NVIDIA H100")
    assert not covers("cuda sm_89 NVIDIA L4", "cuda sm_89 NVIDIA L4") and not covers(built_for, "cpu x86_64 avx2")
    with pytest.raises(EngineError, match="'ada' is unknown"):
        family(["ada"])
