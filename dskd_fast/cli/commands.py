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

from dskd_fast.choices import HOLDOUT
from dskd_fast.cli import doctor as diagnosis
from dskd_fast.cli import recalibration
from dskd_fast.cli.demo import make_data, options_for_demo
from dskd_fast.cli.display import (
    backends_table,
    console,
    counter,
    messages,
    print_line,
    print_metrics,
    print_next,
    print_no_decisions,
    print_predictions,
    print_remarks,
    print_trained,
    results_table,
    training_progress,
)
from dskd_fast.data.augment import Augmentation, for_category
from dskd_fast.data.category import Category
from dskd_fast.data.layout import (
    default_data_root,
    list_categories,
    open_category,
)
from dskd_fast.detection.export import SUFFIXES
from dskd_fast.detection.export import export as export_detector
from dskd_fast.detection.predict import predict as predict_images
from dskd_fast.detection.scoring.parts import PARTS
from dskd_fast.device import resolve_device
from dskd_fast.errors import TrainingStopped, UserError
from dskd_fast.evaluation.evaluate import evaluate as evaluate_detector
from dskd_fast.evaluation.evaluate import threshold_of
from dskd_fast.evaluation.page import write_report
from dskd_fast.evaluation.predictions import evaluate_saved
from dskd_fast.files import load_tensors, printable
from dskd_fast.runs import folder as runs
from dskd_fast.runs.folder import find_category
from dskd_fast.runs.options import TrainingOptions, default_recipe, recipe_options
from dskd_fast.training.distributed import ALONE, NEVER, Group, group, use_gpu
from dskd_fast.training.session import CHANGEABLE, device_of, ensure_run, resume_run, start_run


def train(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    options = _options_in(given)
    if "resume" in given:
        return _resume(given, options)
    recipe = given.get("recipe", default_recipe(options.get("teacher", TrainingOptions.teacher)))
    data_root, holdout = given.get("data_root") or default_data_root(), given.get("holdout", HOLDOUT)
    augment = given.get("augment", "auto")

    def options_for(category: Category) -> TrainingOptions:
        chosen = for_category(category.name, recipe) if augment == "auto" else Augmentation.parse(augment)
        of_recipe = recipe_options(recipe, len(category.train), options)
        return TrainingOptions(**of_recipe | {"augmentation": chosen.to_text()})

    def open_named(name: str | None) -> Category:
        return open_category(data_root, name, holdout=holdout, seed=options.get("seed", TrainingOptions.seed))

    if "all_categories" in given:
        if "category" in given:
            raise UserError("--category and --all-categories exclude each other: leave one of them out")
        out = given.get("out") or Path("runs", Path(data_root).resolve().name)
        return _train_all(list_categories(Path(data_root)), open_named, options_for, out, holdout)
    with group(resolve_device(options.get("device", TrainingOptions.device))) as processes:
        category = processes.agree(lambda: open_named(given.get("category")))
        default = Path("runs", f"{category.name}-{datetime.now():%Y%m%d-%H%M%S}")
        out = given.get("out") or processes.of_first(default)
        console.quiet = not processes.is_first
        _train_into(out, category, options_for(category), holdout, processes)
    print_next(out, category)
    return 0


def _options_in(given: dict[str, Any]) -> dict[str, Any]:
    """Those of `TrainingOptions` that the command line has."""
    options = {field.name: given[field.name] for field in fields(TrainingOptions) if field.name in given}
    if options.get("teacher_weights") is not None:
        options["teacher_weights"] = str(options["teacher_weights"])
    return options


def _resume(given: dict[str, Any], options: dict[str, Any]) -> int:
    folder = given["resume"]
    others: list[str] = [
        name for name in ("category", "all_categories", "holdout", "augment", "recipe") if name in given
    ]
    others += [name for name in options if name not in CHANGEABLE]
    if others:
        raise UserError(
            f"--{others[0].replace('_', '-')} belongs to a new training: with --resume only "
            f"{', '.join('--' + name.replace('_', '-') for name in ('data_root', *CHANGEABLE))} can be given"
        )
    device = options.get("device") or device_of(folder)
    with group(resolve_device(device)) as processes, training_progress() as report:
        console.quiet = not processes.is_first
        detector = resume_run(folder, options, data_root=given.get("data_root"), report=report, group=processes)
        if processes.is_first:
            print_trained(folder, detector, runs.read_config(folder)["n_images"]["train"])
    if not processes.is_first:
        return 0
    category = find_category(folder, runs.read_config(folder), given.get("data_root"))
    print_next(folder, category)
    return 0


def _train_all(
    names: list[str],
    open_named: Callable[[str], Category],
    options_for: Callable[[Category], TrainingOptions],
    out: Path,
    holdout: float,
) -> int:
    """A model for each category; under torchrun each process takes its share of them, on a GPU of its own."""
    failed = 0
    # torchrun ends all processes as soon as one of them has failed: they wait for each other before they report it.
    with group(torch.device("cpu"), timeout=NEVER) as processes:
        for name in names[processes.rank :: processes.size]:
            try:
                category = open_named(name)
                options = options_for(category)
                use_gpu(resolve_device(options.device))
                with training_progress(name) as report:
                    if ensure_run(out / name, category, options, holdout=holdout, report=report):
                        print_line(f"{name}: trained on {len(category.train)} images, run in {out / name}")
                    else:
                        print_line(f"{name}: was trained before, run in {out / name}")
            except UserError as error:
                # The others do not depend on it.
                failed += 1
                print(f"dskd-fast: {printable(f'{name}: {error}')}", file=sys.stderr)
        n_failed = processes.add(torch.tensor([float(failed)], dtype=torch.float64)).item()
    return 2 if n_failed else 0


def recalibrate(arguments: argparse.Namespace) -> int:
    with messages():
        return recalibration.run(arguments)


def evaluate(arguments: argparse.Namespace) -> int:
    metrics = _evaluate_run(
        arguments.run, arguments.data_root, arguments.device, arguments.threshold, arguments.save_maps
    )
    return 1 if metrics["bad_masks"] else 0


def evaluate_maps(arguments: argparse.Namespace) -> int:
    if arguments.out is not None and arguments.out.resolve() == arguments.maps.resolve():
        raise UserError(f"--out {arguments.out} is what is scored, and would be replaced: name another file")
    category = open_category(arguments.data_root or default_data_root(), arguments.category)
    with counter("scoring maps") as progress:
        result = evaluate_saved(arguments.maps, category, progress=progress)
    if arguments.out is not None:
        runs.write_json(arguments.out, result)
    console.print(results_table(f"{category.name}, maps in {arguments.maps}", {"maps": result}), soft_wrap=False)
    print_line(f"image score: {result['image_score']}")
    print_remarks(result)
    return 1 if result["bad_masks"] else 0


def predict(arguments: argparse.Namespace) -> int:
    detector, _, _ = runs.load_run(arguments.run, arguments.device)
    threshold = threshold_of(detector, arguments.threshold)
    if threshold is None:
        print_no_decisions()
    with counter("predicting") as progress:
        predictions = predict_images(
            detector,
            arguments.images,
            arguments.out,
            threshold=threshold,
            save_maps=arguments.save_maps,
            overlays=arguments.overlays,
            overlay_format=arguments.overlay_format,
            progress=progress,
        )
    print_predictions(predictions, threshold, arguments.out)
    return 1 if any(p.error is not None for p in predictions) else 0


def watch(arguments: argparse.Namespace) -> int:
    # Imported late: no other command needs the room.
    from dskd_fast.cli import station

    return station.watch(arguments)


def serve(arguments: argparse.Namespace) -> int:
    from dskd_fast.cli import station

    return station.serve(arguments)


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
        print_no_decisions()
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
    all_remarks: list[dict[str, Any]] = []
    with counter("scoring") as progress:
        page = write_report(
            arguments.runs,
            arguments.out,
            threshold=arguments.threshold,
            data_root=arguments.data_root,
            device=arguments.device,
            progress=progress,
            remark=all_remarks.append,
        )
    print_line(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB), a page for any browser")
    # Runs of the same data have the same remarks.
    for number, of_run in enumerate(all_remarks):
        if of_run not in all_remarks[:number]:
            print_remarks(of_run)
    return 1 if any(of_run["bad_masks"] for of_run in all_remarks) else 0


def info(arguments: argparse.Namespace) -> int:
    config = runs.read_finished(arguments.run)
    calibration = runs.read_json(arguments.run / runs.CALIBRATION)
    history = runs.read_json(arguments.run / runs.HISTORY)
    if not isinstance(history, list) or not history:
        raise UserError(f"{arguments.run / runs.HISTORY} is not the history of a training: restore the file")
    parts = _parts(arguments.run, calibration)
    content = {**config, "parts": parts, "calibration": calibration, "last_epoch": history[-1]}
    if isinstance(calibration, dict) and calibration.get("exposure") is None:
        content["suspect"] = "no image is, however dark or flat: this run is from before there was that check"
    metrics = arguments.run / runs.METRICS
    content["metrics"] = runs.read_json(metrics) if metrics.is_file() else None
    if metrics.is_file() and not (isinstance(content["metrics"], dict) and "auroc" in content["metrics"]):
        raise UserError(f"{metrics} was not written by this program: run evaluate again")
    text = json.dumps(content, ensure_ascii=False)
    console.print_json(text, ensure_ascii=printable(text) != text)
    return 0


def _parts(folder: Path, calibration: Any) -> dict[str, str]:
    """What the scores of a run are made of, and what each part is."""
    try:
        recorded = calibration.get("scores")
        if recorded is None:
            return {name: f"the {name} student's map (the sum of maps decides)" for name in calibration["statistics"]}
        path = folder / Path(recorded["file"]).name
        tensors, _ = load_tensors(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: train again, or copy the whole run folder") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / runs.CALIBRATION} was not written by this program ({error}): train again, or restore the file"
        ) from None
    # In names of tensors, "_" stands for "-", and may end what is a word of Python.
    found = {name.split(".")[1].strip("_").replace("_", "-") for name in tensors if name.startswith("parts.")}
    return {name: kind.meaning for name, kind in PARTS.items() if name in found}


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
    # Imported late: no other command needs the paper's room.
    from dskd_fast.paper.reproduce import reproduce as reproduce_table
    from dskd_fast.paper.tables import to_text

    given = vars(arguments)
    recipe = TrainingOptions(**_options_in(given))
    try:
        with messages():
            outcome = reproduce_table(
                arguments.experiment,
                given.get("data_root") or default_data_root(),
                arguments.out,
                recipe,
                categories=given.get("categories"),
                seeds=arguments.seeds,
                methods=arguments.methods,
                training=training_progress,
                evaluation=counter,
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
    for name, value in diagnosis.description().items():
        print_line(f"{name:14} {value}")
    console.print(backends_table(diagnosis.services()), soft_wrap=False)
    for line in "\n".join([*diagnosis.builds(), default]).splitlines():
        print_line(line)
    return 0


def _train_into(
    out: Path, category: Category, options: TrainingOptions, holdout: float, processes: Group = ALONE
) -> None:
    with training_progress() as report:
        detector = start_run(out, category, options, holdout=holdout, report=report, group=processes)
    if processes.is_first:
        print_trained(out, detector, len(category.train))


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
    print_metrics(metrics)
    print_line(f"figures in {folder / runs.METRICS}, scores of each image in {folder / 'scores.csv'}")
    return metrics
