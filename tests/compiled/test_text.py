"""Engines in words and columns."""

from dfkd.compiled.text import causes, shown, size, table


def test_digests_are_cut_short_and_nothing_else():
    assert shown("0a" * 32) == "0a" * 6
    assert shown("0g" * 32) == "0g" * 32 and shown("2.13.0") == "2.13.0"


def test_causes():
    assert causes([]) == []
    assert causes([("network", "(absent)", "unet")]) == ["it was not built yet"]
    assert causes([("engine", "model.onnx is missing", "k")]) == ["it is damaged: model.onnx is missing"]
    other = causes([("backend", "inductor", "onnxruntime"), ("flags.x", "1", "2")])
    assert other[0].startswith("it was not built with")
    fields = [("size", "64", "32"), ("prior.unet", "a" * 64, "b" * 64)]
    assert causes(fields) == ["size was 64 and is 32", f"prior.unet was {'a' * 12} and is {'b' * 12}"]


def test_columns():
    assert table([("a", "bbb"), ("cc", "d")]).splitlines() == ["a   bbb", "cc  d  "]
    assert size(3 * 2**19) == "1.5 MiB"
