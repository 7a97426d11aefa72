import io
import re

import pytest
from rich.console import Console

import dskd_fast.cli.display as display
from dskd_fast.cli.display import counter, parts_table, results_table, training_progress
from dskd_fast.progress import log
from dskd_fast.runs.history import TrainingState

LIMITS = ("0.01", "0.05", "0.1", "0.3", "1.0")
KINDS = ("structural", "logical", "mean")


def figures(start):
    """Figures that are all different."""
    values = (i / 1000 for i in range(start, start + 100))
    auroc, *spro = ({kind: next(values) for kind in KINDS} for _ in range(1 + len(LIMITS)))
    spro_at = dict(zip(LIMITS, spro, strict=True))
    return {"auroc": auroc, "spro": spro_at["0.05"], "spro_at": spro_at}


@pytest.fixture
def screen(monkeypatch):
    """A console of that width and what is printed to it: screen(80, ...) -> file."""

    def make(width, **settings):
        file = io.StringIO()
        monkeypatch.setattr(display, "console", Console(file=file, width=width, markup=False, emoji=False, **settings))
        return file

    return make


def printed(table, screen, width):
    file = screen(width)
    display.console.print(table)
    text = file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    return text


@pytest.mark.parametrize("width", [40, 100])
def test_each_figure_stands_in_its_row_and_column_and_no_terminal_is_too_narrow(screen, width):
    columns = {name: figures(100 + 100 * i) for i, name in enumerate(("both students", "local alone", "global"))}
    text, expected = printed(results_table("a title", columns), screen, width), {}
    for kind in KINDS:
        expected[f"AUROC {kind}"] = [f"{f['auroc'][kind]:.3f}" for f in columns.values()]
        for limit in LIMITS:
            label = f"sPRO@{float(limit):g} {kind}"
            expected[label] = [f"{f['spro_at'][limit][kind]:.3f}" for f in columns.values()]
    assert set(re.findall(r"0\.\d{3}", text)) == {value for values in expected.values() for value in values}
    if width == 100:  # labels are on one line
        words = [line.split() for line in text.splitlines() if re.search(r"\d *$", line)]
        assert {" ".join(row[:-3]): row[-3:] for row in words} == expected


@pytest.mark.parametrize("width", [40, 100])
def test_each_part_has_a_row_with_its_areas_and_its_decisions_and_no_terminal_is_too_narrow(screen, width):
    areas = {"local": (0.5, 0.25), "global-means": (None, 0.125)}
    parts = {name: {"structural": a, "logical": b, "mean": None} for name, (a, b) in areas.items()}
    decided_by = {"good": {"local": 1, "global-means": 0}, "logical": {"local": 20, "global-means": 3}}
    for counts, shown in ((decided_by, (["21"], ["3"])), (None, ([], []))):
        rows = [line.split() for line in printed(parts_table(parts, counts), screen, width).splitlines()[-3:-1]]
        assert rows == [["local", "0.500", "0.250", *shown[0]], ["global-means", "-", "0.125", *shown[1]]]


def test_a_student_alone_has_one_column_unless_other_parts_are_scored_with_it(screen):
    parts = {"parts": {"teacher-means": dict.fromkeys(KINDS, 0.5)}, "decided_by": None}
    said = {"category": "c", "n_images": {"good": 1}, "decisions": None, "suspects": {}, **parts}
    said |= {"absent": [], "warnings": [], "unused": [], "bad_masks": []}
    for scoring, names in (("paper", ["local alone"]), ("calibrated", ["all parts", "local alone"])):
        file = screen(100)
        display.print_metrics(figures(100) | said | {"scoring": scoring, "local": figures(200), "global": None})
        lines = file.getvalue().splitlines()
        assert re.split(" {2,}", lines[2].strip()) == names
        assert any(line.split() == ["teacher-means", "0.500", "0.500"] for line in lines) == (scoring == "calibrated")


def states(steps):
    return [TrainingState(step, steps, 1 + step // 50, 0.5 / step, 0.25 / step, 31.5) for step in range(1, steps + 1)]


@pytest.mark.parametrize("steps", [1, 11, 999])
def test_without_a_terminal_progress_is_at_most_ten_lines_and_shows_the_end(screen, steps):
    file = screen(40, soft_wrap=True)
    with training_progress() as report:
        log.info("reading 5 images")
        for state in states(steps):
            report(state)
    first, *lines = file.getvalue().splitlines()
    assert first == "reading 5 images"
    assert len(lines) == min(steps, 10)
    assert lines[-1].startswith(f"step {steps}/{steps} ")
    assert f"local {0.5 / steps:.4f}" in lines[-1]
    assert f"global {0.25 / steps:.3e}" in lines[-1]
    assert "31.5 images/s" in lines[-1]
    assert "\x1b" not in file.getvalue()


def test_on_a_terminal_there_is_a_bar_with_both_losses_speed_and_time(screen):
    file = screen(160, force_terminal=True)
    with training_progress() as report:
        for state in states(60):
            report(state)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").splitlines()[-1]
    for part in ("epoch 2", "60/60", "local 0.0083", "global 4.167e-03", "31.5 images/s", "left"):
        assert part in last


def test_names_neither_steer_the_terminal_nor_forge_a_line(capsys, screen):
    name = "Straße 北京 👩\u200d🔧 \x1b]0;x\x07\r\n0 anomalous\x9b2J\u202egnp.\u2066"
    shown = r"Straße 北京 👩‍🔧 \u001b]0;x\u0007\r\n0 anomalous\u009b2J\u202egnp.\u2066"
    display.print_line(name, style="red")
    with display.messages(), training_progress(name):
        log.info("reading")
    assert capsys.readouterr().out == f"{shown}\n{shown}: reading\n"
    assert results_table(name, {"maps": figures(100)}).title == shown
    file = screen(200, force_terminal=True)
    with counter(name) as progress:
        progress(name, 1, 2)
    assert shown in file.getvalue()
    assert not {"\x9b", "\x07", "\u202e"} & set(file.getvalue())
