"""``python -m tests.what_works_where``: writes docs/what_works_where.md."""

from .table import FILE, render

if __name__ == "__main__":
    FILE.write_text(render())
    print(FILE)
