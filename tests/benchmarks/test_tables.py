"""The documents' tables are what the recorded results say."""

import json

import pytest

from benchmarks import quality
from benchmarks.tables import DOCUMENTS, RESULTS, ROOT, TABLES, filled


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_is_current(document):
    text = (ROOT / document).read_text()
    assert filled(text, document) == text, "run python -m benchmarks.tables"


def test_a_number_that_was_changed_is_put_right():
    block = filled("<!-- demo-table -->\n<!-- /demo-table -->", "README.md")
    assert filled(block.replace(" % |", " %% |", 1), "README.md") == block != block.replace(" % |", " %% |", 1)
    with pytest.raises(ValueError, match="demo-table"):
        filled("no table here", "README.md")


def test_a_result_that_is_not_recorded_has_no_table(monkeypatch):
    monkeypatch.setattr("benchmarks.tables.TABLES", {"new-table": ("README.md", "not-recorded.json", str)})
    for text in ("no table here", "<!-- new-table -->\n<!-- /new-table -->"):
        assert filled(text, "README.md") == text
    with pytest.raises(ValueError, match=r"not-recorded\.json is not recorded"):
        filled("<!-- new-table -->\n| typed by hand |\n<!-- /new-table -->", "README.md")


def test_students_stand_best_first_with_every_seed_and_control():
    result = json.loads((RESULTS / TABLES["demo-table"][1]).read_text())
    result |= {"student": [0.5, 0.7], "teacher": [0.9, 0.9], "baselines": {"noise": [0.1, 0.1], "unguided": [0.7, 0.9]}}
    names = [line.split(" | ")[:3] for line in quality.markdown(result).splitlines() if line.startswith("| ")][1:]
    assert names == [
        ["| unguided samples of the prior", "80.0 %", "70.0 90.0"],
        ["| **guided images**", "60.0 %", "50.0 70.0"],
        ["| uniform noise", "10.0 %", "10.0 10.0"],
        ["| (the teacher itself)", "90.0 %", "90.0 90.0"],
    ]
