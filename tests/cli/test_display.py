import io
import re

import pytest
from rich.console import Console

import dskd_fast.cli.display as display
from dskd_fast.cli.display import counter, results_table, training_progress
from dskd_fast.workflow.train import Progress

LIMITS = ("0.01", "0.05", "0.1", "0.3", "1.0")


def figures(start):
    """Figures that are all different, and the text of each that the table has to show."""
    values = iter(f"0.{i:03d}" for i in range(start, start + 100))

    def three():
        return {kind: next(values) for kind in ("structural", "logical", "mean")}

    auroc, spro_at = three(), {limit: three() for limit in LIMITS}
    shown = [*auroc.values(), *spro_at["0.05"].values(), *(spro_at[limit]["mean"] for limit in LIMITS)]

    def as_numbers(texts):
        return {kind: float(text) for kind, text in texts.items()}

    numbers = {limit: as_numbers(texts) for limit, texts in spro_at.items()}
    return {"auroc": as_numbers(auroc), "spro": numbers["0.05"], "spro_at": numbers}, set(shown)


def printed(monkeypatch, table, width):
    file = io.StringIO()
    monkeypatch.setattr(display, "console", Console(file=file, width=width, markup=False, emoji=False))
    display.console.print(table)
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_terminal_is_too_narrow_for_a_number(monkeypatch, width):
    columns, expected = {}, set()
    for i, name in enumerate(("both students", "local alone", "global alone")):
        columns[name], shown = figures(100 + 100 * i)
        expected |= shown
    text = printed(monkeypatch, results_table("a title", columns), width)
    assert set(re.findall(r"0\.\d{3}", text)) == expected
    assert len(expected) == 30
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    if width >= 80:
        for name in columns:
            assert name in text


def test_each_figure_stands_in_its_row_and_column(monkeypatch):
    one, _ = figures(100)
    other, _ = figures(500)
    lines = printed(monkeypatch, results_table("t", {"one": one, "other": other}), 100).splitlines()
    rows = {" ".join(words[:-2]): words[-2:] for words in (line.split() for line in lines) if len(words) >= 3}
    assert rows.keys() == {
        *(f"{measure} {kind}" for measure in ("AUROC", "sPRO@0.05") for kind in ("structural", "logical", "mean")),
        *(f"sPRO@{limit} mean" for limit in ("0.01", "0.1", "0.3", "1")),
    }
    assert rows["AUROC logical"] == [f"{f['auroc']['logical']:.3f}" for f in (one, other)]
    assert rows["sPRO@0.05 structural"] == [f"{f['spro']['structural']:.3f}" for f in (one, other)]
    assert rows["sPRO@0.3 mean"] == [f"{f['spro_at']['0.3']['mean']:.3f}" for f in (one, other)]


def test_an_absent_figure_is_a_dash(monkeypatch):
    absent = dict.fromkeys(("structural", "logical", "mean"))
    values = {"auroc": absent | {"structural": 0.5}, "spro": absent, "spro_at": dict.fromkeys(LIMITS, absent)}
    lines = printed(monkeypatch, results_table("t", {"maps": values}), 80).splitlines()
    last = {line.split()[0] + " " + line.split()[1]: line.split()[-1] for line in lines if " mean" in line}
    assert set(last.values()) == {"-"}
    assert len(last) == 6
    assert any(line.split() == ["AUROC", "structural", "0.500"] for line in lines)
    assert "None" not in "".join(lines)


def test_brackets_and_colons_of_a_path_are_printed_as_they_are(monkeypatch):
    table = results_table("maps in a[/]b [red] :smile:", {"[bold]": figures(100)[0]})
    text = printed(monkeypatch, table, 80)
    assert "maps in a[/]b [red] :smile:" in text
    assert "[bold]" in text


def states(steps):
    return [Progress(step, steps, 1 + step // 50, 0.5 / step, 0.25 / step, 31.5) for step in range(1, steps + 1)]


@pytest.mark.parametrize("steps", [1, 3, 10, 11, 999])
def test_without_a_terminal_progress_is_at_most_ten_lines_and_tells_of_the_end(monkeypatch, steps):
    file = io.StringIO()
    monkeypatch.setattr(display, "console", Console(file=file, width=40, soft_wrap=True))
    with training_progress() as (report, status):
        status("reading 5 images")
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


def test_on_a_terminal_there_is_a_bar_with_both_losses_speed_and_time(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(display, "console", Console(file=file, width=160, force_terminal=True))
    with training_progress() as (report, _):
        for state in states(60):
            report(state)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").splitlines()[-1]
    for part in ("epoch 2", "60/60", "local 0.0083", "global 4.167e-03", "31.5 images/s", "left"):
        assert part in last


def test_the_counter_is_silent_without_a_terminal(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(display, "console", Console(file=file))
    with counter("scoring") as progress:
        for stage in ("reading", "scoring"):
            for i in range(1, 4):
                progress(stage, i, 3)
    assert file.getvalue() == ""


def test_the_counter_shows_the_stage_on_a_terminal(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(display, "console", Console(file=file, width=100, force_terminal=True))
    with counter("starting") as progress:
        progress("reading images", 2, 7)
    assert "reading images" in file.getvalue()
    assert "2/7" in file.getvalue()


def test_the_console_prints_long_lines_unbroken_and_nothing_as_markup(capsys):
    text = "[red]" + "x" * 300 + " :smile: [/] 12"
    display.console.print(text)
    assert capsys.readouterr().out == text + "\n"
