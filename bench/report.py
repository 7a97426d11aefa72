"""`python -m bench.report results.json`: tables and plots of a run of the benchmarks.

Reads what `pytest bench/ --benchmark-only --benchmark-json results.json` wrote, writes benchmarks.md and the plots, and
prints the Markdown. Of a run that was made in parts (`-k level_1`, then others) it takes all files.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

SECTIONS = {
    "affinity": "Contextual affinity",
    "cosine": "Cosine distance",
    "growth": "Contextual affinity as the number of positions grows",
    "dskd": "The whole model",
    "spro": "sPRO",
    "cold": "Cold start",
}
MODES = ("scoring", "forward", "forward+backward", "training step", "scoring pass", "sPRO", "start")
NOISES = ("100 %", "1 %")
SPEEDUP_WORKS = tuple(f"256 px, level {level}" for level in (1, 2, 3))

NOTE = """\
The median is over all rounds of a run, the spread half of their interquartile range ("-" where there was one round).
Speed-ups are relative to the row of the same table that the head of the column names; in the tables of the losses
to calls of eager float32 that took turns with the row's own, unless one takes more than 3 s. Extra memory is what a
call needs at its peak beyond its inputs and outputs; errors are relative L2 errors against float64 at that noise
between student and teacher; "% of product" is the achieved FLOP/s as a per cent of a plain matrix product's in the
same operand type, where every row is credited with the operations that the formula asks for (more than 100 where
PyTorch's product is not the fastest there is). That product is timed again after each row: the wider its span below
a table, the more the machine's own speed has changed between rows. Rows of this library are in bold."""

OURS_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499")
OTHER_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#CC79A7", "#888888")
MARKERS = "osD^vP*X<>ph"
DASHES = ("-", "--", ":", "-.")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "dskd-fast",
}


class ReportError(Exception):
    """A user's mistake: one sentence that says what is wrong and what to do."""


class Row(NamedTuple):
    """One line of a table, timed or not; times in seconds, `reason` only where it was not timed."""

    kind: str
    group: str
    work: str
    shape: tuple[int, ...] | None
    mode: str
    contestant: str
    precision: str | None
    ours: bool
    reason: str | None = None
    reference: bool = False
    median: float = math.nan
    iqr: float = math.nan
    rounds: int = 0
    images: int | None = None
    errors: dict[str, tuple[float | None, float | None]] | None = None
    extra_bytes: int | None = None
    extra_bytes_note: str | None = None
    reference_seconds: float | None = None
    product_seconds: float | None = None
    percent_of_product: float | None = None

    @property
    def label(self) -> str:
        return f"{self.contestant}, {self.precision}" if self.precision else self.contestant

    @property
    def positions(self) -> int | None:
        """N, from the shape or else from the work's label."""
        if self.shape:
            return self.shape[-2] * self.shape[-1]
        found = re.fullmatch(r"N = ([\d,]+)", self.work)
        return int(found[1].replace(",", "")) if found else None


class Point(NamedTuple):
    """An error of the KL map at a noise."""

    noise: float
    contestant: str
    precision: str | None
    ours: bool
    error: float | None

    label = Row.label


class Results(NamedTuple):
    """What the file of one run holds; `groups` are the rows of each table, `only_full` one of each that is not here."""

    groups: list[list[Row]]
    only_full: list[Row]
    convergence: list[Point]
    environment: dict[str, Any]
    cpu: str | None


# Reading


def load(paths: list[Path]) -> Results:
    """Read the JSON of a run, or of the parts of one: what several have is taken from the last that timed it."""
    parts = [_read(path) for path in paths]
    first = parts[0]
    for path, part in zip(paths, parts, strict=True):
        if differing := _differences(first, part):
            name, (one, other) = next(iter(differing.items()))
            raise ReportError(
                f"{paths[0]} was measured with {name} {one}, {path} with {other}: "
                "give files of one machine, with the same versions and commit"
            )
    rows = [row for part in parts for group in part.groups for row in group]
    rows.sort(key=lambda row: row.reason is None)
    groups = _grouped({(row.kind, row.group, row.label): row for row in rows}.values())
    there = {_identity(group[0]) for group in groups}
    only_full = {_identity(row): row for part in parts for row in part.only_full if _identity(row) not in there}
    told = {
        name: dict.fromkeys(str(part.environment.get(name) or "") for part in parts) for name in ("command", "date")
    }
    return first._replace(
        groups=groups,
        only_full=sorted(only_full.values(), key=lambda row: _order([row])),
        convergence=next((part.convergence for part in reversed(parts) if part.convergence), []),
        environment=first.environment | {"command": " && ".join(told["command"]), "date": ", ".join(told["date"])},
    )


def _differences(one: Results, other: Results) -> dict[str, tuple[Any, Any]]:
    """What two runs differ in that may not differ between parts of one, in both."""
    found = {
        name: (one.environment.get(name), other.environment.get(name))
        for name in {**one.environment, **other.environment}
        if name not in ("command", "date")
    }
    found["the processor"] = one.cpu, other.cpu
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def _identity(row: Row) -> tuple:
    return row.kind, row.work, row.shape, row.mode


def _read(path: Path) -> Results:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ReportError(
            f"{path} does not exist: write it with `pytest bench/ --benchmark-only --benchmark-json {path}`"
        ) from None
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror}): give the file of --benchmark-json") from None
    except UnicodeDecodeError:
        raise ReportError(f"{path} is not JSON: give the file of --benchmark-json") from None
    if not text.strip():
        raise ReportError(f"{path} is empty, as pytest-benchmark leaves it where nothing was timed: run it again")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ReportError(f"{path} is not JSON: give the file of --benchmark-json") from None
    try:
        return results_of(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ReportError(
            f"{path} is not a result of this project's benchmarks ({_line(what)}): "
            "write it with `pytest bench/ --benchmark-only --benchmark-json`"
        ) from None


def results_of(content: dict[str, Any]) -> Results:
    rows = [_timed(entry) for entry in content["benchmarks"]]
    rows += [
        _row(entry, group=entry["group"], reason=str(entry["reason"]), errors=_errors(entry))
        for entry in content.get("not_timed") or ()
    ]
    only_full = [_row(entry, group=None) for entry in content.get("only_full") or ()]
    convergence = [
        Point(float(p["noise"]), str(p["contestant"]), p["precision"], bool(p["ours"]), _number(p["error"]))
        for p in content.get("convergence") or ()
    ]
    environment = dict(content["environment"])
    cpu = ((content.get("machine_info") or {}).get("cpu") or {}).get("brand_raw")
    only_full.sort(key=lambda row: _order([row]))
    return Results(_grouped(rows), only_full, convergence, environment, cpu)


def _grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each table, the fastest first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.group), []).append(row)
    for group in groups.values():
        # Stable, and what was not timed stays last.
        group.sort(key=lambda row: row.median if row.reason is None else math.inf)
    return sorted(groups.values(), key=_order)


def _timed(entry: dict[str, Any]) -> Row:
    extra, stats = entry["extra_info"], entry["stats"]
    median = float(stats["median"])
    if not 0 < median < math.inf:
        raise ValueError(f"the median of {entry['name']} is {median}")
    return _row(
        extra,
        group=entry["group"],
        reference=bool(extra.get("reference")),
        median=median,
        iqr=float(stats["iqr"]),
        rounds=int(stats["rounds"]),
        images=extra.get("images"),
        errors=_errors(extra),
        extra_bytes=extra.get("extra_bytes"),
        extra_bytes_note=extra.get("extra_bytes_note"),
        reference_seconds=_number(extra.get("reference_seconds")),
        product_seconds=_number(extra.get("product_seconds")),
        percent_of_product=_number(extra.get("percent_of_product")),
    )


def _errors(extra: dict[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    return {noise: (_number(pair[0]), _number(pair[1])) for noise, pair in (extra.get("errors") or {}).items() if pair}


def _row(extra: dict[str, Any], group: str | None, **values: Any) -> Row:
    if extra["kind"] not in SECTIONS:
        raise ValueError(f"{extra['kind']!r} is not a kind")
    work, mode = str(extra["work"]), str(extra["mode"])
    shape = tuple(int(size) for size in extra["shape"]) if extra["shape"] else None
    group = group or f"{work} {shape} {mode}"
    names = str(extra["contestant"]), extra["precision"]
    return Row(extra["kind"], group, work, shape, mode, *names, bool(extra["ours"]), **values)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _order(group: list[Row]) -> tuple:
    """By section, then as a person sorts labels that have numbers in them."""
    row = group[0]
    pieces = re.split(r"(\d+)", re.sub(r"(?<=\d),(?=\d{3})", "", row.work))
    natural = [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]
    mode = MODES.index(row.mode) if row.mode in MODES else len(MODES)
    return list(SECTIONS).index(row.kind), natural, row.shape or (), mode


def reference(group: list[Row]) -> Row | None:
    """The row that a group's speed-ups are relative to."""
    return next((row for row in group if row.reference), None)


# Markdown


def markdown(results: Results, plots: dict[str, str | None]) -> str:
    """The whole text; `plots` are file names, each with the reason if it was not drawn."""
    parts = ["# Benchmarks", _provenance(results), NOTE]
    for name, reason in plots.items():
        title = Path(name).stem
        parts.append(f"`{name}` was not drawn: {reason}." if reason else f"![{title}]({name})")
    if lines := [line for group in results.groups if (line := _at_a_glance(group))]:
        heads = ("", "fastest of ours", "fastest other", "speed-up", "extra memory, MiB, ours / other's")
        ruler = ("---", "---", "---", "---:", "---:")
        parts += ["## At a glance", "\n".join(map(_line_of, (heads, ruler, *lines)))]
    for kind, title in SECTIONS.items():
        groups = [group for group in results.groups if group[0].kind == kind]
        if groups:
            parts.append(f"## {title}")
        for group in groups:
            parts += [f"### {_title(group[0])}", table(group)]
    if results.only_full:
        parts += ["## Not in the quick run", "`--bench-full` times these as well:", _only_full(results.only_full)]
    return "\n\n".join(parts) + "\n"


def _provenance(results: Results) -> str:
    found = results.environment
    threads = f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}" if found.get("threads") else None
    cpu = f"CPU {results.cpu}" if results.cpu and results.cpu != found.get("device") else None
    machine = ", ".join(_escape(str(part)) for part in (found.get("device"), cpu, threads) if part)
    names = {"python": "Python", "torch": "PyTorch", "triton": "Triton", "pykeops": "KeOps", "anomalib": "anomalib"}
    versions = ", ".join(f"{name} {_escape(str(found[key]))}" for key, name in names.items() if found.get(key))
    text = f"Measured on {machine or 'an unknown machine'}"
    text += f" with {versions}" if versions else ""
    text += f", at commit {_code(found['commit'])}" if found.get("commit") else ""
    text += f", {_escape(str(found['date']))}" if found.get("date") else ""
    return text + (f", by {_code(found['command'])}." if found.get("command") else ".")


def _title(row: Row) -> str:
    return _work(row) if row.mode.lower() == row.kind else f"{_work(row)}, {_escape(row.mode)}"


def _work(row: Row) -> str:
    shape = " x ".join(map(str, row.shape)) if row.shape else None
    return ", ".join(_escape(part) for part in (row.work, shape) if part)


def _only_full(rows: list[Row]) -> str:
    """A line for each section, with the modes of each work."""
    modes: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        modes.setdefault(row.kind, {}).setdefault(_work(row), []).append(_escape(row.mode))
    lines = []
    for kind, works in modes.items():
        told = "; ".join(f"{work} ({', '.join(found)})" for work, found in works.items())
        lines.append(f"- {SECTIONS[kind]}: {told}")
    return "\n".join(lines)


def _at_a_glance(group: list[Row]) -> tuple[str, ...] | None:
    """The fastest of ours and of the others in a table, None if it does not have both."""
    timed = [row for row in group if row.reason is None and row.kind != "cold"]
    ours, other = (next((row for row in timed if row.ours == is_ours), None) for is_ours in (True, False))
    if ours is None or other is None:
        return None

    def told(row: Row) -> str:
        unit, scale = _unit([row.median])
        return f"{_escape(row.label)}: {significant(row.median * scale)} {unit}"

    over_reference = _speedup(group, ours), _speedup(group, other)
    ratio = over_reference[0] / over_reference[1] if all(over_reference) else other.median / ours.median
    has_memory = ours.extra_bytes is not None and other.extra_bytes is not None
    memory = f"{_mebibytes(ours.extra_bytes)} / {_mebibytes(other.extra_bytes)}" if has_memory else ""
    title = f"{SECTIONS[ours.kind]}: {_title(ours)}"
    return title, told(ours), told(other), f"{significant(ratio)}x", memory


def table(group: list[Row]) -> str:
    """A group's table and what is to be said below it; columns with nothing in them are left out."""
    timed = [row for row in group if row.reason is None]
    unit, scale = _unit(row.median for row in timed)
    base = reference(group)
    has_memory = any(row.extra_bytes is not None for row in timed)
    notes: dict[str, str] = {}

    def median(row: Row) -> str:
        return f"not timed: {_escape(row.reason)}" if row.reason is not None else significant(row.median * scale)

    def spread(row: Row) -> str:
        return f"±{significant(row.iqr / 2 * scale, 2)}" if row.rounds > 1 else "-"

    def speed_up(row: Row) -> str:
        ratio = _speedup(group, row)
        return f"{significant(ratio)}x" if ratio else ""

    def memory(row: Row) -> str:
        if row.extra_bytes is None:
            return f"- {_mark(notes, row.extra_bytes_note)}" if row.extra_bytes_note and has_memory else ""
        return _mebibytes(row.extra_bytes)

    def error(noise: str, which: int) -> Callable[[Row], str]:
        return lambda row: relative((row.errors or {}).get(noise, (None, None))[which])

    columns: dict[str, Callable[[Row], str]] = {
        "contestant": lambda row: f"**{_escape(row.contestant)}**" if row.ours else _escape(row.contestant),
        "precision": lambda row: _escape(row.precision or ""),
        f"median, {unit}" if timed else "median": median,
        f"spread, {unit}": _if_timed(spread),
        "images/s": _if_timed(lambda row: significant(row.images / row.median) if row.images else ""),
        f"speed-up over {_escape(base.label)}" if base else "speed-up": speed_up,
        "extra memory, MiB": _if_timed(memory),
        **{f"error of map, {noise}": error(noise, 0) for noise in NOISES},
        **{f"error of gradient, {noise}": error(noise, 1) for noise in NOISES},
        "error of area": error("area", 0),
        "% of product": _if_timed(
            lambda row: "" if row.percent_of_product is None else significant(row.percent_of_product, 2)
        ),
    }
    cells = {head: [cell(row) for row in group] for head, cell in columns.items()}
    cells = {head: column for head, column in cells.items() if any(column)}
    lines = [_line_of(cells), _line_of("---" if head in ("contestant", "precision") else "---:" for head in cells)]
    lines += [_line_of(row) for row in zip(*cells.values(), strict=True)]
    return "\n\n".join(["\n".join(lines), *_below(timed, notes, has_memory, unit, scale)])


def _below(timed: list[Row], notes: dict[str, str], has_memory: bool, unit: str, scale: float) -> list[str]:
    found = [f"{mark} {_escape(note)}." for note, mark in notes.items()]
    reasons = dict.fromkeys(row.extra_bytes_note for row in timed if row.extra_bytes_note)
    if reasons and not has_memory:
        found.append(f"Extra memory was not measured: {'; '.join(map(_escape, reasons))}.")
    products: dict[str, list[float]] = {}
    for row in timed:
        if row.product_seconds is not None:
            products.setdefault(row.precision or "the same type", []).append(row.product_seconds)
    if products:
        times = []
        for precision, seconds in sorted(products.items()):
            span = dict.fromkeys(significant(end * scale) for end in (min(seconds), max(seconds)))
            times.append(f"{' to '.join(span)} {unit} in {_escape(precision)}")
        found.append(f"One N x N x C matrix product, timed after each row, takes {', '.join(times)}.")
    return found


def _mebibytes(count: int) -> str:
    return "&lt;0.01" if 0 < count < 0.01 * 2**20 else significant(count / 2**20)


def _if_timed(cell: Callable[[Row], str]) -> Callable[[Row], str]:
    return lambda row: cell(row) if row.reason is None else ""


def _mark(notes: dict[str, str], note: str) -> str:
    return notes.setdefault(note, f"({len(notes) + 1})")


def _unit(seconds: Iterable[float]) -> tuple[str, float]:
    return ("s", 1.0) if min(seconds, default=0) >= 0.1 else ("ms", 1e3)


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, never in exponent notation."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, decimals)
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))  # 9.996 has become 10
    return f"{rounded:,.{max(decimals, 0)}f}"


def relative(error: float | None) -> str:
    """A relative error with two significant digits."""
    if error is None:
        return ""
    if error == 0 or 0.01 <= abs(error) < 100 or not math.isfinite(error):
        return significant(error, 2)
    mantissa, exponent = f"{error:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _line(text: str) -> str:
    return " ".join(text.split())


def _escape(text: str) -> str:
    return re.sub(r"([\\|*`])", r"\\\1", _line(text)).replace("<", "&lt;")


def _code(text: str) -> str:
    fence = "``" if "`" in str(text) else "`"
    return f"{fence}{_line(str(text))}{fence}"


def _line_of(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


# Plots: each takes the results and the styles of all lines, and returns a figure, or why there is none


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, sharey=True)


def line_styles(results: Results) -> dict[str, dict[str, Any]]:
    """How each contestant in each precision is drawn, the same in all plots that have lines."""
    rows = [row for group in results.groups for row in group if row.kind == "growth"]
    found = sorted(
        {(row.ours, row.contestant, row.label) for row in rows if row.reason is None}
        | {(point.ours, point.contestant, point.label) for point in results.convergence}
    )
    backends: dict[str, list[str]] = {}
    for ours, contestant, label in found:
        if ours:
            backends.setdefault(contestant, []).append(label)
    others = [label for ours, _, label in found if not ours]
    styles = {}
    # Ours have a colour for each backend and dashes for each precision.
    for i, labels in enumerate(backends.values()):
        for turn, label in enumerate(labels):
            style = _style(OURS_COLOURS, i, turn, len(styles))
            styles[label] = style | {"linewidth": 2.1, "markersize": 5, "zorder": 4}
    for i, label in enumerate(others):
        style = _style(OTHER_COLOURS, i, i // len(OTHER_COLOURS), i)
        styles[label] = style | {"linewidth": 1.1, "markersize": 4, "zorder": 3}
    return styles


def _style(palette: tuple[str, ...], colour: int, dashes: int, marker: int) -> dict[str, Any]:
    return {
        "color": palette[colour % len(palette)],
        "linestyle": DASHES[dashes % len(DASHES)],
        "marker": MARKERS[marker % len(MARKERS)],
    }


def _draw_lines(axes: Any, lines: dict[str, list[tuple[float, float]]], styles: dict[str, dict[str, Any]]) -> None:
    """The lines with a logarithmic scale for both, and a legend in the order of their ends."""
    for label, points in sorted(lines.items(), key=lambda line: -max(line[1])[1]):
        axes.plot(*zip(*sorted(points), strict=True), label=label, **styles[label])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()


def _legend(axes: Any) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0, handlelength=3.2)


def plot_convergence(results: Results, styles: dict[str, dict[str, Any]]) -> Any:
    """The error of the KL map as the student comes closer to its teacher."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in results.convergence:
        if _drawable(point.noise) and _drawable(point.error):
            lines.setdefault(point.label, []).append((1 / point.noise, point.error))
    if not lines:
        return "the file has no errors of the KL map at several noises"
    figure, axes = _figure(8.4, 4.2)
    _draw_lines(axes, lines, styles)
    axes.axhline(1, color="#666666", linewidth=1, linestyle=(0, (1, 2)))
    axes.annotate(
        "error = value: nothing but noise",
        (0.01, 1),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        color="#666666",
        fontsize=8,
    )
    # Of the inverse, so that the order of the lines' ends is their order on the right.
    noises = sorted({x for points in lines.values() for x, _ in points})
    if len(noises) > 8:
        noises = [x for x in noises if math.isclose(math.log10(x), round(math.log10(x)), abs_tol=1e-6)]
    axes.set_xticks(noises, [f"{100 / x:.3g} %" for x in noises])
    axes.set_xlabel("noise between student and teacher (training goes to the right)")
    axes.set_ylabel("relative error of the KL map")
    axes.set_title("Error of the loss as the student converges")
    _legend(axes)
    return figure


def plot_time(results: Results, styles: dict[str, dict[str, Any]]) -> Any:
    """Time against the number of positions."""
    return _plot_growth(results, styles, "Time", lambda row: row.median * 1e3, "median, ms", "times")


def plot_memory(results: Results, styles: dict[str, dict[str, Any]]) -> Any:
    """Extra memory against the number of positions."""

    def mebibytes(row: Row) -> float | None:
        return None if row.extra_bytes is None else row.extra_bytes / 2**20

    return _plot_growth(results, styles, "Extra memory", mebibytes, "extra memory, MiB", "extra memory")


def _plot_growth(
    results: Results,
    styles: dict[str, dict[str, Any]],
    title: str,
    value: Callable[[Row], float | None],
    axis: str,
    what: str,
) -> Any:
    rows = [row for group in results.groups for row in group if row.kind == "growth" and row.reason is None]
    rows = [row for row in rows if row.positions and _drawable(value(row))]
    if not rows:
        return f"the file has no {what} of a growing number of positions"
    modes = {row.mode for row in rows}
    mode = "forward+backward" if "forward+backward" in modes else min(modes)
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.mode == mode:
            lines.setdefault(row.label, []).append((row.positions, value(row)))
    figure, axes = _figure(8.4, 4.2)
    _draw_lines(axes, lines, styles)
    limits = axes.get_ylim()
    counts = sorted({x for points in lines.values() for x, _ in points})
    factor = 1.6 * max(y / x**2 for x, y in map(max, lines.values()) if x == counts[-1])
    axes.plot(counts, [factor * x**2 for x in counts], color="#999999", linewidth=0.7, label="grows as N²", zorder=1)
    axes.set_ylim(limits)
    axes.set_xticks(counts, [f"{x:,}" for x in counts])
    axes.set_xlabel("N, positions")
    axes.set_ylabel(axis)
    axes.set_title(f"{title} of the contextual affinity, {mode}")
    _legend(axes)
    return figure


def plot_speedup(results: Results, styles: dict[str, dict[str, Any]]) -> Any:
    """Bars of the speed-ups at the three levels of a 256 px image."""
    panels = {work: group for work in SPEEDUP_WORKS if (group := _speedup_group(results, work))}
    if not panels:
        return f"the file has no times of {SPEEDUP_WORKS[0]} to 3, forward+backward, with a reference"
    ratios = {work: {row.label: _speedup(group, row) for row in group} for work, group in panels.items()}
    labels = list(dict.fromkeys(row.label for group in panels.values() for row in group if row.reason is None))
    ours = {row.label for group in panels.values() for row in group if row.ours}
    figure, all_axes = _figure(1.6 + 2.6 * len(panels), 1.1 + 0.24 * len(labels), len(panels))
    for axes, (work, group) in zip([all_axes] if len(panels) == 1 else all_axes, panels.items(), strict=True):
        longest = max(ratio for ratio in ratios[work].values() if ratio)
        for y, label in enumerate(labels):
            ratio = ratios[work].get(label)
            if ratio:
                axes.barh(y, ratio, height=0.72, color="#0072B2" if label in ours else "#b8bcc2")
            text = significant(ratio, 2) if ratio else "not timed"
            weight = "bold" if label in ours and ratio else "normal"
            axes.text(
                max(ratio or 0, 1) + 0.02 * longest, y, text, va="center", fontsize=8, weight=weight, color="#222222"
            )
        axes.axvline(1, color="#222222", linewidth=1)
        axes.set_xlim(0, 1.2 * max(longest, 1))
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_title(f"{work}\n{' x '.join(map(str, group[0].shape or ()))}", fontsize=9)
        axes.set_xlabel(f"speed-up over {reference(group).label}")
        for tick in axes.get_yticklabels():
            tick.set_fontweight("bold" if tick.get_text() in ours else "normal")
    figure.axes[0].set_ylim(len(labels) - 0.4, -0.6)
    return figure


def _speedup_group(results: Results, work: str) -> list[Row] | None:
    """The group of a work with most timed rows, of these the one with the largest shape."""
    groups = [group for group in results.groups if group[0].kind == "affinity" and group[0].work == work]
    groups = [group for group in groups if group[0].mode == "forward+backward" and reference(group)]
    return max(groups, key=lambda group: (sum(row.reason is None for row in group), group[0].shape or ()), default=None)


def _speedup(group: list[Row], row: Row) -> float | None:
    """Of a timed row, over the reference: as that was timed in turn with it, or else in its own row."""
    base = reference(group)
    seconds = row.reference_seconds or (base.median if base else None)
    return seconds / row.median if seconds and row.reason is None else None


def _drawable(value: float | None) -> bool:
    return value is not None and 0 < value < math.inf


PLOTS = {"convergence": plot_convergence, "time": plot_time, "memory": plot_memory, "speedup": plot_speedup}


# Files


def write(results: Results, folder: Path, suffix: str | None) -> str:
    """Write the Markdown and, with a suffix, the plots of that format; returns the Markdown."""
    if suffix:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise ReportError(
                f"matplotlib cannot be imported ({_line(str(error))}): `pip install matplotlib`, or give --no-plots"
            ) from None
    temporaries: dict[Path, Path] = {}

    def temporary(name: str) -> Path:
        return temporaries.setdefault(folder / name, folder / f".{name}.{os.getpid()}.tmp")

    try:
        folder.mkdir(parents=True, exist_ok=True)
        plots = _draw(results, suffix, temporary) if suffix else {}
        text = markdown(results, plots)
        temporary("benchmarks.md").write_text(text, encoding="utf-8")
        for path, unfinished in temporaries.items():
            unfinished.replace(path)
    except OSError as error:
        raise ReportError(f"{folder} cannot be written ({error.strerror}): give another folder with --out") from None
    finally:
        for unfinished in temporaries.values():
            if folder.is_dir():
                unfinished.unlink(missing_ok=True)
    return text


def _draw(results: Results, suffix: str, temporary: Callable[[str], Path]) -> dict[str, str | None]:
    import matplotlib

    styles = line_styles(results)
    plots: dict[str, str | None] = {}
    with matplotlib.rc_context(STYLE):
        for stem, plot in PLOTS.items():
            name = f"{stem}.{suffix}"
            found = plot(results, styles)
            plots[name] = found if isinstance(found, str) else None
            if not plots[name]:
                # Without a date, so that the same run gives the same file.
                metadata = {"Date": None} if suffix == "svg" else None
                found.savefig(temporary(name), format=suffix, dpi=160, metadata=metadata)
    return plots


def main(argv: list[str] | None = None) -> int:
    """Write the report, print it, and return 2 after a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="what --benchmark-json wrote, for a run or its parts")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (default: that of the JSON)")
    parser.add_argument("--format", choices=("png", "svg"), default="svg", help="of the plots (default: svg)")
    parser.add_argument("--no-plots", action="store_true", help="tables only, for which matplotlib is not needed")
    arguments = parser.parse_args(argv)
    try:
        results = load(arguments.results)
        folder = arguments.out or arguments.results[0].parent
        text = write(results, folder, None if arguments.no_plots else arguments.format)
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
