"""The plots of a report: each takes the results and the lines' styles, and returns a figure or why there is none."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bench.tables import Results, Row, label, reference, significant, speedup

_LEVELS = tuple(f"256 px, level {level}" for level in (1, 2, 3))
_OURS_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499")
_OTHER_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#CC79A7", "#888888")
_MARKERS = "osD^vP*X<>ph"
_DASHES = ("-", "--", ":", "-.")
_STYLE = {
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
    "svg.hashsalt": "dskd-fast",
}


def draw(results: Results, folder: Path) -> dict[str, str | None]:
    """Write all plots into a folder; returns their names, each with the reason if it was not drawn."""
    found = {}
    styles = _line_styles(results)
    with matplotlib.rc_context(_STYLE):
        for name, plot in PLOTS.items():
            figure = plot(results, styles)
            found[f"{name}.svg"] = figure if isinstance(figure, str) else None
            if not isinstance(figure, str):
                # Without a date, so that the same run gives the same file.
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return found


def _line_styles(results: Results) -> dict[str, dict[str, Any]]:
    """How each contestant in each precision is drawn: ours with a colour a backend and dashes a precision."""
    found = sorted(
        {(row.ours, row.contestant, row.label) for row in results.timed("growth")}
        | {(p["ours"], p["contestant"], label(p["contestant"], p["precision"])) for p in results.convergence}
    )
    turns: dict[tuple[bool, str], int] = {}
    styles = {}
    for ours, contestant, name in found:
        turn = turns[ours, contestant] = turns.get((ours, contestant), -1) + 1
        colour = sum(is_ours == ours for is_ours, _ in turns) - 1
        palette = _OURS_COLOURS if ours else _OTHER_COLOURS
        styles[name] = {
            "color": palette[colour % len(palette)],
            "linestyle": _DASHES[turn % len(_DASHES)],
            "marker": _MARKERS[len(styles) % len(_MARKERS)],
            "linewidth": 2.1 if ours else 1.1,
            "zorder": 4 if ours else 3,
        }
    return styles


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, sharey=True, squeeze=False)[0]


def _lines(axes: Any, lines: dict[str, list[tuple[float, float]]], styles: dict[str, dict[str, Any]]) -> None:
    """The lines with a logarithmic scale for both, in the order of their ends."""
    for name, points in sorted(lines.items(), key=lambda line: -max(line[1])[1]):
        axes.plot(*zip(*sorted(points), strict=True), label=name, markersize=4.5, **styles[name])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()


def _legend(axes: Any) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0, handlelength=3.2)


def _convergence(results: Results, styles: dict[str, dict[str, Any]]) -> Figure | str:
    """The error of the KL map as the student comes closer to its teacher."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in results.convergence:
        if point["error"] and math.isfinite(point["error"]):
            name = label(point["contestant"], point["precision"])
            lines.setdefault(name, []).append((1 / point["noise"], point["error"]))
    if not lines:
        return "the file has no errors of the KL map at several noises"
    figure, (axes,) = _figure(8.4, 4.2)
    _lines(axes, lines, styles)
    axes.axhline(1, color="#666666", linewidth=1, linestyle=(0, (1, 2)))
    place = {"xycoords": axes.get_yaxis_transform(), "xytext": (0, 3), "textcoords": "offset points"}
    axes.annotate("error = value: nothing but noise", (0.01, 1), color="#666666", fontsize=8, **place)
    # Of the inverse, so that the order of the lines' ends is their order on the right.
    noises = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(noises, [f"{100 / x:.3g} %" for x in noises])
    axes.set_xlabel("noise between student and teacher (training goes to the right)")
    axes.set_ylabel("relative error of the KL map")
    axes.set_title("Error of the loss as the student converges")
    _legend(axes)
    return figure


def _time(results: Results, styles: dict[str, dict[str, Any]]) -> Figure | str:
    return _growth(results, styles, "Time", "median, ms", lambda row: row.median * 1e3)


def _memory(results: Results, styles: dict[str, dict[str, Any]]) -> Figure | str:
    return _growth(results, styles, "Extra memory", "extra memory, MiB", lambda row: (row.extra_bytes or 0) / 2**20)


def _growth(
    results: Results, styles: dict[str, dict[str, Any]], title: str, axis: str, value: Callable[[Row], float]
) -> Figure | str:
    """Something against the number of positions."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in results.timed("growth"):
        if value(row) > 0:
            lines.setdefault(row.label, []).append((math.prod(row.shape[2:]), value(row)))
    if not lines:
        return f"the file has no {title.lower()} of a growing number of positions"
    figure, (axes,) = _figure(8.4, 4.2)
    _lines(axes, lines, styles)
    limits = axes.get_ylim()
    counts = sorted({x for points in lines.values() for x, _ in points})
    factor = 1.6 * max(y / x**2 for x, y in map(max, lines.values()) if x == counts[-1])
    axes.plot(counts, [factor * x**2 for x in counts], color="#999999", linewidth=0.7, label="grows as N²", zorder=1)
    axes.set_ylim(limits)
    axes.set_xticks(counts, [f"{x:,}" for x in counts])
    axes.set_xlabel("N, positions")
    axes.set_ylabel(axis)
    axes.set_title(f"{title} of the contextual affinity, forward+backward")
    _legend(axes)
    return figure


def _speedup(results: Results, styles: dict[str, dict[str, Any]]) -> Figure | str:
    """Bars of the speed-ups at the three levels of a 256 px image."""
    panels = {work: group for work in _LEVELS if (group := _level(results, work))}
    if not panels:
        return f"the file has no times of {_LEVELS[0]} to 3, forward+backward, with a reference"
    labels = list(dict.fromkeys(row.label for group in panels.values() for row in group if row.median))
    ours = {row.label for group in panels.values() for row in group if row.ours}
    figure, all_axes = _figure(1.6 + 2.6 * len(panels), 1.1 + 0.24 * len(labels), len(panels))
    for axes, (work, group) in zip(all_axes, panels.items(), strict=True):
        ratios = {row.label: ratio for row in group if (ratio := speedup(group, row))}
        longest = max(1, *ratios.values())
        for y, name in enumerate(labels):
            ratio = ratios.get(name, 0)
            axes.barh(y, ratio, height=0.72, color="#0072B2" if name in ours else "#b8bcc2")
            text = significant(ratio, 2) if ratio else "not timed"
            weight = "bold" if name in ours and ratio else "normal"
            axes.text(max(ratio, 1) + 0.02 * longest, y, text, va="center", fontsize=8, weight=weight)
        axes.axvline(1, color="#222222", linewidth=1)
        axes.set_xlim(0, 1.2 * longest)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_title(f"{work}\n{' x '.join(map(str, group[0].shape))}", fontsize=9)
        axes.set_xlabel(f"speed-up over {reference(group).label}")
        for tick in axes.get_yticklabels():
            tick.set_fontweight("bold" if tick.get_text() in ours else "normal")
    all_axes[0].set_ylim(len(labels) - 0.4, -0.6)
    return figure


def _level(results: Results, work: str) -> list[Row] | None:
    """The table of a level, with the gradient, that has most timed rows."""
    tables = [group for group in results.groups if (group[0].kind, group[0].work) == ("affinity", work)]
    tables = [group for group in tables if group[0].mode == "forward+backward" and reference(group)]
    return max(tables, key=lambda group: sum(row.median is not None for row in group), default=None)


PLOTS = {"convergence": _convergence, "time": _time, "memory": _memory, "speedup": _speedup}
