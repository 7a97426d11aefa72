"""The tables of an experiment, the paper's figures beside ours, and what has to be said with them."""

from collections.abc import Sequence
from typing import Any

from dskd_fast.choices import DEFAULT_TEACHER
from dskd_fast.data.category import unused_sentences
from dskd_fast.paper.plan import EMBEDDING, Contestant, Pair, Part, Plan, papers_categories
from dskd_fast.paper.tables import Cell, Row, Table, over_seeds
from dskd_fast.runs.options import TrainingOptions

FIGURES = ("structural", "logical", "mean")
MEASURES = {"auroc": "AUROC", "spro": "sPRO@0.05"}

# What is said of a recipe. Where it runs, and what differs between the trainings of a table, are no part of it.
_RECIPE = ("teacher", "image_size", "epochs", "batch_size", "lr", "schedule", "warmup", "averaging", "precision")


class Results:
    """Figures over seeds, of one category and over all of them.

    Args:
        plan: what was to be trained.
        metrics: by (seed, category, pair or method), as `evaluate` gives them; what failed is absent.
    """

    def __init__(self, plan: Plan, metrics: dict[tuple[int, str, Pair | str], dict[str, Any]]) -> None:
        self.plan = plan
        self._metrics = metrics

    def of_seed(self, seed: int, part: Part, contestant: Contestant) -> dict[str, Any] | None:
        """A contestant's figures, as `dskd_fast.metrics.maps.score_maps` gives them; None if it failed."""
        metrics = self._metrics.get((seed, part.name, contestant.measured))
        return metrics if metrics is None or contestant.of == "combined" else metrics[contestant.of]

    def of(self, part: Part, contestant: Contestant, measure: str, kind: str) -> Cell:
        """Figure "structural", "logical" or "mean" of a measure "auroc" or "spro" on one category, over the seeds."""
        return over_seeds(self._value(seed, part, contestant, measure, kind) for seed in range(self.plan.seeds))

    def mean(self, contestant: Contestant, measure: str, kind: str) -> Cell:
        """The same over the categories of each seed, then over the seeds."""
        return over_seeds(self._mean(seed, contestant, measure, kind) for seed in range(self.plan.seeds))

    def absent(self, part: Part) -> list[str]:
        """Why a category has no figures of a kind, a sentence each."""
        all_measured: list[Pair | str] = [*self.plan.pairs, *self.plan.methods]
        metrics = (
            self._metrics.get((seed, part.name, measured))
            for seed in range(self.plan.seeds)
            for measured in all_measured
        )
        return next((found["absent"] for found in metrics if found is not None), [])

    def _value(self, seed: int, part: Part, contestant: Contestant, measure: str, kind: str) -> float | None:
        figures = self.of_seed(seed, part, contestant)
        return None if figures is None else figures[measure][kind]

    def _mean(self, seed: int, contestant: Contestant, measure: str, kind: str) -> float | None:
        if kind == "mean":
            return _mean_of_all([self._mean(seed, contestant, measure, half) for half in ("structural", "logical")])
        # A category without such images has no part in it, as in the paper's MVTec AD. One whose figure is missing for
        # another reason leaves no mean, for a mean over fewer categories would pass for one over all.
        return _mean_of_all(
            [self._value(seed, part, contestant, measure, kind) for part in self.plan.parts if part.has(kind)]
        )


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is missing, or there are none."""
    existing = [value for value in values if value is not None]
    return sum(existing) / len(existing) if existing and len(existing) == len(values) else None


def tables_of(results: Results) -> list[Table]:
    """The paper's table with our figures, and ours in more detail."""
    plan = results.plan
    if plan.experiment == "loco":
        methods = plan.paper["loco"]["methods"]
        return [
            _by_category(results, "spro", "sPRO@0.05 by category, mean of structural and logical", methods),
            _by_method(results, "AUROC, mean over the categories", [("auroc", kind) for kind in FIGURES], methods),
            *_details(results),
        ]
    if plan.experiment == "mvtec-ad":
        columns = [(measure, kind) for kind in FIGURES for measure in MEASURES]
        methods = plan.paper["mvtec-ad"]["methods"]
        return [
            _by_method(results, "Modified MVTec AD, mean over the categories", columns, methods),
            *_details(results),
        ]
    beside = [
        Row(
            contestant.label,
            "both",
            [
                *_printed(contestant.printed or {}, [("spro", kind) for kind in FIGURES]),
                *(results.mean(contestant, "spro", kind) for kind in FIGURES),
            ],
        )
        for contestant in plan.contestants
    ]
    areas = [
        Row(contestant.label, "here", [results.mean(contestant, "auroc", kind) for kind in FIGURES])
        for contestant in plan.contestants
    ]
    return [
        Table(
            "sPRO@0.05, mean over the categories, the paper's and ours",
            [f"{source} {kind}" for source in ("paper", "here") for kind in FIGURES],
            beside,
        ),
        _by_category(results, "spro", "sPRO@0.05 here by category, mean of structural and logical"),
        Table("AUROC here, mean over the categories (the paper prints none)", FIGURES, areas),
        _by_category(results, "auroc", "AUROC here by category, mean of structural and logical"),
    ]


def _printed(record: dict[str, Any], figures: Sequence[tuple[str, str | None]]) -> list[Cell]:
    """The paper's figures, each (measure, which); empty where it printed none."""

    def remark(measure: str, which: str | None) -> str | None:
        misprint = record.get("misprint")
        if misprint is None or (misprint["measure"], misprint["figure"]) != (measure, which):
            return None
        return misprint["remark"]

    return [Cell(record.get(measure, {}).get(which), remark=remark(measure, which)) for measure, which in figures]


def _by_category(results: Results, measure: str, title: str, methods: Sequence[dict[str, Any]] = ()) -> Table:
    parts = results.plan.parts
    printed = [(measure, part.name if part.is_papers else None) for part in parts] + [(measure, "mean")]
    ours = [
        Row(
            f"{contestant.label}, here" if methods else contestant.label,
            "here",
            [
                *(results.of(part, contestant, measure, "mean") for part in parts),
                results.mean(contestant, measure, "mean"),
            ],
        )
        for contestant in results.plan.contestants
    ]
    return Table(
        title,
        [*(part.label for part in parts), "mean"],
        [*(Row(record["method"], "paper", _printed(record, printed)) for record in methods), *ours],
    )


def _by_method(
    results: Results, title: str, columns: Sequence[tuple[str, str]], methods: Sequence[dict[str, Any]]
) -> Table:
    ours = [
        Row(f"{contestant.label}, here", "here", [results.mean(contestant, *column) for column in columns])
        for contestant in results.plan.contestants
    ]
    return Table(
        title,
        [f"{MEASURES[measure]} {kind}" for measure, kind in columns],
        [*(Row(record["method"], "paper", _printed(record, columns)) for record in methods), *ours],
    )


def _details(results: Results) -> list[Table]:
    columns = [(measure, kind) for measure in MEASURES for kind in FIGURES]
    tables = []
    for contestant in results.plan.contestants:
        rows = [
            Row(part.label, "here", [results.of(part, contestant, *column) for column in columns])
            for part in results.plan.parts
        ]
        means = Row("mean", "here", [results.mean(contestant, *column) for column in columns])
        names = [f"{MEASURES[measure]} {kind}" for measure, kind in columns]
        tables.append(Table(f"{contestant.label} here, by category", names, [*rows, means]))
    return tables


def notes_on(results: Results, failures: Sequence[str]) -> list[str]:
    """What was run, how, and why figures are absent, a line each."""
    plan = results.plan
    return [
        *_notes_on_data(plan),
        _recipe(plan.recipe),
        *_notes_on_experiment(plan),
        *_absences(results),
        *(["What failed is missing; figures are over the seeds that are left."] if failures else []),
        *(f"Failed: {failure}" for failure in failures),
        f"The paper: {plan.paper['source']}.",
    ]


def _notes_on_data(plan: Plan) -> list[str]:
    others = [part for part in plan.parts if not part.is_papers]
    notes = [f"Run here: {plan.data_root.absolute()}: {'; '.join(map(_describe, plan.parts))}."]
    if len(others) == len(plan.parts):
        notes.append(f"{plan.data_set} was NOT run here: the paper's figures are of other images than ours.")
    elif others:
        notes.append(f"Not of {plan.data_set}: {', '.join(part.label for part in others)}.")
    else:
        notes.append(f"Taken for categories of {plan.data_set} by their names.")
    n_papers = len(papers_categories(plan.experiment, plan.paper))
    if others or len(plan.parts) != n_papers:
        notes.append(
            f"The paper's means are over the {n_papers} categories of {plan.data_set}, ours over the "
            f"{len(plan.parts)} here."
        )
    for part in plan.parts:
        if part.category is not None:
            notes += [f"{part.label}: {sentence}." for sentence in unused_sentences(part.category.unused_summary)]
    seeds = f"mean ± sample standard deviation over the seeds 0 to {plan.seeds - 1}"
    notes.append(f"Ours: {seeds if plan.seeds > 1 else 'seed 0 alone, so no spread'}.")
    if any(part.category is not None and not part.category.validation for part in plan.parts):
        notes.append("Without validation images maps are normalised by the training images, as in the paper.")
    return notes


def _describe(part: Part) -> str:
    if part.category is None:
        return f"{part.label}, which failed"
    counts = {split.removeprefix("test/"): n for split, n in part.category.n_images.items()}
    train, validation = counts.pop("train"), counts.pop("validation")
    tested = ", ".join(f"{n} {kind}" for kind, n in counts.items())
    drawn = "drawn by dskd-fast; " if part.is_synthetic else ""
    return f"{part.name} ({drawn}{train} training and {validation} validation images, test images: {tested})"


def _recipe(recipe: TrainingOptions) -> str:
    papers = TrainingOptions(DEFAULT_TEACHER)
    others = [name for name in _RECIPE if getattr(recipe, name) != getattr(papers, name)]

    def settings(options: TrainingOptions, names: Sequence[str]) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {getattr(options, name)}" for name in names)

    if not others:
        return f"Recipe: the paper's ({settings(papers, _RECIPE)}); what it leaves open, as augmentation, is ours."
    return f"Recipe here: {settings(recipe, others)}. That is NOT the paper's, which has {settings(papers, others)}."


def _notes_on_experiment(plan: Plan) -> list[str]:
    compared = [
        "Methods compared with see the images unaugmented and train for a fixed multiple of the recipe's steps; what "
        "else is not as their papers have it: dskd_fast/paper/README.md."
    ] * bool(plan.methods)
    if plan.experiment == "loco":
        return ["The paper prints sPRO by category and AUROC by type of anomaly, not the other way round.", *compared]
    if plan.experiment == "mvtec-ad":
        return [
            *compared,
            "37 of MVTec AD's test images count as logical, as in the paper; means of logical figures are over the "
            "categories that have some, and the mean of both kinds is that of the two means. The paper prints no "
            "figures by category.",
        ]
    together = (
        "The students share no parameters: each is trained once for a seed, and pairs are put together from these "
        "trainings."
    )
    if plan.experiment == "ablation-gccb":
        remark = "The paper prints the mean alone."
        if plan.recipe.teacher != DEFAULT_TEACHER:
            remark += (
                f" Its g is out of {EMBEDDING} channels; here it is in the same proportion to the channels that the "
                f"teacher {plan.recipe.teacher} gives."
            )
        return [remark, together]
    if plan.experiment == "ablation-temperature":
        return [f"{plan.paper['temperature']}.", together]
    return [
        "Pi: cosine per position. CA: contextual affinity. flat Pi: one cosine per image, as in RD4AD's code; the "
        "paper has none. A student alone is scored by its own map.",
        together,
    ]


def _absences(results: Results) -> list[str]:
    notes = []
    for part in results.plan.parts:
        notes += [f"Absent: {part.label}: {reason}." for reason in results.absent(part)]
    return notes
