"""The paper's tables with our figures beside them: train and evaluate what is not there yet, then write them.

OUT/recipe.json                                         the options that all trainings have in common
OUT/runs/CATEGORY/dskd/seed-K                           a run of the whole method, shared by all tables
OUT/runs/CATEGORY/STUDENT-WHAT/seed-K                   a run of one student alone with one option changed
OUT/baselines/CATEGORY/METHOD/seed-K                    what a method that is compared with keeps, and its figures
OUT/pairs/CATEGORY/LOCAL+GLOBAL/seed-K                  figures of two students from different runs
OUT/table-EXPERIMENT.{txt,md,csv,json}                  the tables
OUT/examples-EXPERIMENT.png, OUT/examples/CATEGORY.png  heat maps of the whole method
OUT/figure-EXPERIMENT.{png,svg}                         figures over the temperature

The two students share no parameters and no statistics, so neither depends on the other's loss. That is why a student
that several rows of a table have is trained once.
"""

import contextlib
import csv
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dskd_fast.choices import METHODS
from dskd_fast.data.augment import for_category
from dskd_fast.data.category import Category
from dskd_fast.data.ground_truth import KINDS
from dskd_fast.data.images import ImageError, read_image
from dskd_fast.detection.detector import Detector
from dskd_fast.detection.overlay import colour_range
from dskd_fast.device import resolve_device
from dskd_fast.errors import UserError
from dskd_fast.evaluation.evaluate import evaluate, threshold_of
from dskd_fast.files import write_file
from dskd_fast.models.teacher import WeightsUnavailable
from dskd_fast.paper.baselines.measure import Measured, measure
from dskd_fast.paper.baselines.of_anomalib import check_installed
from dskd_fast.paper.comparison import FIGURES, MEASURES, Results, notes_on, tables_of
from dskd_fast.paper.figures import draw_examples, plot_temperatures, stack
from dskd_fast.paper.kept import check_recipe, fingerprint, record_of
from dskd_fast.paper.plan import HOLDOUT, TEMPERATURES, Pair, Part, Plan, Student, make_plan
from dskd_fast.paper.students import calibrated_figures, join
from dskd_fast.paper.tables import Table, to_csv, to_json, to_markdown, to_text
from dskd_fast.progress import Progress, log, silent
from dskd_fast.runs import folder as runs
from dskd_fast.runs.options import TrainingOptions
from dskd_fast.training.session import Report, ensure_run

_TEXT_WIDTH = 80

# Contexts in which a training or an evaluation with a title shows how far it is.
TrainingDisplay = Callable[[str], AbstractContextManager[Report]]
EvaluationDisplay = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Outcome:
    """What an experiment gave and where it was written; `failures` is empty if all went well."""

    tables: list[Table]
    notes: list[str]
    failures: list[str]
    files: list[Path]


def reproduce(
    experiment: str,
    data_root: Path,
    out: Path,
    recipe: TrainingOptions,
    *,
    categories: Sequence[str] | None = None,
    seeds: int = 3,
    methods: Sequence[str] = METHODS[:1],
    training: TrainingDisplay = lambda _: contextlib.nullcontext(lambda _: None),
    evaluation: EvaluationDisplay = lambda _: contextlib.nullcontext(silent),
) -> Outcome:
    """Train and evaluate what an experiment needs and is not there yet, then write its tables and figures.

    Args:
        experiment: one of `dskd_fast.choices.EXPERIMENTS`.
        data_root: folder with the categories.
        out: folder of runs, tables and figures. Experiments with the same recipe may share it, and then share runs.
        recipe: of all trainings; seed and augmentation are set for each.
        categories: names; None takes all of the data root.
        seeds: how often each is trained, with the seeds 0, 1, ...
        methods: rows of the tables of data sets that are measured here: of `dskd_fast.choices.METHODS`, or
            "anomalib:NAME".
        training, evaluation: called with a title; see above. What is done or has failed goes to the logger "dskd_fast".

    Raises:
        UserError: before anything is trained: data, options or an `out` that do not fit, weights that cannot be had.
            What fails later is in the outcome's `failures` and does not stop the rest.
        TrainingStopped: by a signal; the same call goes on from there.
    """
    if experiment == "ablation-temperature" and importlib.util.find_spec("matplotlib") is None:
        raise UserError('the plot needs matplotlib, which is not installed: run pip install "dskd-fast[plots]"')
    # Ours are made beside, from the same networks.
    recipe = dataclasses.replace(recipe, scoring="paper")
    plan = make_plan(experiment, data_root, categories, recipe, seeds, methods)
    recipe_file, record = out / "recipe.json", record_of(recipe)
    check_recipe(recipe_file, record)
    work = _Work(plan, out, training, evaluation)
    work.check_networks()
    runs.write_json(recipe_file, record)
    for seed in range(seeds):
        for part in plan.parts:
            work.do(part, seed)
    results = Results(plan, work.metrics)
    figures = []
    if experiment in ("loco", "mvtec-ad"):
        figures = work.draw_examples()
    elif experiment == "ablation-temperature":
        figures = _plot(out / f"figure-{experiment}", results)
    tables, notes = tables_of(results), notes_on(results, work.failures)
    files = _write(out / f"table-{experiment}", results, tables, notes, work.failures)
    return Outcome(tables, notes, work.failures, files + figures)


class _Work:
    """Trains and evaluates what a plan needs.

    Attributes:
        metrics: by (seed, category, pair or method), as `evaluate` gives them; what failed is absent.
        failures: why, a sentence each.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        training: TrainingDisplay,
        evaluation: EvaluationDisplay,
    ) -> None:
        self.plan = plan
        self.out = out
        self.metrics: dict[tuple[int, str, Pair | str], dict[str, Any]] = {}
        self.failures: list[str] = []
        self._training = training
        self._evaluation = evaluation
        self._trained: set[Path] = set()
        self._measured: Measured | None = None

    def check_networks(self) -> None:
        """Raise UserError for what no training can use, unless all are done.

        That is a device, a teacher, a size or weights, or a model of anomalib where anomalib is not installed.
        """
        for method in self.plan.methods:
            places = [self._of_method(part, method, i) for i in range(self.plan.seeds) for part in self.plan.parts]
            if not all((place / runs.METRICS).is_file() for place in places):
                check_installed(method)
        folders = {
            self._run(part, student, seed)
            for seed in range(self.plan.seeds)
            for part in self.plan.parts
            for pair in self.plan.pairs
            for student in pair
        }
        if folders and all(runs.is_finished(folder) for folder in folders):
            return
        resolve_device(self.plan.recipe.device)
        self.plan.recipe.networks(pretrained=True)

    def do(self, part: Part, seed: int) -> None:
        """Everything on one category with one seed."""
        if part.category is None:
            self._fail(f"{part.name}: {part.problem}")
            return
        augmentation = for_category(part.name, "paper").to_text()
        recipe = dataclasses.replace(self.plan.recipe, seed=seed, augmentation=augmentation)
        failed: set[Student] = set()
        for pair in self.plan.pairs:
            for student in pair:
                if student not in failed and not self._succeeds(self._train, part, student, recipe):
                    failed.add(student)
            if failed.isdisjoint(pair):
                self._succeeds(self._evaluate, part, pair, recipe)
        for method in self.plan.methods:
            self._succeeds(self._measure, part, method, recipe)

    def _succeeds(self, step: Callable, part: Part, what: Student | Pair | str, recipe: TrainingOptions) -> bool:
        title = f"{part.name}, {what if isinstance(what, str) else what.run}, seed {recipe.seed}"
        try:
            step(title, part, what, recipe)
        except WeightsUnavailable:
            raise
        except ImageError as error:
            # The same images fail in whatever is trained on them.
            self._fail(f"{part.name}: {error}")
            return False
        except UserError as error:
            self._fail(f"{title}: {error}")
            return False
        return True

    def _fail(self, sentence: str) -> None:
        if sentence not in self.failures:
            self.failures.append(sentence)
            log.error("failed: %s", sentence)

    def _run(self, part: Part, student: Student, seed: int) -> Path:
        return self.out / "runs" / part.name / student.run / f"seed-{seed}"

    def _place(self, part: Part, pair: Pair, seed: int) -> Path:
        """Where a pair's figures are: in the run, if both students are of one, as if by `dskd-fast evaluate`."""
        if pair.local.run == pair.global_.run:
            return self._run(part, pair.local, seed)
        return self.out / "pairs" / part.name / pair.run / f"seed-{seed}"

    def _of_method(self, part: Part, method: str, seed: int) -> Path:
        return self.out / "baselines" / part.name / method.replace(":", "-") / f"seed-{seed}"

    def _train(self, title: str, part: Part, student: Student, recipe: TrainingOptions) -> None:
        assert part.category is not None  # see `do`
        folder = self._run(part, student, recipe.seed)
        if folder in self._trained:
            return
        with self._training(title) as report:
            is_new = ensure_run(folder, part.category, student.options(recipe), holdout=HOLDOUT, report=report)
        self._trained.add(folder)
        log.info("%s: %s", title, "trained" if is_new else "was trained before")

    def _evaluate(self, title: str, part: Part, pair: Pair, recipe: TrainingOptions) -> None:
        assert part.category is not None  # see `do`
        place = self._place(part, pair, recipe.seed)
        folders = [self._run(part, student, recipe.seed) for student in pair]
        evaluated = fingerprint(part.category, folders)
        is_calibrated = any(x.of == "calibrated" and x.pair == pair for x in self.plan.contestants)
        with contextlib.suppress(UserError):
            found = runs.read_json(place / runs.METRICS)
            if (
                isinstance(found, dict)
                and found.get("evaluated") == evaluated
                and ((place / "scores.csv").is_file() and ("calibrated" in found or not is_calibrated))
            ):
                self._keep(part, pair, recipe.seed, found)
                return
        detector = runs.load_run(folders[0], recipe.device)[0]
        if folders[1] != folders[0]:
            detector = join(detector, runs.load_run(folders[1], recipe.device)[0])
        with self._evaluation(title) as progress:
            metrics = evaluate(
                detector,
                part.category,
                threshold=threshold_of(detector, None),
                batch_size=recipe.batch_size,
                scores_file=place / "scores.csv",
                progress=progress,
            )
            if is_calibrated:
                metrics["calibrated"] = calibrated_figures(detector, part.category, recipe, progress)
        metrics["evaluated"] = evaluated
        runs.write_json(place / runs.METRICS, metrics)
        self._keep(part, pair, recipe.seed, metrics)
        log.info("%s: evaluated", title)

    def _measure(self, title: str, part: Part, method: str, recipe: TrainingOptions) -> None:
        assert part.category is not None  # see `do`
        if self._measured is None or self._measured.of != (part.category, recipe):
            self._measured = Measured(part.category, recipe)
        place = self._of_method(part, method, recipe.seed)
        with self._evaluation(title) as progress:
            metrics, is_new = measure(method, self._measured, place, fingerprint(part.category, ()), progress)
        self._keep(part, method, recipe.seed, metrics)
        log.info("%s: %s", title, "fitted and evaluated" if is_new else "was evaluated before")

    def _keep(self, part: Part, pair: Pair | str, seed: int, metrics: dict[str, Any]) -> None:
        self.metrics[seed, part.name, pair] = metrics
        for sentence in metrics["bad_masks"]:
            self._fail(f"{part.name}: {sentence}")

    def draw_examples(self) -> list[Path]:
        """Of each category the test image with the median score of each kind, with the maps of the first seed."""
        files, sheets = [], []
        for part in self.plan.parts:
            if (0, part.name, Pair()) not in self.metrics:
                continue
            place = self._place(part, Pair(), 0)
            try:
                sheets.append(_examples(runs.load_run(place, self.plan.recipe.device)[0], part, place / "scores.csv"))
            except UserError as error:
                self._fail(f"{part.name}, examples: {error}")
                continue
            files.append(self.out / "examples" / f"{part.name}.png")
            write_file(files[-1], sheets[-1].save)
        if sheets:
            files.insert(0, self.out / f"examples-{self.plan.experiment}.png")
            write_file(files[0], stack(sheets).save)
        return files


def _examples(detector: Detector, part: Part, scores_file: Path) -> Image.Image:
    assert part.category is not None  # it has been scored
    rows = []
    for index, score in _medians(part.category, scores_file):
        item = part.category.test[index]
        image = read_image(item.path, bits=detector.bits)
        [found] = detector.predict(image)
        assert found.local_map is not None  # the whole method has both
        assert found.global_map is not None
        caption = f"{item.kind}: {item.path.relative_to(part.category.root)}, score {score:.2f}"
        rows.append((caption, [image, found.local_map, found.global_map, found.map]))
    low, high = colour_range(threshold_of(detector, None))
    title = (
        f"{part.label}: of each kind the test image with the median score. Maps of seed 0, in full colour from "
        f"{high:.3g} standard deviations above the normal mean."
    )
    return draw_examples(title, rows, low, high)


def _medians(category: Category, scores_file: Path) -> Iterator[tuple[int, float]]:
    """Index and score of the test image with the median score of each kind, the lower one of two."""
    with scores_file.open(newline="", encoding="utf-8") as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    for kind in KINDS:
        ranked = sorted((scores[i], i) for i, item in enumerate(category.test) if item.kind == kind)
        if ranked:
            score, index = ranked[(len(ranked) - 1) // 2]
            yield index, score


def _plot(path: Path, results: Results) -> list[Path]:
    contestants = results.plan.contestants
    figures = {
        title: {kind: [results.mean(contestant, measure, kind) for contestant in contestants] for kind in FIGURES}
        for measure, title in reversed(MEASURES.items())
    }
    return plot_temperatures(path, TEMPERATURES, figures, ", ".join(part.label for part in results.plan.parts))


def _write(
    base: Path, results: Results, tables: Sequence[Table], notes: Sequence[str], failures: Sequence[str]
) -> list[Path]:
    plan = results.plan
    texts = {
        ".txt": to_text(tables, notes, _TEXT_WIDTH),
        ".md": to_markdown(tables, notes),
        ".csv": to_csv(tables),
    }
    for suffix, text in texts.items():
        write = partial(Path.write_text, data=text, encoding="utf-8", errors="backslashreplace")
        write_file(base.with_suffix(suffix), write)
    content = {
        "experiment": plan.experiment,
        "data_root": str(plan.data_root.absolute()),
        "categories": [
            {
                "name": part.name,
                "is_synthetic": part.is_synthetic,
                "is_papers": part.is_papers,
                "n_images": None if part.category is None else part.category.n_images,
            }
            for part in plan.parts
        ],
        "recipe": dataclasses.asdict(plan.recipe),
        "seeds": list(range(plan.seeds)),
        "tables": to_json(tables),
        "figures": [
            {"row": contestant.label, "category": part.name, "seed": seed}
            | {measure: found[measure] for measure in ("auroc", "spro", "spro_at")}
            for contestant in plan.contestants
            for part in plan.parts
            for seed in range(plan.seeds)
            if (found := results.of_seed(seed, part, contestant)) is not None
        ],
        "notes": list(notes),
        "failures": list(failures),
    }
    runs.write_json(base.with_suffix(".json"), content)
    return [base.with_suffix(suffix) for suffix in (*texts, ".json")]
