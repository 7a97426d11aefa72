import csv
import io
import re

import pytest

from dskd_fast.paper.tables import Cell, Row, Table, over_seeds, to_csv, to_json, to_markdown, to_text

LOCO = ["breakfast_box", "screw_bag", "pushpins", "splicing_connectors", "juice_bottle", "mean"]
KINDS = ["AUROC structural", "AUROC logical", "AUROC mean", "sPRO@0.05 structural", "sPRO@0.05 logical", "other"]


def table(columns, labels=("RD", "local flat Pi + global flat Pi")):
    """Figures that are all different: the first row printed, the second with a spread."""
    rows = []
    for i, label in enumerate(labels):
        cells = [
            Cell(0.101 + 0.1 * i + 0.01 * j, *((0.051 + 0.01 * j, 3) if i else ()), remark=None if i or j else "wrong")
            for j in range(len(columns))
        ]
        rows.append(Row(label, "here" if i else "paper", cells))
    return Table("a [title] of 1", columns, rows)


def figures_of(table):
    return {f"{x:.3f}" for row in table.rows for cell in row.cells for x in (cell.value, cell.spread) if x is not None}


@pytest.mark.parametrize("width", [20, 40, 80, 100, 200])
@pytest.mark.parametrize("columns", [LOCO, KINDS, ["x"], [f"category_{i}" for i in range(15)]])
def test_no_terminal_is_too_narrow_for_a_number(columns, width):
    t = table(columns)
    text = to_text([t], ["a note"], width)
    assert set(re.findall(r"(?<![@\d.])0\.\d{3}\b", text)) == figures_of(t)
    assert "…" not in text
    assert "a [title] of 1" in " ".join(text.split())
    assert "a note" in text


def test_a_remark_is_marked_and_told_in_every_form():
    t = table(["mean"])
    for text in (to_text([t], [], 80), to_markdown([t], []).replace("\\", "")):
        assert "0.101*" in text
        assert "* RD, mean: wrong" in text
        assert text.count("wrong") == 1
    rows = list(csv.DictReader(io.StringIO(to_csv([t]))))
    assert [row["remark"] for row in rows] == ["wrong", ""]
    first, second = to_json([t])[0]["rows"]
    assert first["figures"]["mean"] == {"value": 0.101, "remark": "wrong"}
    assert "remark" not in second["figures"]["mean"]


def test_what_is_absent_is_a_dash_an_empty_field_and_null():
    t = Table("t", ["a"], [Row("r", "here", [Cell()])])
    assert re.search(r"^\s*r\s+-$", to_text([t], [], 80), re.MULTILINE)
    assert "| **r** | - |" in to_markdown([t], [])
    assert to_csv([t]).splitlines()[1] == "t,r,here,a,,,,"
    assert to_json([t])[0]["rows"][0]["figures"] == {"a": {"value": None}}


def test_csv_has_a_line_for_each_figure_with_all_its_digits():
    t = Table("t", ["paper mean", "here mean"], [Row("T, 1", "both", [Cell(0.73), Cell(1 / 3, 0.1 / 3, 2)])])
    paper, here = csv.DictReader(io.StringIO(to_csv([t])))
    assert (paper["source"], paper["value"], paper["spread"], paper["seeds"]) == ("paper", "0.73", "", "")
    assert (here["source"], float(here["value"]), float(here["spread"]), here["seeds"]) == ("here", 1 / 3, 0.1 / 3, "2")
    assert here["row"] == "T, 1"


def test_over_seeds():
    assert over_seeds([]) == over_seeds([None, None]) == Cell()
    assert over_seeds([0.5]) == over_seeds([0.5, None]) == Cell(0.5, None, 1)
    assert over_seeds([0.25, 0.75]) == Cell(0.5, pytest.approx(0.5 / 2**0.5), 2)
