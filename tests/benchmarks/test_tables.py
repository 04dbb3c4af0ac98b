"""README's tables are what the recorded results say."""

import pytest

from benchmarks.tables import ROOT, TABLES, filled


def test_readme_is_current():
    text = (ROOT / "README.md").read_text()
    assert filled(text) == text, "run python -m benchmarks.tables"


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
