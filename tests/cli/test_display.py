import io
import re

import pytest
from rich.console import Console

import dskd_fast.cli.display as display
from dskd_fast.cli.display import counter, results_table, training_progress
from dskd_fast.runs.history import Progress

LIMITS = ("0.01", "0.05", "0.1", "0.3", "1.0")


def figures(start):
    """Figures that are all different, and the text of each that the table has to show."""
    values = iter(f"0.{i:03d}" for i in range(start, start + 100))

    def three():
        return {kind: next(values) for kind in ("structural", "logical", "mean")}

    auroc, spro_at = three(), {limit: three() for limit in LIMITS}
    shown = [*auroc.values(), *(text for texts in spro_at.values() for text in texts.values())]

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
    assert len(expected) == 3 * (3 + 5 * 3)
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
        f"{measure} {kind}"
        for measure in ("AUROC", *(f"sPRO@{limit}" for limit in ("0.01", "0.05", "0.1", "0.3", "1")))
        for kind in ("structural", "logical", "mean")
    }
    assert rows["AUROC logical"] == [f"{f['auroc']['logical']:.3f}" for f in (one, other)]
    assert rows["sPRO@0.05 structural"] == [f"{f['spro']['structural']:.3f}" for f in (one, other)]
    for kind in ("structural", "logical", "mean"):
        assert rows[f"sPRO@0.3 {kind}"] == [f"{f['spro_at']['0.3'][kind]:.3f}" for f in (one, other)]


def test_an_absent_figure_is_a_dash_and_hides_no_other(monkeypatch):
    absent = dict.fromkeys(("structural", "logical", "mean"))
    spro_at = dict.fromkeys(LIMITS, absent) | {"0.3": absent | {"structural": 0.25}}
    values = {"auroc": absent | {"structural": 0.5}, "spro": absent, "spro_at": spro_at}
    lines = printed(monkeypatch, results_table("t", {"maps": values}), 80).splitlines()
    rows = {" ".join(words[:2]): words[-1] for words in (line.split() for line in lines) if len(words) == 3}
    missing = [f"{measure} {kind}" for measure in ("AUROC", "sPRO@0.05") for kind in absent]
    assert rows == dict.fromkeys(missing, "-") | {"AUROC structural": "0.500", "sPRO@0.3 structural": "0.250"}
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


def test_names_neither_steer_the_terminal_nor_forge_a_line(capsys, monkeypatch):
    name = "Straße 北京 👩\u200d🔧 \x1b]0;x\x07\r\n0 anomalous\x9b2J\u202egnp.\u2066"
    shown = r"Straße 北京 👩‍🔧 \u001b]0;x\u0007\r\n0 anomalous\u009b2J\u202egnp.\u2066"
    display.print_line(name, style="red")
    with training_progress(name) as (_, status):
        status("reading")
    assert capsys.readouterr().out == f"{shown}\n{shown}: reading\n"
    assert results_table(name, {"maps": figures(100)[0]}).title == shown
    file = io.StringIO()
    monkeypatch.setattr(display, "console", Console(file=file, width=200, force_terminal=True))
    with counter(name) as progress:
        progress(name, 1, 2)
    assert shown in file.getvalue()
    assert not {"\x9b", "\x07", "\u202e"} & set(file.getvalue())


def test_the_console_prints_long_lines_unbroken_and_nothing_as_markup(capsys):
    text = "[red]" + "x" * 300 + " :smile: [/] 12"
    display.console.print(text)
    assert capsys.readouterr().out == text + "\n"
