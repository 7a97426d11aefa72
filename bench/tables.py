"""`python -m bench.tables results.json`: tables and plots of a run of the benchmarks.

Reads what `pytest bench/ --benchmark-only --benchmark-json results.json` wrote, or an earlier report's results.json.
Writes benchmarks.md, the plots as SVG, and results.json with no more than these are made from, and prints the Markdown.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dskd_fast import markdown
from dskd_fast.markdown import escaped

SECTIONS = {
    "affinity": "Contextual affinity",
    "distillation": "Distillation against any keys",
    "cosine": "Cosine distance",
    "growth": "Contextual affinity as the number of positions grows",
    "dskd": "The whole model",
    "spro": "sPRO",
    "neighbours": "Nearest neighbours",
    "predict": "Images to decisions",
    "serve": "Photographs over HTTP",
    "cold": "Cold start",
}
MODES = (
    "scoring",
    "forward",
    "forward+backward",
    "training step",
    "scoring pass",
    "sPRO",
    "nearest",
    "predict",
    "serve",
    "start",
)
NOISES = ("100 %", "1 %")

NOTE = """\
The median is over all rounds of a run, the spread half of their interquartile range ("-" where there was one round).
Speed-ups are relative to the row of the same table that the head of the column names; in the tables of the losses
to calls of eager float32 that took turns with the row's own, unless one takes more than 3 s. Extra memory is what a
call needs at its peak beyond its inputs and outputs; errors are relative L2 errors against float64 at that noise
between student and teacher; "% of product" is the achieved FLOP/s as a per cent of a plain matrix product's in the
same operand type, timed after the row, where every row is credited with the operations that the formula asks for
(more than 100 where PyTorch's product is not the fastest there is). Rows of this library are in bold."""


class ReportError(Exception):
    """A user's mistake: one sentence that says what is wrong and what to do."""


class Row(NamedTuple):
    """One line of a table; times in seconds, None where it was not timed for the `reason`."""

    kind: str
    group: str
    work: str
    mode: str
    contestant: str
    precision: str | None = None
    ours: bool = False
    reference: bool = False
    shape: tuple[int, ...] | None = None
    images: int | None = None
    errors: dict[str, list[float | None]] | None = None
    extra_bytes: int | None = None
    extra_bytes_note: str | None = None
    reference_seconds: float | None = None
    percent_of_product: float | None = None
    p95_seconds: float | None = None
    median: float | None = None
    iqr: float = 0.0
    rounds: int = 0
    reason: str | None = None

    @property
    def label(self) -> str:
        return label(self.contestant, self.precision)


class Results(NamedTuple):
    """What a run's file holds: `groups` are the rows of each table, `only_full` names the tables that are not here."""

    groups: list[list[Row]]
    only_full: list[str]
    convergence: list[dict[str, Any]]
    environment: dict[str, Any]

    def timed(self, kind: str) -> list[Row]:
        """The timed rows of a kind."""
        return [row for group in self.groups for row in group if row.kind == kind and row.median]


# Reading


def read(path: Path) -> dict[str, Any]:
    """The trimmed content of a file, checked.

    Raises:
        ReportError: there is no such file, or it is of something else.
    """
    try:
        content = trim(json.loads(path.read_text(encoding="utf-8")))
        results_of(content)
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror}): give the file of --benchmark-json") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(
            f"{path} is not a result of this project's benchmarks ({type(error).__name__}: {_line(str(error))}): "
            "write it with `pytest bench/ --benchmark-only --benchmark-json`"
        ) from None
    return content


def trim(content: dict[str, Any]) -> dict[str, Any]:
    """What the report needs of pytest-benchmark's JSON, with six digits; of what is trimmed, the same."""
    if "rows" in content:
        return content
    rows = []
    for entry in content["benchmarks"]:
        stats = {name: entry["stats"][name] for name in ("median", "iqr", "rounds")}
        rows.append({"group": entry["group"], **entry["extra_info"], **stats})
    rows += content.get("not_timed", [])
    cpu = ((content.get("machine_info") or {}).get("cpu") or {}).get("brand_raw")
    trimmed = {
        "environment": content["environment"] | {"cpu": cpu},
        "only_full": content.get("only_full", []),
        "convergence": content.get("convergence", []),
        "rows": [{name: value for name, value in row.items() if value is not None} for row in rows],
    }
    return json.loads(json.dumps(trimmed), parse_float=lambda number: float(f"{float(number):.6g}"))


def results_of(content: dict[str, Any]) -> Results:
    """The content of a file, trimmed or not."""
    content = trim(content)
    groups: dict[tuple[str, str], list[Row]] = {}
    for entry in content["rows"]:
        row = Row(**entry)
        if row.kind not in SECTIONS or not (row.median or row.reason):
            raise ValueError(f"{row.contestant} has the kind {row.kind!r}, the time {row.median}")
        groups.setdefault((row.kind, row.group), []).append(row)
    for group in groups.values():
        group.sort(key=lambda row: row.median or math.inf)
    tables = sorted(groups.values(), key=_order)
    return Results(tables, content["only_full"], content["convergence"], content["environment"])


def _order(group: list[Row]) -> tuple:
    """By section, then as a person sorts labels that have numbers in them."""
    row = group[0]
    pieces = re.split(r"(\d+)", re.sub(r"(?<=\d),(?=\d{3})", "", row.work))
    natural = [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]
    mode = MODES.index(row.mode) if row.mode in MODES else len(MODES)
    return list(SECTIONS).index(row.kind), natural, tuple(row.shape or ()), mode


def label(contestant: str, precision: str | None) -> str:
    """How a contestant is called."""
    return f"{contestant}, {precision}" if precision else contestant


def reference(group: list[Row]) -> Row | None:
    """The row that a group's speed-ups are relative to."""
    return next((row for row in group if row.reference and row.median), None)


def speedup(group: list[Row], row: Row) -> float | None:
    """Of a timed row, over the reference: as that was timed in turn with it, or else in its own row."""
    base = reference(group)
    seconds = row.reference_seconds or (base.median if base else None)
    return seconds / row.median if seconds and row.median else None


# Markdown


def report(results: Results, plots: dict[str, str | None]) -> str:
    """The whole text; `plots` are file names, each with the reason if it was not drawn."""
    parts = ["# Benchmarks", _provenance(results.environment), NOTE]
    for name, reason in plots.items():
        parts.append(f"`{name}` was not drawn: {reason}." if reason else f"![{Path(name).stem}]({name})")
    if lines := [line for group in results.groups if (line := _at_a_glance(group))]:
        heads = ("", "fastest of ours", "fastest other", "speed-up", "extra memory, MiB, ours / other's")
        parts += ["## At a glance", markdown.table(heads, lines, words=3)]
    for kind, title in SECTIONS.items():
        groups = [group for group in results.groups if group[0].kind == kind]
        if groups:
            parts.append(f"## {title}")
        for group in groups:
            parts += [f"### {_title(group[0])}", table(group)]
    if results.only_full:
        parts += ["## Not in the quick run", f"`--bench-full` times these as well: {'; '.join(results.only_full)}."]
    return "\n\n".join(parts) + "\n"


def _provenance(found: dict[str, Any]) -> str:
    cpu = f"CPU {found['cpu']}" if found.get("cpu") else None
    threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)}" if found.get("threads") else None
    machine = ", ".join(escaped(str(part)) for part in (found.get("device"), cpu, threads) if part)
    names = {"python": "Python", "torch": "PyTorch", "triton": "Triton", "pykeops": "KeOps", "anomalib": "anomalib"}
    versions = ", ".join(f"{name} {escaped(str(found[key]))}" for key, name in names.items() if found.get(key))
    return (
        f"Measured on {machine} with {versions}, at commit `{found.get('commit')}`, {found.get('date')}, "
        f"by ``{_line(str(found.get('command')))}``."
    )


def _title(row: Row) -> str:
    shape = " x ".join(map(str, row.shape)) if row.shape else None
    mode = None if row.mode.lower() == row.kind else row.mode
    return ", ".join(escaped(part) for part in (row.work, shape, mode) if part)


def _at_a_glance(group: list[Row]) -> tuple[str, ...] | None:
    """The fastest of ours and of the others in a table, None if it does not have both."""
    timed = [row for row in group if row.median and row.kind != "cold"]
    ours, other = (next((row for row in timed if row.ours == is_ours), None) for is_ours in (True, False))
    if ours is None or other is None:
        return None

    def named(row: Row) -> str:
        unit, scale = _unit([row])
        return f"{escaped(row.label)}: {significant(row.median * scale)} {unit}"

    over_reference = speedup(group, ours), speedup(group, other)
    ratio = over_reference[0] / over_reference[1] if all(over_reference) else other.median / ours.median
    has_memory = ours.extra_bytes is not None and other.extra_bytes is not None
    memory = f"{_mebibytes(ours)} / {_mebibytes(other)}" if has_memory else ""
    return f"{SECTIONS[ours.kind]}: {_title(ours)}", named(ours), named(other), f"{significant(ratio)}x", memory


def table(group: list[Row]) -> str:
    """A group's table and what is to be said below it; columns with nothing in them are left out."""
    timed = [row for row in group if row.median]
    unit, scale = _unit(timed)
    base = reference(group)

    def if_timed(cell: Callable[[Row], str]) -> Callable[[Row], str]:
        return lambda row: cell(row) if row.median else ""

    def error(noise: str, which: int) -> Callable[[Row], str]:
        return lambda row: relative((row.errors or {}).get(noise, (None, None))[which])

    def median(row: Row) -> str:
        return significant(row.median * scale) if row.median else f"not timed: {escaped(row.reason)}"

    columns: dict[str, Callable[[Row], str]] = {
        "contestant": lambda row: f"**{escaped(row.contestant)}**" if row.ours else escaped(row.contestant),
        "precision": lambda row: escaped(row.precision or ""),
        f"median, {unit}": median,
        f"spread, {unit}": if_timed(lambda row: f"±{significant(row.iqr / 2 * scale, 2)}" if row.rounds > 1 else "-"),
        "images/s": if_timed(lambda row: significant(row.images / row.median) if row.images else ""),
        f"95 % of requests within, {unit}": lambda row: significant(row.p95_seconds * scale) if row.p95_seconds else "",
        f"speed-up over {escaped(base.label)}" if base else "speed-up": lambda row: (
            f"{significant(ratio)}x" if (ratio := speedup(group, row)) else ""
        ),
        "extra memory, MiB": if_timed(_mebibytes),
        **{f"error of map, {noise}": error(noise, 0) for noise in NOISES},
        **{f"error of gradient, {noise}": error(noise, 1) for noise in NOISES},
        "error of area": error("area", 0),
        "% of product": lambda row: significant(row.percent_of_product, 2) if row.percent_of_product else "",
    }
    cells = {head: [cell(row) for row in group] for head, cell in columns.items()}
    cells = {head: column for head, column in cells.items() if any(column)}
    text = markdown.table([*cells], zip(*cells.values(), strict=True), words=2 if "precision" in cells else 1)
    notes = dict.fromkeys(row.extra_bytes_note for row in timed if row.extra_bytes_note)
    return "\n\n".join([text, *(f"Extra memory was not measured: {escaped(note)}." for note in notes)])


def _mebibytes(row: Row) -> str:
    if row.extra_bytes is None:
        return ""
    return "&lt;0.01" if 0 < row.extra_bytes < 0.01 * 2**20 else significant(row.extra_bytes / 2**20)


def _unit(timed: Iterable[Row]) -> tuple[str, float]:
    return ("s", 1.0) if min((row.median for row in timed), default=0) >= 0.1 else ("ms", 1e3)


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


# Files


def write(path: Path, folder: Path) -> str:
    """Write the report of a file into a folder, all of it or nothing; returns the Markdown.

    Raises:
        ReportError: the file cannot be read, or the folder cannot be written, or matplotlib is missing.
    """
    content = read(path)
    results = results_of(content)
    try:
        from bench import plots
    except ImportError as error:
        raise ReportError(f"matplotlib cannot be imported ({_line(str(error))}): pip install matplotlib") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as name:
            unfinished = Path(name)
            text = report(results, plots.draw(results, unfinished))
            (unfinished / "benchmarks.md").write_text(text, encoding="utf-8")
            (unfinished / "results.json").write_text(_json(content), encoding="utf-8")
            if (folder / "results.json").resolve() == path.resolve():
                (unfinished / "results.json").unlink()  # the report was made from it, and it may hold more
            for file in unfinished.iterdir():
                file.replace(folder / file.name)
    except OSError as error:
        raise ReportError(f"{folder} cannot be written ({error.strerror}): give another folder with --out") from None
    return text


def _json(content: dict[str, Any]) -> str:
    """JSON with a line for each row."""
    parts = []
    for name, value in content.items():
        lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in value) if isinstance(value, list) else None
        parts.append(f"{json.dumps(name)}: " + (json.dumps(value) if lines is None else f"[\n{lines}\n]"))
    return "{" + ",\n".join(parts) + "}\n"


def main(argv: list[str] | None = None) -> int:
    """Write the report, print it, and return 2 after a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("results", type=Path, help="what --benchmark-json wrote, or an earlier report's results.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (default: that of the JSON)")
    arguments = parser.parse_args(argv)
    try:
        print(write(arguments.results, arguments.out or arguments.results.parent), end="")
    except ReportError as error:
        print(f"bench.tables: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
