"""The commands. Each takes the parsed arguments and returns the exit code."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from dskd_fast.cli import doctor as diagnosis
from dskd_fast.cli.demo import make_data, options_for_demo
from dskd_fast.cli.display import backends_table, console, counter, print_line, results_table, training_progress
from dskd_fast.data.augment import Augmentation, for_category
from dskd_fast.data.images import image_size
from dskd_fast.data.layout import (
    HOLDOUT,
    MIN_IMAGES_TO_HOLD_OUT,
    Category,
    GroundTruth,
    default_data_root,
    list_categories,
    open_category,
    unused_sentences,
)
from dskd_fast.data.listing import PREDICTIONS
from dskd_fast.detection.detector import Detector
from dskd_fast.detection.export import SUFFIXES
from dskd_fast.detection.export import export as export_detector
from dskd_fast.detection.predict import predict as predict_images
from dskd_fast.device import resolve_device
from dskd_fast.errors import TrainingStopped, UserError
from dskd_fast.evaluation.evaluate import count_kinds, remarks, threshold_of
from dskd_fast.evaluation.evaluate import evaluate as evaluate_detector
from dskd_fast.evaluation.report import write_report
from dskd_fast.files import in_shell, printable
from dskd_fast.metrics.maps import maps_without_image, read_maps, score_maps
from dskd_fast.models.teacher import DEFAULT
from dskd_fast.paper.reproduce import reproduce as reproduce_table
from dskd_fast.paper.tables import to_text
from dskd_fast.runs import folder as runs
from dskd_fast.runs.folder import find_category
from dskd_fast.runs.options import TrainingOptions
from dskd_fast.training.distributed import ALONE, NEVER, Group, group, use_gpu
from dskd_fast.training.session import CHANGEABLE, ensure_run, resume_run, start_run


def train(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    options = _options_in(given)
    if "resume" in given:
        return _resume(given, options)
    data_root, holdout = given.get("data_root") or default_data_root(), given.get("holdout", HOLDOUT)
    augment = given.get("augment", "auto")

    def recipe(category: Category) -> TrainingOptions:
        chosen = for_category(category.name) if augment == "auto" else Augmentation.parse(augment)
        return TrainingOptions(**{"teacher": DEFAULT} | options | {"augmentation": chosen.to_text()})

    def opened(name: str | None) -> Category:
        return open_category(data_root, name, holdout=holdout, seed=options.get("seed", 0))

    if "all_categories" in given:
        if "category" in given:
            raise UserError("--category and --all-categories exclude each other: leave one of them out")
        out = given.get("out") or Path("runs", Path(data_root).resolve().name)
        return _train_all(list_categories(Path(data_root)), opened, recipe, out, holdout)
    with group(resolve_device(options.get("device", "auto"))) as processes:
        category = processes.agree(lambda: opened(given.get("category")))
        default = Path("runs", f"{category.name}-{datetime.now():%Y%m%d-%H%M%S}")
        out = given.get("out") or processes.of_first(default)
        console.quiet = not processes.is_first
        _train_into(out, category, recipe(category), holdout, processes)
    _print_next(out, category)
    return 0


def _options_in(given: dict[str, Any]) -> dict[str, Any]:
    """Those of `TrainingOptions` that the command line has."""
    options = {field.name: given[field.name] for field in fields(TrainingOptions) if field.name in given}
    if options.get("teacher_weights") is not None:
        options["teacher_weights"] = str(options["teacher_weights"])
    return options


def _resume(given: dict[str, Any], options: dict[str, Any]) -> int:
    folder = given["resume"]
    others = [name for name in ("category", "all_categories", "holdout", "augment") if name in given]
    others += [name for name in options if name not in CHANGEABLE]
    if others:
        raise UserError(
            f"--{others[0].replace('_', '-')} belongs to a new training: with --resume only "
            f"{', '.join('--' + name.replace('_', '-') for name in ('data_root', *CHANGEABLE))} can be given"
        )
    device = options.get("device") or runs.read_options(folder, runs.read_config(folder))[0].device
    with group(resolve_device(device)) as processes, training_progress() as (report, status):
        console.quiet = not processes.is_first
        detector = resume_run(
            folder, options, data_root=given.get("data_root"), report=report, status=status, group=processes
        )
        if processes.is_first:
            _print_trained(folder, detector)
    category = find_category(folder, runs.read_config(folder), given.get("data_root"))
    _print_next(folder, category)
    return 0


def _train_all(
    names: list[str],
    opened: Callable[[str], Category],
    recipe: Callable[[Category], TrainingOptions],
    out: Path,
    holdout: float,
) -> int:
    """A model for each category; under torchrun each process takes its share of them, on a GPU of its own."""
    failed = 0
    # torchrun ends all processes as soon as one of them has failed: they wait for each other before they tell it.
    with group(torch.device("cpu"), timeout=NEVER) as processes:
        for name in names[processes.rank :: processes.size]:
            try:
                category = opened(name)
                options = recipe(category)
                use_gpu(resolve_device(options.device))
                with training_progress(name) as (report, status):
                    if ensure_run(out / name, category, options, holdout=holdout, report=report, status=status):
                        print_line(f"{name}: trained on {len(category.train)} images, run in {out / name}")
                    else:
                        print_line(f"{name}: was trained before, run in {out / name}")
            except UserError as error:
                # The others do not depend on it.
                failed += 1
                print(f"dskd-fast: {printable(f'{name}: {error}')}", file=sys.stderr)
        n_failed = processes.add(torch.tensor([float(failed)], dtype=torch.float64)).item()
    return 2 if n_failed else 0


def _print_next(folder: Path, category: Category) -> None:
    run = in_shell(folder)
    evaluation = f"dskd-fast evaluate {run}   or   " if category.test else ""
    print_line()
    print_line(f"next: {evaluation}dskd-fast predict {run} IMAGES")


def evaluate(arguments: argparse.Namespace) -> int:
    metrics = _evaluate_run(
        arguments.run, arguments.data_root, arguments.device, arguments.threshold, arguments.save_maps
    )
    return 1 if metrics["bad_masks"] else 0


def evaluate_maps(arguments: argparse.Namespace) -> int:
    category = open_category(arguments.data_root or default_data_root(), arguments.category)
    truth = GroundTruth(category)
    with counter("scoring maps") as progress:
        maps = read_maps(arguments.maps, truth, image_size)
        figures = score_maps(_counted(maps, len(category.test), progress))
    result = {"category": category.name, **figures, "image_score": "maximum of the map"}
    result |= {"n_images": count_kinds(category), **remarks(category, truth)}
    left = [path.relative_to(arguments.maps).as_posix() for path in maps_without_image(arguments.maps, category)]
    if left:
        result["unused"].append({"files": "maps of no test image", "n_files": len(left), "first": left[:3]})
    if arguments.out is not None:
        runs.write_json(arguments.out, result)
    console.print(results_table(f"{category.name}, maps in {arguments.maps}", {"maps": figures}), soft_wrap=False)
    _print_remarks(result)
    return 1 if result["bad_masks"] else 0


def predict(arguments: argparse.Namespace) -> int:
    detector, _, _ = runs.load_run(arguments.run, arguments.device)
    threshold = threshold_of(detector, arguments.threshold)
    if threshold is None:
        _print_no_decisions()
    with counter("predicting") as progress:
        predictions = predict_images(
            detector,
            arguments.images,
            arguments.out,
            threshold=threshold,
            save_maps=arguments.save_maps,
            progress=lambda done, total: progress("predicting", done, total),
        )
    failed = [p for p in predictions if p.error is not None]
    summary = f"{sum(p.score is not None for p in predictions)} images scored"
    if threshold is not None:
        anomalous = sum(p.decision == "anomalous" for p in predictions)
        summary += f", {anomalous} anomalous (score above {threshold:.4g})"
    suspects = sum(p.decision == "suspect" for p in predictions)
    if suspects:
        summary += f", {suspects} suspect (why: {PREDICTIONS})"
    n_unread = sum(p.score is None for p in failed)
    if n_unread:
        summary += f", {n_unread} NOT inspected"
    print_line(f"{summary}; results in {arguments.out}")
    for p in predictions:
        if p.skipped is not None:
            print_line(f"skipped: {p.path}: {p.skipped}", style="yellow")
    for p in failed:
        print_line(f"{'not read' if p.score is None else 'not drawn'}: {p.path}: {p.error}", style="red")
    return 1 if failed else 0


def export(arguments: argparse.Namespace) -> int:
    detector, _, config = runs.load_run(arguments.run, "cpu")
    exported = export_detector(
        detector,
        arguments.out or arguments.run / f"model{SUFFIXES[arguments.format]}",
        arguments.format,
        category=config["category"],
        threshold=threshold_of(detector, arguments.threshold),
    )
    if exported.metadata["threshold"] is None:
        _print_no_decisions()
    for name, value in exported.metadata.items():
        if isinstance(value, dict):
            for entry, meaning in value.items():
                print_line(f"{name.removesuffix('s'):12} {entry}: {meaning}")
        else:
            print_line(f"{name:12} {value}")
    print_line(
        f"{exported.path}, {exported.n_bytes / 1e6:.1f} MB; differs from this run by at most "
        f"{exported.difference:.1e} (1 + |value|) on 4 test patterns"
    )
    return 0


def report(arguments: argparse.Namespace) -> int:
    said: list[dict[str, Any]] = []
    with counter("scoring") as progress:
        page = write_report(
            arguments.runs,
            arguments.out,
            threshold=arguments.threshold,
            data_root=arguments.data_root,
            device=arguments.device,
            progress=progress,
            remark=said.append,
        )
    print_line(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB), a page for any browser")
    # Runs of the same data have the same remarks.
    for number, of_run in enumerate(said):
        if of_run not in said[:number]:
            _print_remarks(of_run)
    return 1 if any(of_run["bad_masks"] for of_run in said) else 0


def info(arguments: argparse.Namespace) -> int:
    config = runs.read_finished(arguments.run)
    calibration = runs.read_json(arguments.run / runs.CALIBRATION)
    history = runs.read_json(arguments.run / runs.HISTORY)
    if not isinstance(history, list) or not history:
        raise UserError(f"{arguments.run / runs.HISTORY} is not the history of a training: restore the file")
    content = {**config, "calibration": calibration, "last_epoch": history[-1]}
    if isinstance(calibration, dict) and calibration.get("exposure") is None:
        content["suspect"] = "no image is, however dark or flat: this run is from before there was that check"
    metrics = arguments.run / runs.METRICS
    content["metrics"] = runs.read_json(metrics) if metrics.is_file() else None
    if metrics.is_file() and not (isinstance(content["metrics"], dict) and "auroc" in content["metrics"]):
        raise UserError(f"{metrics} was not written by this program: run evaluate again")
    text = json.dumps(content, ensure_ascii=False)
    console.print_json(text, ensure_ascii=printable(text) != text)
    return 0


def demo(arguments: argparse.Namespace) -> int:
    out = arguments.out
    print_line(f"1. drawing synthetic images into {out / 'data'}")
    category = make_data(out / "data", arguments.seed)
    options = options_for_demo(arguments.device, arguments.seed)
    run = out / "run"
    print_line("2. training")
    _train_into(run, category, options, HOLDOUT)
    print_line("3. evaluating")
    metrics = _evaluate_run(run, category.root.parent, arguments.device, None, None)
    print_line("4. drawing heat maps")
    detector, _, _ = runs.load_run(run, arguments.device)
    predict_images(detector, [category.root / "test"], out / "heat_maps", threshold=metrics["threshold"])
    both, alone = (f"{figures['auroc']['logical']:.3f}" for figures in (metrics, metrics["local"]))
    print_line()
    print_line(
        f"logical anomalies (missing, surplus or wrong parts), AUROC: {alone} by the local student alone, {both} with "
        "the global one"
    )
    print_line(f"heat maps: {out / 'heat_maps' / 'overlays'}")
    print_line(f"run:       {run}")
    print_line("your own images: dskd-fast train --data-root FOLDER_OF_GOOD_IMAGES --teacher lite")
    return 0


def reproduce(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    recipe = TrainingOptions(**{"teacher": DEFAULT} | _options_in(given))
    try:
        outcome = reproduce_table(
            arguments.experiment,
            given.get("data_root") or default_data_root(),
            given.get("out", Path("reproduction")),
            recipe,
            categories=given.get("categories"),
            seeds=given.get("seeds", 3),
            training=training_progress,
            evaluation=counter,
            tell=print_line,
        )
    except TrainingStopped as stopped:
        raise TrainingStopped("stopped and saved: the same command goes on from there", stopped.signal) from None
    lines = to_text(outcome.tables, outcome.notes, console.width).splitlines()
    for line in ("", *lines, "", *map(str, outcome.files)):
        print_line(line)
    for failure in outcome.failures:
        print(f"dskd-fast: {printable(failure)}", file=sys.stderr)
    return 2 if outcome.failures else 0


def doctor(arguments: argparse.Namespace) -> int:
    default = diagnosis.default_backend()
    for name, value in diagnosis.versions().items():
        print_line(f"{name:14} {value}")
    console.print(backends_table(diagnosis.services()), soft_wrap=False)
    for line in "\n".join([*diagnosis.builds(), default]).splitlines():
        print_line(line)
    return 0


def _train_into(
    out: Path, category: Category, options: TrainingOptions, holdout: float, processes: Group = ALONE
) -> None:
    with training_progress() as (report, status):
        detector = start_run(out, category, options, holdout=holdout, report=report, status=status, group=processes)
    if processes.is_first:
        _print_trained(out, detector)


def _print_trained(folder: Path, detector: Detector) -> None:
    calibration = detector.calibration
    if calibration.threshold is None:
        told = (
            "no threshold: there are no validation images, and training images score too low to set one (put good ones "
            f"into validation/good; of {MIN_IMAGES_TO_HOLD_OUT} training images or more some can be held out)"
        )
    else:
        told = (
            f"threshold {calibration.threshold.value:.4g} from {calibration.threshold.n_images} normal validation "
            f"images, expected false alarms {calibration.threshold.expected_false_alarm_rate:.1%}"
        )
    n_images = runs.read_config(folder)["n_images"]["train"]
    print_line(f"trained on {n_images} images, run in {folder}")
    print_line(told)


def _print_no_decisions() -> None:
    print_line(
        "no decisions: the run had no validation images to set a threshold with; pass --threshold", style="yellow"
    )


def _evaluate_run(
    folder: Path, data_root: Path | None, device: str, threshold: float | None, save_maps: Path | None
) -> dict[str, Any]:
    detector, options, config = runs.load_run(folder, device)
    category = find_category(folder, config, data_root)
    if not os.access(folder, os.W_OK):
        raise UserError(f"the figures cannot be written into {folder}: copy the run to a writable place")
    with counter("evaluating") as progress:
        metrics = evaluate_detector(
            detector,
            category,
            threshold=threshold_of(detector, threshold),
            batch_size=options.batch_size,
            save_maps=save_maps,
            scores_file=folder / "scores.csv",
            progress=progress,
        )
    runs.write_json(folder / runs.METRICS, metrics)
    _print_metrics(metrics)
    print_line(f"figures in {folder / runs.METRICS}, scores of each image in {folder / 'scores.csv'}")
    return metrics


def _counted(items: Any, total: int, progress: Any) -> Any:
    for done, item in enumerate(items, start=1):
        yield item
        progress("scoring maps", done, total)


def _print_metrics(metrics: dict[str, Any]) -> None:
    columns = {"both students": metrics, "local alone": metrics["local"], "global alone": metrics["global"]}
    if None in columns.values():  # one student, whose own figures these are
        columns = {name: figures for name, figures in columns.items() if figures and figures is not metrics}
    counts = ", ".join(f"{n} {kind}" for kind, n in metrics["n_images"].items())
    console.print(results_table(f"{metrics['category']}: {counts} test images", columns), soft_wrap=False)
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
    _print_remarks(metrics)


def _print_remarks(said: dict[str, Any]) -> None:
    """Print what `dskd_fast.evaluation.evaluate.remarks` gave."""
    for reason in said["absent"]:
        print_line(f"absent: {reason}", style="yellow")
    for sentence in said["warnings"]:
        print_line(f"warning: {sentence}", style="yellow")
    for sentence in unused_sentences(said["unused"]):
        print_line(sentence, style="yellow")
    for sentence in said["bad_masks"]:
        print_line(f"bad mask: {sentence}", style="red")
