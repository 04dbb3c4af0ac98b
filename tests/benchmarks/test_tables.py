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
