"""Tables in Markdown, as the paper's figures and the benchmarks are written."""

import re
from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """The lines of a table, whose cells are Markdown already.

    Args:
        heads: one for each column.
        rows: one cell for each column.
        words: how many columns hold words; the others hold numbers and end at the right.
    """
    ruler = ["---" if column < words else "---:" for column in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ruler, *rows))


def escaped(text: str) -> str:
    """A text in one line, in which nothing is taken for Markdown or HTML."""
    return re.sub(r"([\\|*_<>\[\]`])", r"\\\1", " ".join(text.split()))
