"""What people see: progress bars, tables and sentences."""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dskd_fast.cli.doctor import Service
from dskd_fast.data.category import Category, unused_sentences
from dskd_fast.data.ground_truth import ANOMALY_KINDS
from dskd_fast.data.layout import MIN_IMAGES_TO_HOLD_OUT
from dskd_fast.data.listing import PREDICTIONS
from dskd_fast.detection.detector import Detector, calibration_of
from dskd_fast.detection.predict import Prediction
from dskd_fast.files import in_shell, printable
from dskd_fast.metrics.spro import FPR_LIMITS
from dskd_fast.progress import Progress, log, silent
from dskd_fast.runs.history import TrainingState
from dskd_fast.training.distributed import is_launched

if TYPE_CHECKING:
    from rich.table import Table

# What is printed is mostly paths: brackets and colons in them are not markup, and a line break would spoil them.
console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_line(text: str = "", style: str | None = None) -> None:
    """Print one line; what in it would steer the terminal, as a file's name may hold it, is escaped."""
    console.print(printable(text), style=style)


class _Printer(logging.Handler):
    def __init__(self, prefix: str, is_aside: bool) -> None:
        super().__init__(logging.INFO)
        self.prefix, self.is_aside = prefix, is_aside

    def emit(self, record: logging.LogRecord) -> None:
        if self.is_aside:
            print(f"dskd-fast: {printable(self.prefix + record.getMessage())}", file=sys.stderr, flush=True)
        else:
            print_line(self.prefix + record.getMessage())


@contextmanager
def messages(title: str = "", is_aside: bool = False) -> Iterator[None]:
    """Print what the library logs, each line beginning with `title`; of nested calls the innermost prints.

    With `is_aside` on the standard error, since the output is for a program.
    """
    handlers, level = log.handlers, log.level
    log.handlers = [_Printer(f"{title}: " if title else "", is_aside)]
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.handlers = handlers
        log.setLevel(level)


@contextmanager
def training_progress(title: str = "") -> Iterator[Callable[[TrainingState], None]]:
    """Yields report for `train`: a bar on a terminal, a line now and then elsewhere.

    Several processes share one terminal: they write lines, which begin with `title`.
    """

    def losses_of(state: TrainingState) -> str:
        figures = [] if state.local_loss is None else [f"local {state.local_loss:.4f}"]
        figures += [] if state.global_loss is None else [f"global {state.global_loss:.3e}"]
        return "  ".join([*figures, f"{state.images_per_second:.1f} images/s"])

    if not console.is_terminal or is_launched():
        tenth = 0

        def report_in_lines(state: TrainingState) -> None:
            nonlocal tenth
            if state.step * 10 // state.steps > tenth:
                tenth = state.step * 10 // state.steps
                log.info("step %d/%d  epoch %d  %s", state.step, state.steps, state.epoch, losses_of(state))

        with messages(title):
            yield report_in_lines
        return

    from rich import progress as columns

    bar = columns.Progress(
        columns.TextColumn("{task.description}", markup=False),
        columns.BarColumn(),
        columns.MofNCompleteColumn(),
        columns.TextColumn("{task.fields[losses]}"),
        columns.TimeElapsedColumn(),
        columns.TextColumn("left"),
        columns.TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
    )
    task = None

    def report_in_bar(state: TrainingState) -> None:
        nonlocal task
        if task is None:
            task = bar.add_task("training", total=state.steps, losses="")
        bar.update(task, completed=state.step, losses=losses_of(state), description=f"epoch {state.epoch}")

    with messages(title), bar:
        yield report_in_bar


@contextmanager
def counter(title: str) -> Iterator[Progress]:
    """Yields progress(stage, done, total): one bar, restarted for each stage; nothing where there is no terminal."""
    if not console.is_terminal:
        yield silent
        return

    from rich import progress as columns

    bar = columns.Progress(
        columns.TextColumn("{task.description}", markup=False),
        columns.BarColumn(),
        columns.MofNCompleteColumn(),
        columns.TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(printable(title), total=None)

    def progress(stage: str, done: int, total: int) -> None:
        bar.update(task, description=printable(stage), completed=done, total=total)

    with bar:
        yield progress


def backends_table(services: Iterable[Service]) -> "Table":
    """Which backends serve which calls, and why the others do not."""
    from rich import box
    from rich.table import Table

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


def results_table(title: str, columns: dict[str, dict[str, Any]]) -> "Table":
    """AUROC and sPRO of several sets of figures, as `score_maps` gives them; "-" for what cannot be computed.

    One row per figure: that fits a narrow terminal, where a wide table would lose digits. Of the other FPR limits than
    0.05 those rows are left out that have no figure at all.
    """
    from rich import box
    from rich.table import Table

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


def parts_table(parts: dict[str, dict[str, float | None]], decided_by: dict[str, dict[str, int]] | None) -> "Table":
    """AUROC of each part of a score, and how many images it called anomalous, as `evaluate` gives both."""
    from rich import box
    from rich.table import Table

    table = Table(title="AUROC of each part of the score", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in (*ANOMALY_KINDS, *(() if decided_by is None else ("anomalous",))):
        table.add_column(name, justify="right", overflow="fold")
    for name, areas in parts.items():
        figures = ["-" if areas[kind] is None else f"{areas[kind]:.3f}" for kind in ANOMALY_KINDS]
        counts = [] if decided_by is None else [str(sum(of_kind[name] for of_kind in decided_by.values()))]
        table.add_row(name, *figures, *counts)
    return table


def print_trained(folder: Path, detector: Detector, n_images: int) -> None:
    threshold = calibration_of(detector).threshold
    print_line(f"trained on {n_images} images, run in {folder}")
    if threshold is None:
        print_line(
            "no threshold: there are no validation images, and training images score too low to set one (put good ones "
            f"into validation/good; of {MIN_IMAGES_TO_HOLD_OUT} training images or more some can be held out)"
        )
    else:
        print_line(
            f"threshold {threshold.value:.4g} from {threshold.n_images} normal validation images, expected false "
            f"alarms {threshold.expected_false_alarm_rate:.1%}"
        )


def print_next(folder: Path, category: Category) -> None:
    """What to do with a trained run."""
    run = in_shell(folder)
    evaluation = f"dskd-fast evaluate {run}   or   " if category.test else ""
    print_line()
    print_line(f"next: {evaluation}dskd-fast predict {run} IMAGES")


def print_predictions(predictions: Sequence[Prediction], threshold: float | None, out: Path) -> None:
    """How many images are what, then those that are not scored or not drawn, and why."""
    summary = f"{sum(p.score is not None for p in predictions)} images scored"
    if threshold is not None:
        anomalous = sum(p.decision == "anomalous" for p in predictions)
        summary += f", {anomalous} anomalous (score above {threshold:.4g})"
        n_whole = sum(p.is_whole for p in predictions)
        if n_whole:
            summary += f", {n_whole} of these as a whole, without a place"
    suspects = sum(p.decision == "suspect" for p in predictions)
    if suspects:
        summary += f", {suspects} suspect (why: {PREDICTIONS})"
    n_unread = sum(p.error is not None and p.score is None for p in predictions)
    if n_unread:
        summary += f", {n_unread} NOT inspected"
    print_line(f"{summary}; results in {out}")
    for p in predictions:
        if p.skipped is not None:
            print_line(f"skipped: {p.path}: {p.skipped}", style="yellow")
    for p in predictions:
        if p.error is not None:
            print_line(f"{'not read' if p.score is None else 'not drawn'}: {p.path}: {p.error}", style="red")


def print_no_decisions() -> None:
    print_line(
        "no decisions: the run had no validation images to set a threshold with; pass --threshold", style="yellow"
    )


def print_metrics(metrics: dict[str, Any]) -> None:
    is_calibrated = metrics["scoring"] == "calibrated"
    of_all = "all parts" if is_calibrated else "both students"
    columns = {of_all: metrics, "local alone": metrics["local"], "global alone": metrics["global"]}
    if None in columns.values():
        columns = {name: figures for name, figures in columns.items() if figures}
        if not is_calibrated:  # one student, whose own figures these are
            del columns[of_all]
    counts = ", ".join(f"{n} {kind}" for kind, n in metrics["n_images"].items())
    console.print(results_table(f"{metrics['category']}: {counts} test images", columns), soft_wrap=False)
    if is_calibrated:
        console.print(parts_table(metrics["parts"], metrics["decided_by"]), soft_wrap=False)
    if metrics["decisions"] is not None:
        decided = ", ".join(
            f"{metrics['decisions'][kind]} of {n} {kind}" for kind, n in metrics["n_images"].items() if n
        )
        print_line(f"called anomalous at threshold {metrics['threshold']:.4g}: {decided}")
    if any(metrics["suspects"].values()):
        counted = ", ".join(
            f"{metrics['suspects'][kind]} of {n} {kind}" for kind, n in metrics["n_images"].items() if n
        )
        print_line(f"suspect, since too dark, too bright or of another contrast: {counted}", style="yellow")
    print_remarks(metrics)


def print_remarks(found: dict[str, Any]) -> None:
    """Print what `dskd_fast.evaluation.evaluate.remarks` gave."""
    for reason in found["absent"]:
        print_line(f"absent: {reason}", style="yellow")
    for sentence in found["warnings"]:
        print_line(f"warning: {sentence}", style="yellow")
    for sentence in unused_sentences(found["unused"]):
        print_line(sentence, style="yellow")
    for sentence in found["bad_masks"]:
        print_line(f"bad mask: {sentence}", style="red")
