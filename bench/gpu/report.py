"""table.md: what the steps have written down, for reading. Imports nothing but what formats numbers."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from bench.tables import relative, significant
from dskd_fast import markdown

Result = dict[str, Any]


def table(summary: dict[str, Any], results: list[Result]) -> str:
    """All tables, in Markdown."""
    by_step = {step["name"]: [r for r in results if r["step"] == step["name"]] for step in summary["steps"]}
    head = "A rehearsal on a CPU: the figures mean nothing" if summary.get("rehearsal") else "Measured on a GPU"
    about = f"{head}. {summary.get('date', '')}, {significant(summary['seconds'])} s in all."
    parts = [f"# What ran\n\n{about}", _steps(summary["steps"])]
    for step in summary["steps"]:
        if found := by_step[step["name"]]:
            try:
                text = _SECTIONS[step["name"]](found) if step["name"] in _SECTIONS else ""
            except (KeyError, TypeError, ValueError, IndexError) as error:
                text = f"Results of another form than expected ({type(error).__name__}: {error}): see results.jsonl."
            if text:
                parts.append(f"## {step['title']}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def _steps(steps: list[dict[str, Any]]) -> str:
    def why(step: dict[str, Any]) -> str:
        restarts = f"{step['restarts']} restarts after crashes" if step.get("restarts") else ""
        return "; ".join(filter(None, (step.get("why", ""), restarts)))

    rows = [
        (s["title"], s["state"], _number(s.get("seconds")), _number(s.get("limit")), str(s["results"]), why(s))
        for s in steps
    ]
    return _table(("step", "state", "seconds", "of", "results", "why"), rows)


def _facts(found: list[Result]) -> str:
    lines = []
    for result in found:
        if "facts" in result:
            facts = ", ".join(f"{k} {_cell(v)}" for k, v in result["facts"].items() if v is not None)
            lines.append(f"- {result['what']}: {facts}")
        elif "tflops" in result:
            reached = f"{significant(result['tflops'])} TFLOP/s in {significant(result['ms'])} ms"
            lines.append(f"- product of {result['side']:,} x {result['side']:,}, {result['precision']}: {reached}")
        elif "gigabytes_per_second" in result:
            lines.append(f"- copy: {significant(result['gigabytes_per_second'])} GB/s, read and written")
        else:
            lines.append(f"- {result.get('what')}: {_reason(result)}")
    return "\n".join(lines)


def _built(found: list[Result]) -> str:
    return "\n".join(f"- {r.get('extension')}: {_reason(r) or r.get('library')}" for r in found)


def _errors(found: list[Result]) -> str:
    judged = [r for r in found if "passed" in r]
    bad = [r for r in found if not r.get("passed")]
    counts = Counter((r["backend"], r["passed"]) for r in judged)
    right = ", ".join(f"{name}: {counts[name, True]} right, {counts[name, False]} wrong" for name, _ in counts)
    worst: dict[tuple, list[float]] = {}
    for r in judged:
        if "errors" in r:
            # One limit, or the map's and the gradient's.
            limits = r["limit"] if isinstance(r["limit"], list) else [r["limit"]] * 2
            share = [float(e) / float(x) for pair in r["errors"].values() for e, x in zip(pair, limits, strict=True)]
            worst.setdefault((r["kind"], r["backend"], r["precision"]), []).append(max(share))
    rows = [(*key, str(len(v)), significant(100 * max(v), 2)) for key, v in worst.items()]
    heads = ("loss", "backend", "precision", "cases", "worst, % of the limit")
    notes = [f"- {_name(r)}: {_reason(r)}" for r in bad]
    return "\n\n".join([f"{right or 'nothing was compared'}.", _table(heads, rows), "\n".join(notes)]).rstrip()


def _times(found: list[Result]) -> str:
    parts = []
    groups = dict.fromkeys((tuple(r["shape"]), r["mode"]) for r in found if "shape" in r)
    for shape, mode in groups:
        rows = [r for r in found if r.get("shape") == list(shape) and r["mode"] == mode]
        eager = [r["ms"] for r in rows if (r["contestant"], r["precision"]) == ("eager", "fp32") and "ms" in r]
        base = eager[0] if eager else None
        cells = [
            (
                f"**{r['contestant']}**" if r["ours"] else r["contestant"],
                r["precision"],
                significant(r["ms"]),
                significant(r["iqr"], 2),
                f"{significant(base / r['ms'])}x" if base else "",
                _number(r.get("percent_of_product"), 2),
                significant(r["host_ms"], 2),
                significant(r["extra_bytes"] / 2**20) if r.get("extra_bytes") is not None else "",
                _cell(r.get("complaint") or ""),
            )
            for r in sorted((r for r in rows if "ms" in r), key=lambda r: r["ms"])
        ]
        heads = ("contestant", "precision", "median, ms", "quartiles apart, ms", "over eager, fp32", "% of product")
        heads += ("host, ms", "extra memory, MiB", "but")
        left_out = "".join(f"\n- {r['contestant']}, {r['precision']}: {_reason(r)}" for r in rows if "ms" not in r)
        parts.append(f"### {' x '.join(map(str, shape))}, {mode}\n\n{_table(heads, cells)}\n{left_out}".rstrip())
    return "\n\n".join(parts)


def _models(found: list[Result]) -> str:
    heads = ("mode", "contestant", "precision", "compiled", "median, ms", "quartiles apart, ms", "images/s")
    heads += ("peak memory, MiB", "host, ms", "but")
    rows = [
        (
            r.get("mode", ""),
            r.get("contestant", ""),
            r.get("precision", ""),
            "yes" if r.get("compiled") else "",
            *(_number(r.get(name)) for name in ("ms", "iqr", "images_per_second")),
            significant(r["peak_bytes"] / 2**20) if r.get("peak_bytes") else "",
            _number(r.get("host_ms")),
            _reason(r),
        )
        for r in found
    ]
    of = next((r for r in found if "teacher" in r), {})
    head = f"{of.get('teacher')}, random weights, {of.get('size')} px, batch of {of.get('batch')}."
    return f"{head}\n\n{_table(heads, rows)}"


def _training(found: list[Result]) -> str:
    epochs = [r for r in found if r.get("what") == "epoch"]
    runs = dict.fromkeys((r["device"], r["precision"]) for r in epochs)
    curves = {
        (run, name): [float(r[name]) for r in epochs if (r["device"], r["precision"]) == run]
        for run in runs
        for name in ("local_loss", "global_loss")
    }
    rows = []
    for (device, precision), name in curves:
        curve, reference = curves[(device, precision), name], curves.get((("cpu", "fp32"), name), [])
        off = [abs(a - b) / abs(b) for a, b in zip(curve, reference, strict=False) if b]
        values = ", ".join(significant(x) for x in curve)
        rows.append(
            (device, precision, name.replace("_", " "), values, f"{significant(100 * max(off), 2)} %" if off else "")
        )
    notes = [
        f"- {r.get('device')}, {r.get('precision')}: "
        + (f"{significant(r['images_per_second'])} images/s; teacher: {r['weights']}" if "weights" in r else _reason(r))
        for r in found
        if r.get("what") != "epoch"
    ]
    heads = ("device", "precision", "loss", "after each epoch", "furthest from the CPU's")
    return _table(heads, rows) + "\n\n" + "\n".join(notes)


def _trials(found: list[Result]) -> str:
    trials = [r for r in found if r.get("what") == "trial"]
    rows = [
        (
            r["precision"],
            r["kernel"],
            "x".join(map(str, r["blocks"][:3])),
            *map(str, r["blocks"][3:]),
            str(r["chunk"] or ""),
            _number(r["ms"]),
            "the table's" if r["is_in_use"] else _reason(r),
        )
        for r in sorted(trials, key=lambda r: (r["precision"], r["kernel"], r["ms"] or 1e9))
    ]
    chosen = [
        f"- {r.get('precision')}: {_reason(r) or 'fastest ' + str(r.get('chosen'))}" for r in found if r not in trials
    ]
    heads = ("precision", "kernel", "rows x keys x channels", "warps", "stages", "columns", "median, ms", "")
    return _table(heads, rows) + "\n\n" + "\n".join(chosen)


def _tests(found: list[Result]) -> str:
    ended = [r for r in found if "test" in r]
    counts = Counter(r["outcome"] for r in ended)
    text = ", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or "none ended"
    failed = [f"- FAILED {r['test']}: {_reason(r)}" for r in ended if r["outcome"] == "failed"]
    lost = [f"- {_reason(r)}" for r in found if "error" in r]
    skipped = Counter(_reason(r) for r in ended if r["outcome"] == "skipped")
    names = {r["test"] for r in ended}
    hung = [f"- begun and not ended: {r['begun']}" for r in found if "begun" in r and r["begun"] not in names]
    return "\n".join([f"{text}.", "", *failed, *lost, *hung, *(f"- skipped {n}: {why}" for why, n in skipped.items())])


_SECTIONS: dict[str, Callable[[list[Result]], str]] = {
    "build": _built,
    "device": _facts,
    "correct": _errors,
    "times": _times,
    "keys": _errors,
    "key_times": _times,
    "model": _models,
    "train": _training,
    "blocks": _trials,
    "tests": _tests,
}


def _name(result: Result) -> str:
    parts = [result.get(name) for name in ("kind", "backend", "precision", "layout", "what")]
    shape = "x".join(map(str, result.get("shape", ())))
    return ", ".join(str(part) for part in (*parts, shape) if part)


def _reason(result: Result) -> str:
    return _cell(result.get("error") or result.get("complaint") or result.get("reason") or "")


def _number(value: Any, digits: int = 3) -> str:
    return significant(value, digits) if isinstance(value, int | float) else ""


def _cell(value: Any) -> str:
    """In one line, without what Markdown takes for a column."""
    text = relative(value) if isinstance(value, float) and abs(value) < 1e-3 else str(value)
    return " ".join(text.split()).replace("|", "/")


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return markdown.table(heads, [[*map(_cell, row)] for row in rows], words=len(heads))
