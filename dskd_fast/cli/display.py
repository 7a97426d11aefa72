"""What people see: progress bars and tables."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dskd_fast.metrics.spro import FPR_LIMITS
from dskd_fast.workflow.train import Progress as TrainingState

console = Console()


@contextmanager
def training_progress() -> Iterator[tuple[Callable[[TrainingState], None], Callable[[str], None]]]:
    """Yields (report, status) for `train`: a bar on a terminal, a line now and then elsewhere."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        disable=not console.is_terminal,
    )
    task = None
    told = 0

    def report(state: TrainingState) -> None:
        nonlocal task, told
        losses = f"local {state.local_loss:.4f}  global {state.global_loss:.3e}  {state.images_per_second:.1f} images/s"
        if console.is_terminal:
            if task is None:
                task = bar.add_task("training", total=state.steps, losses="")
            bar.update(task, completed=state.step, losses=losses, description=f"epoch {state.epoch}")
        elif state.step * 10 // state.steps > told:
            told = state.step * 10 // state.steps
            console.print(f"step {state.step}/{state.steps}  epoch {state.epoch}  {losses}", highlight=False)

    def status(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    with bar:
        yield report, status


@contextmanager
def counter(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yields progress(stage, done, total): one bar, restarted for each stage; nothing where there is no terminal."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(title, total=None)

    def progress(stage: str, done: int, total: int) -> None:
        bar.update(task, description=stage, completed=done, total=total)

    with bar:
        yield progress


def results_table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    """AUROC and sPRO of several sets of figures, as `score_maps` gives them; "-" for what cannot be computed."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for measure in ("AUROC", "sPRO@0.05"):
        for kind in ("structural", "logical", "mean"):
            table.add_column(f"{measure}\n{kind}", justify="right")
    for limit in FPR_LIMITS:
        if limit != 0.05:
            table.add_column(f"sPRO@{limit:g}\nmean", justify="right")

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    for name, figures in rows.items():
        table.add_row(
            name,
            *(cell(figures[key][kind]) for key in ("auroc", "spro") for kind in ("structural", "logical", "mean")),
            *(cell(figures["spro_at"][str(limit)]["mean"]) for limit in FPR_LIMITS if limit != 0.05),
        )
    return table
