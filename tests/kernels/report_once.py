"""Runs the report into a folder, unless another process of the same test session has: report_once.py FOLDER [all]."""

import contextlib
import sys
from pathlib import Path

from filelock import FileLock

from dskd_fast.kernels import report

KINDS = ("near", "other", "far", "keys")
# They differ most: products of warp groups from shared memory, and another vendor's compiler.
IN_FULL = ("sm_90", "gfx942")

all_cases = report.cases


def some_cases(architectures, precisions):
    """A quarter of all: entries of the table with one kind of row each, so that in every precision each has its turn.

    Without fp16, which has bf16's blocks, and with fewer of the kernels over positions, but for two architectures.
    """
    for case in all_cases(architectures, precisions):
        in_full = case.architecture in IN_FULL
        if case.kernel in ("forward", "gradient"):
            turn = report.WIDTHS.index(case.width) + precisions.index(case.precision) + (case.kernel == "gradient")
            if KINDS[turn % 4] == case.kind and (in_full or case.precision != "fp16"):
                yield case
        elif in_full or case.precision == "bf16":
            yield case


def few_cases(architectures, precisions):
    """Every 7th of those, and all kinds of rows of one entry."""
    some = list(some_cases(architectures, precisions))
    of_one_entry = [c for c in all_cases(["sm_80"], ["bf16"]) if c.width == 64]
    return [*some[::7], *(case for case in of_one_entry if case not in some[::7])]


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
