"""The measured tables of the README and of docs/results.md."""

from benchmarks.tables import MARKED, PAGES, TABLES, with_tables

README = PAGES[0]


def test_tables_are_what_the_committed_results_print():
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    assert {match[2] for text in texts for match in MARKED.finditer(text)} == set(TABLES)
    assert [with_tables(text) for text in texts] == texts


def test_a_changed_number_in_a_table_is_noticed():
    text = README.read_text(encoding="utf-8")
    number = text.index("100.0", text.index("<!-- table: reports -->"))
    forged = text[:number] + "99.9" + text[number + 5 :]
    assert with_tables(forged) == text
