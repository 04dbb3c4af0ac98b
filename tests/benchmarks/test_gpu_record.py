"""A record of a GPU: sections not measured now stay, and nothing gives way to less."""

import json

import pytest

from benchmarks.gpu_record import RecordError, made_with, merged, read

THEN, NOW = {"commit": "a"}, {"commit": "b"}
WHOLE, CUT, FAILED = {"result": {"rows": [1, 2]}}, {"result": {"rows": [1]}, "why": "stopped"}, {"why": "broken"}


def of(machine, found):
    return {"machine": machine, "seconds": 1.0, **found}


@pytest.mark.parametrize(
    "before, now, stays",
    [(WHOLE, WHOLE, False), (WHOLE, CUT, True), (WHOLE, FAILED, True), (CUT, WHOLE, False), (CUT, CUT, False),
     (CUT, FAILED, True), (FAILED, WHOLE, False), (FAILED, CUT, False), (FAILED, FAILED, False)],
)  # fmt: skip
def test_nothing_gives_way_to_less(before, now, stays):
    record, later = {"a": of(THEN, before)}, {"a": of(NOW, now)}
    found = merged(record, later, ["a"])["a"]
    if stays:
        assert found == {**record["a"], "again": {"machine": NOW, "seconds": 1.0, "why": now["why"]}}
    else:
        assert found == later["a"]
    assert "again" not in merged({"a": found}, {"a": of(NOW, WHOLE)}, ["a"])["a"]


def test_other_sections_stay_in_the_order_of_the_report():
    record = {"c": of(THEN, FAILED), "a": of(THEN, WHOLE)}
    found = merged(record, {"b": of(NOW, WHOLE)}, ["a", "b", "c"])
    assert list(found) == ["a", "b", "c"] and found.items() >= record.items()


def test_reading(tmp_path):
    path = tmp_path / "record.json"
    assert read(path, ["a"]) == {}
    path.write_text(json.dumps({"machine": NOW, "sections": {"a": of(THEN, WHOLE)}}))
    assert read(path, ["a"]) == {"a": of(THEN, WHOLE)}
    with pytest.raises(RecordError, match="a section 'a' of another version"):
        read(path, ["b"])
    for text in ("", "[]", "{}", '{"sections": []}', '{"sections": {"a": 3}}'):
        path.write_text(text)
        with pytest.raises(RecordError, match="is no record"):
            read(path, ["a"])


def test_what_it_was_made_with():
    machine = {"versions": {"torch": "2.11", "triton": "3.6"}, "python": "3.12", "commit": "c", "date": "2026-01-01"}
    assert made_with(machine) == "torch 2.11, triton 3.6; Python 3.12, commit c, 2026-01-01"
