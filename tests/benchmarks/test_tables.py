"""The documents' tables are what the recorded results say."""

import pytest

from benchmarks.tables import DOCUMENTS, ROOT, filled


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_is_current(document):
    text = (ROOT / document).read_text()
    assert filled(text, document) == text, "run python -m benchmarks.tables"


def test_a_number_that_was_changed_is_put_right():
    block = filled("<!-- methods-table -->\n<!-- /methods-table -->", "docs/methods.md")
    changed = block.replace(" | ", " |  ", 1)
    assert filled(changed, "docs/methods.md") == block != changed
    with pytest.raises(ValueError, match="methods-table"):
        filled("no table here", "docs/methods.md")


def test_a_result_that_is_not_recorded_has_no_table(monkeypatch):
    monkeypatch.setattr("benchmarks.tables.TABLES", {"new-table": ("README.md", "not-recorded.json", str)})
    for text in ("no table here", "<!-- new-table -->\n<!-- /new-table -->"):
        assert filled(text, "README.md") == text
    with pytest.raises(ValueError, match=r"not-recorded\.json is not recorded"):
        filled("<!-- new-table -->\n| typed by hand |\n<!-- /new-table -->", "README.md")
