"""Tables of figures, the paper's beside one's own, as text, Markdown, CSV and JSON."""

import csv
import io
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from dskd_fast import markdown
from dskd_fast.markdown import escaped


@dataclass(frozen=True)
class Cell:
    """One figure.

    Attributes:
        value: the mean over seeds, or the paper's figure; None if there is none.
        spread: the sample standard deviation over seeds; None for fewer than two.
        seeds: how many seeds it is from; 0 for the paper's.
        remark: what is wrong with a printed figure.
    """

    value: float | None = None
    spread: float | None = None
    seeds: int = 0
    remark: str | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        spread = "" if self.spread is None else f" ±{self.spread:.3f}"
        return f"{self.value:.3f}{'*' if self.remark else ''}{spread}"


def over_seeds(values: Iterable[float | None]) -> Cell:
    """Mean and sample standard deviation over those seeds that have the figure."""
    there = [value for value in values if value is not None]
    if not there:
        return Cell()
    return Cell(statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else None, len(there))


@dataclass(frozen=True)
class Row:
    """One line of a table; `cells` has one for each column."""

    label: str
    source: Literal["paper", "here", "both"]
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Row]

    @property
    def remarks(self) -> list[str]:
        """What is wrong with printed figures, a line each."""
        return [
            f"* {row.label}, {column}: {cell.remark}"
            for row in self.rows
            for column, cell in zip(self.columns, row.cells, strict=True)
            if cell.remark
        ]


def to_text(tables: Sequence[Table], notes: Sequence[str], width: int) -> str:
    """For a terminal of `width` columns, or as many more as the figures need: none of them loses a digit."""
    file = io.StringIO()
    console = Console(file=file, width=max(width, *map(_least_width, tables)), markup=False, emoji=False)
    for table in tables:
        console.print(table.title, highlight=False)
        console.print(_drawn(table, console.width))
        for remark in table.remarks:
            console.print(remark, highlight=False)
        console.print()
    for note in notes:
        console.print(note, highlight=False)
    return "".join(line.rstrip() + "\n" for line in file.getvalue().splitlines())


_LABEL_WIDTH = 12
_GAP = 2


def _heads_and_texts(table: Table) -> Iterator[tuple[str, list[str]]]:
    for i, column in enumerate(table.columns):
        # Names may break at their underscores; a mean and its spread may stand on two lines, but are never cut.
        yield column.replace("_", " "), [str(row.cells[i]) for row in table.rows]


def _narrow(table: Table) -> list[int]:
    """Widths of the columns of figures that break no word."""
    return [
        max(len(word) for text in (head, *texts) for word in text.split()) for head, texts in _heads_and_texts(table)
    ]


def _least_width(table: Table) -> int:
    return _LABEL_WIDTH + sum(_narrow(table)) + _GAP * (len(table.columns) + 1)


def _drawn(table: Table, width: int) -> RichTable:
    widths = [max(map(len, (head, *texts))) for head, texts in _heads_and_texts(table)]
    for_labels = width - _GAP * (len(widths) + 1)
    longest = max((len(row.label) for row in table.rows), default=0)
    if sum(widths) + max(longest, _LABEL_WIDTH) > for_labels:
        widths = _narrow(table)
    # One space of padding and one of the box make the gap.
    drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))
    drawn.add_column("", overflow="fold", width=max(min(longest, for_labels - sum(widths)), _LABEL_WIDTH))
    for (head, _), column_width in zip(_heads_and_texts(table), widths, strict=True):
        drawn.add_column(head, justify="right", overflow="fold", width=column_width)
    for row, following in zip(table.rows, [*table.rows[1:], None], strict=True):
        is_last = following is not None and following.source != row.source
        drawn.add_row(row.label.replace("_", " "), *map(str, row.cells), end_section=is_last)
    return drawn


def to_markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Our own rows are bold."""
    parts = []
    for table in tables:
        lines = []
        for row in table.rows:
            label = f"**{escaped(row.label)}**" if row.source == "here" else escaped(row.label)
            lines.append((label, *(escaped(str(cell)) for cell in row.cells)))
        parts += [f"**{escaped(table.title)}**", markdown.table(("", *map(escaped, table.columns)), lines)]
        parts += [escaped(remark) for remark in table.remarks]
    parts.append("\n".join(f"- {escaped(note)}" for note in notes))
    return "\n\n".join(parts) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """One line for each figure; an empty value where there is none."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "row", "source", "column", "value", "spread", "seeds", "remark"])
    for table in tables:
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                source = row.source if row.source != "both" else column.split()[0]
                writer.writerow(
                    [table.title, row.label, source, column, cell.value, cell.spread, cell.seeds or None, cell.remark]
                )
    return file.getvalue()


def to_json(tables: Sequence[Table]) -> list[dict[str, Any]]:
    return [
        {
            "title": table.title,
            "rows": [
                {
                    "label": row.label,
                    "source": row.source,
                    "figures": {
                        column: {
                            name: value
                            for name, value in vars(cell).items()
                            if name == "value" or value not in (None, 0)
                        }
                        for column, cell in zip(table.columns, row.cells, strict=True)
                    },
                }
                for row in table.rows
            ],
        }
        for table in tables
    ]
