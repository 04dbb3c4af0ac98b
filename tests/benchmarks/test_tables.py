"""The documents' tables are what the recorded results say."""

import pytest

from benchmarks.tables import DOCUMENTS, ELSEWHERE, ROOT, TABLES, filled


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_is_current(document):
    text = (ROOT / document).read_text()
    assert filled(text, document) == text, "run python -m benchmarks.tables"


def test_a_table_stands_in_one_document():
    assert ELSEWHERE.keys() <= TABLES.keys()
    for name in TABLES:
        there = [document for document in DOCUMENTS if f"<!-- {name} -->" in (ROOT / document).read_text()]
        assert there == [ELSEWHERE.get(name, "README.md")]


def test_a_changed_number_is_put_right():
    text = (ROOT / "README.md").read_text()
    start = text.index("<!-- demo-table -->")
    spoiled = text[:start] + text[start:].replace(" % |", " %% |", 1)
    assert spoiled != text and filled(spoiled) == text


def test_a_missing_marker_is_an_error():
    with pytest.raises(ValueError, match=next(iter(TABLES))):
        filled("no table here")


def test_a_result_that_is_not_recorded_has_no_table(monkeypatch):
    monkeypatch.setattr("benchmarks.tables.TABLES", {"new-table": ("not-recorded.json", str)})
    for text in ("no table here", "<!-- new-table -->\n<!-- /new-table -->"):
        assert filled(text) == text
    with pytest.raises(ValueError, match=r"not-recorded\.json is not recorded"):
        filled("<!-- new-table -->\n| typed by hand |\n<!-- /new-table -->")
