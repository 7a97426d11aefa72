"""What people see: progress bars and tables."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dskd_fast.cli.doctor import Service
from dskd_fast.files import printable
from dskd_fast.metrics.spro import FPR_LIMITS
from dskd_fast.runs.history import Progress as TrainingState
from dskd_fast.training.distributed import is_launched

# What is printed is mostly paths: brackets and colons in them are not markup, and a line break would spoil them.
console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_line(text: str = "", style: str | None = None) -> None:
    """Print one line; what in it would steer the terminal, as a file's name may hold it, is escaped."""
    console.print(printable(text), style=style)


@contextmanager
def training_progress(title: str = "") -> Iterator[tuple[Callable[[TrainingState], None], Callable[[str], None]]]:
    """Yields (report, status) for `train`: a bar on a terminal, a line now and then elsewhere.

    Several processes share one terminal: they write lines, which begin with `title`.
    """
    has_bar = console.is_terminal and not is_launched()
    prefix = f"{title}: " if title else ""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        disable=not has_bar,
    )
    task = None
    told = 0

    def report(state: TrainingState) -> None:
        nonlocal task, told
        figures = [] if state.local_loss is None else [f"local {state.local_loss:.4f}"]
        figures += [] if state.global_loss is None else [f"global {state.global_loss:.3e}"]
        losses = "  ".join([*figures, f"{state.images_per_second:.1f} images/s"])
        if has_bar:
            if task is None:
                task = bar.add_task("training", total=state.steps, losses="")
            bar.update(task, completed=state.step, losses=losses, description=f"epoch {state.epoch}")
        elif state.step * 10 // state.steps > told:
            told = state.step * 10 // state.steps
            print_line(f"{prefix}step {state.step}/{state.steps}  epoch {state.epoch}  {losses}")

    def status(text: str) -> None:
        print_line(prefix + text)

    with bar:
        yield report, status


@contextmanager
def counter(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yields progress(stage, done, total): one bar, restarted for each stage; nothing where there is no terminal."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(printable(title), total=None)

    def progress(stage: str, done: int, total: int) -> None:
        bar.update(task, description=printable(stage), completed=done, total=total)

    with bar:
        yield progress


def backends_table(services: Iterable[Service]) -> Table:
    """Which backends serve which calls, and why the others do not."""
    table = Table(title="backends of the losses", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("device", "inputs", "backend", ""):
        table.add_column(column, overflow="fold")
    before = None
    for service in services:
        call = service.device, service.dtype
        if before not in (None, call):
            table.add_section()
        served = "yes, and the choice" if service.is_choice else "yes"
        verdict = printable(f"no: {service.reason}") if service.reason else served
        table.add_row(*(call if call != before else ("", "")), service.backend, verdict)
        before = call
    return table


def results_table(title: str, columns: dict[str, dict[str, Any]]) -> Table:
    """AUROC and sPRO of several sets of figures, as `score_maps` gives them; "-" for what cannot be computed.

    One row per figure: that fits a narrow terminal, where a wide table would lose digits. Of the other FPR limits than
    0.05 those rows are left out that have no figure at all.
    """
    table = Table(title=printable(title), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")

    def add(label: str, values: Iterable[float | None], end_section: bool = False) -> None:
        table.add_row(label, *("-" if v is None else f"{v:.3f}" for v in values), end_section=end_section)

    kinds = ("structural", "logical", "mean")
    for key, label in (("auroc", "AUROC"), ("spro", "sPRO@0.05")):
        for kind in kinds:
            add(f"{label} {kind}", (figures[key][kind] for figures in columns.values()), end_section=kind == "mean")
    for limit in FPR_LIMITS:
        if limit == 0.05:
            continue
        for kind in kinds:
            values = [figures["spro_at"][str(limit)][kind] for figures in columns.values()]
            if set(values) != {None}:
                add(f"sPRO@{limit:g} {kind}", values)
        table.add_section()
    return table
