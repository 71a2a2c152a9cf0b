"""The README's measured tables."""

from pathlib import Path

from benchmarks.tables import MARKED, TABLES, with_tables

README = Path(__file__).parents[1] / "README.md"


def test_readme_tables_are_what_the_committed_results_print():
    text = README.read_text(encoding="utf-8")
    assert {match[2] for match in MARKED.finditer(text)} == set(TABLES)
    assert with_tables(text) == text


def test_a_changed_number_in_a_table_is_noticed():
    text = README.read_text(encoding="utf-8")
    number = text.index("100.0", text.index("<!-- table: reports -->"))
    forged = text[:number] + "99.9" + text[number + 5 :]
    assert with_tables(forged) == text
