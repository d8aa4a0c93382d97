"""docs/what_works_where.md says what the tests of this folder try, and nothing else."""

from .table import FILE, render


def test_the_file_says_what_the_tests_try() -> None:
    assert FILE.read_text() == render(), "run python -m tests.what_works_where"
