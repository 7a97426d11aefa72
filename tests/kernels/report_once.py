"""Runs the report into a folder, unless another process of the same test session has: report_once.py FOLDER [all]."""

import contextlib
import sys
from pathlib import Path

from filelock import FileLock

from dskd_fast.kernels import report

KINDS = ("near", "other", "far", "keys")

all_cases = report.cases


def some_cases(architectures, precisions):
    """About a ninth of all: on every architecture one precision for each width, with one kind of row for each kernel.

    By turns, so that all widths, precisions and kinds come up on every architecture, and every precision with every
    kind. Of the kernels over positions all on one, on the others by turns every other one of those that halves are made
    by, or on the other vendor's floats.
    """
    of_others = 0
    for case in all_cases(architectures, precisions):
        if case.kernel in ("forward", "gradient"):
            width, architecture = report.WIDTHS.index(case.width), architectures.index(case.architecture)
            is_turn = (width + precisions.index(case.precision) + architecture) % len(precisions) == 0
            if is_turn and KINDS[(width + architecture // 2 + (case.kernel == "gradient")) % 4] == case.kind:
                yield case
        elif case.architecture == "sm_90":
            yield case
        elif case.precision == {"gfx942": "fp32"}.get(case.architecture, "bf16"):
            of_others += 1
            if (of_others + architectures.index(case.architecture)) % 2:
                yield case


def few_cases(architectures, precisions):
    """Every 5th of those, and all kinds of rows of one entry."""
    some = list(some_cases(architectures, precisions))
    of_one_entry = [c for c in all_cases(["sm_80"], ["bf16"]) if c.width == 64]
    return [*some[::5], *(case for case in of_one_entry if case not in some[::5])]


def main(folder, *selection):
    code = folder / "code"
    with FileLock(folder / "lock"):
        if not code.exists():
            report.cases = some_cases if selection else few_cases
            with (folder / "output.txt").open("w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
                code.write_text(str(report.main(["--json", str(folder / "rows.json")])))
    return int(code.read_text())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
