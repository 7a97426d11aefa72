"""What each of the paper's tables needs to be trained, and what the paper printed."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dskd_fast.choices import ANOMALIB, DEFAULT_TEACHER, METHODS, is_method
from dskd_fast.data.category import Category
from dskd_fast.data.layout import MVTEC_AD_CATEGORIES, list_categories, open_category
from dskd_fast.data.synthetic import MANIFEST
from dskd_fast.detection.findings import Variant
from dskd_fast.errors import UserError
from dskd_fast.models.teacher import Teacher
from dskd_fast.paper.published import read_paper
from dskd_fast.runs.options import TrainingOptions

TEMPERATURES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
EMBEDDING = 2048  # channels that the paper's g is a part of

# The paper normalises by the training images where there is no validation folder: nothing is held out.
HOLDOUT = 0.0

_LOCAL_LOSS, _GLOBAL_LOSS = "cosine", "contextual-affinity"
_SYMBOLS = {"cosine": "Pi", "contextual-affinity": "CA", "flattened-cosine": "flat Pi"}


class Student(NamedTuple):
    """A student of the paper's method, or one that is trained alone with one option of `TrainingOptions` changed."""

    name: Literal["local", "global"]
    option: str | None = None
    value: Any = None

    @property
    def run(self) -> str:
        """Name of the training that has it."""
        if self.option is None:
            return "dskd"
        value = f"{self.value:g}" if isinstance(self.value, float) else str(self.value)
        return "-".join([self.name, *([] if self.option.endswith("_loss") else [self.option]), value])

    def options(self, recipe: TrainingOptions) -> TrainingOptions:
        if self.option is None:
            return recipe
        return dataclasses.replace(recipe, students=self.name, **{self.option: self.value})


class Pair(NamedTuple):
    """The two students that are scored together; the same one twice is that student alone."""

    local: Student = Student("local")
    global_: Student = Student("global")

    @property
    def run(self) -> str:
        """Names of the trainings."""
        return "+".join(dict.fromkeys(student.run for student in self))


class Contestant(NamedTuple):
    """A row of a table that is trained here.

    Attributes:
        label: the row's name.
        pair: what is trained.
        of: whose figures of the pair: "combined", "local" or "global", all by the paper's scores, or "calibrated", the
            whole by ours.
        printed: the paper's record of this row, if it has one.
        method: that is compared with, in place of a pair: see `dskd_fast.paper.baselines.make_baseline`.
    """

    label: str
    pair: Pair = Pair()
    of: Variant | Literal["calibrated"] = "combined"
    printed: dict[str, Any] | None = None
    method: str | None = None

    @property
    def measured(self) -> Pair | str:
        """What its figures are of."""
        return self.pair if self.method is None else self.method


# The name of each row in the paper's tables.
_PRINTED_AS = {"ae": "AE", "vae": "VAE", "f-anogan": "f-AnoGAN", "patchcore-25": "PatchCore-25"}
# The local student alone with the loss of the published code of Reverse Distillation.
_RD = Student("local", "local_loss", "flattened-cosine")


@dataclass(frozen=True)
class Part:
    """A category of the data root.

    Attributes:
        name: of its folder.
        category: None where it cannot be opened; `problem` then says why.
        is_synthetic: whether this program drew it.
        is_papers: whether its name is that of a category of the paper's data set, and it is not synthetic.
    """

    name: str
    category: Category | None
    problem: str | None
    is_synthetic: bool
    is_papers: bool

    @property
    def label(self) -> str:
        return f"{self.name} (synthetic)" if self.is_synthetic else self.name

    def has(self, kind: str) -> bool:
        """Whether it has test images of a kind, as far as is known."""
        return self.category is None or self.category.n_images[f"test/{kind}"] > 0


@dataclass(frozen=True)
class Plan:
    """An experiment on given data.

    Attributes:
        experiment: one of `dskd_fast.choices.EXPERIMENTS`.
        data_root: folder of the categories.
        parts: the categories, in the order of the paper's columns.
        contestants: the rows that are trained here.
        recipe: of all trainings, but for seed and augmentation.
        seeds: how many: 0, 1, ...
        paper: the printed figures.
    """

    experiment: str
    data_root: Path
    parts: Sequence[Part]
    contestants: Sequence[Contestant]
    recipe: TrainingOptions
    seeds: int
    paper: dict[str, Any]

    @property
    def data_set(self) -> str:
        """Name of the paper's data set."""
        return "MVTec AD" if self.experiment == "mvtec-ad" else "MVTec LOCO AD"

    @property
    def pairs(self) -> list[Pair]:
        """All that are trained, each once."""
        return list(dict.fromkeys(contestant.pair for contestant in self.contestants if contestant.method is None))

    @property
    def methods(self) -> list[str]:
        """All that are compared with and are no runs, in the order of the rows."""
        return [contestant.method for contestant in self.contestants if contestant.method is not None]


def make_plan(
    experiment: str,
    data_root: Path,
    categories: Sequence[str] | None,
    recipe: TrainingOptions,
    seeds: int,
    methods: Sequence[str] = METHODS[:1],
) -> Plan:
    """Find the categories and list the trainings.

    Raises:
        UserError: no data root, a category that is not there, an unknown teacher, or methods that are unknown or that
            the experiment has no rows for.
    """
    paper = read_paper()
    contestants = contestants_of(experiment, recipe, paper, methods)
    parts = _open_parts(data_root.expanduser(), categories, papers_categories(experiment, paper))
    return Plan(experiment, data_root, parts, contestants, recipe, seeds, paper)


def papers_categories(experiment: str, paper: dict[str, Any]) -> tuple[str, ...]:
    return MVTEC_AD_CATEGORIES if experiment == "mvtec-ad" else tuple(paper["loco"]["categories"])


def contestants_of(
    experiment: str, recipe: TrainingOptions, paper: dict[str, Any], methods: Sequence[str] = METHODS[:1]
) -> list[Contestant]:
    """The rows of an experiment that are trained here."""
    for method in methods:
        if not is_method(method):
            raise UserError(f"there is no method {method}: use {', '.join(METHODS)} or {ANOMALIB}NAME")
    if experiment in ("loco", "mvtec-ad"):
        return [row for method in dict.fromkeys(methods) for row in _rows_of(method)]
    if tuple(methods) != METHODS[:1]:
        raise UserError(f"{experiment} compares forms of the paper's method alone: give --methods to loco or mvtec-ad")
    if experiment == "ablation-gccb":
        return [_condensing(record, recipe) for record in paper["gccb"]]
    printed = {(record["local"], record["global"]): record for record in paper["students"]}
    if experiment == "ablation-temperature":
        return [
            Contestant(f"T = {t:g}", printed=printed[_LOCAL_LOSS, _GLOBAL_LOSS])
            if t == 1
            else Contestant(f"T = {t:g}", Pair(global_=Student("global", "temperature", t)))
            for t in TEMPERATURES
        ]
    if experiment == "ablation-students":
        return [_with_losses(*losses, record) for losses, record in printed.items()]
    combinations: list[tuple[str | None, str | None]] = [(loss, None) for loss in _SYMBOLS]
    combinations += [(None, loss) for loss in _SYMBOLS]
    combinations += [(local, global_) for local in _SYMBOLS for global_ in _SYMBOLS]
    return [_with_losses(local, global_, printed.get((local, global_))) for local, global_ in combinations]


def _rows_of(method: str) -> list[Contestant]:
    if method == "dskd":
        return [Contestant("DSKD"), Contestant("DSKD, calibrated scores (ours, not the paper's)", of="calibrated")]
    if method == "rd":
        return [Contestant("RD", Pair(_RD, _RD))]
    return [Contestant(_PRINTED_AS.get(method, method if ":" in method else method.upper()), method=method)]


def _with_losses(local: str | None, global_: str | None, record: dict[str, Any] | None) -> Contestant:
    names = [f"{name} {_SYMBOLS[loss]}" for name, loss in (("local", local), ("global", global_)) if loss]
    # A student alone has its figures from its pair with one of the same loss, which both tables have.
    losses = {"local": local or global_, "global": global_ or local}
    pair = Pair(
        Student("local") if losses["local"] == _LOCAL_LOSS else Student("local", "local_loss", losses["local"]),
        Student("global") if losses["global"] == _GLOBAL_LOSS else Student("global", "global_loss", losses["global"]),
    )
    of: Variant = "combined" if local and global_ else "local" if local else "global"
    return Contestant(" + ".join(names), pair, of, record)


def _condensing(record: dict[str, Any], recipe: TrainingOptions) -> Contestant:
    """The row of a g, which for another teacher than the paper's is in proportion to its embedding."""
    g = record["g"]
    if g == 0:
        return Contestant("w/o GCCB", Pair(global_=Student("global", "gccb", 0)), printed=record)
    embedding = EMBEDDING if recipe.teacher == DEFAULT_TEACHER else 2 * Teacher(recipe.teacher).levels[2].channels
    here = g * embedding // EMBEDDING
    label = f"g = {g}" if here == g else f"g = {g} (here {here})"
    is_default = 2 * g == EMBEDDING
    return Contestant(label, Pair() if is_default else Pair(global_=Student("global", "gccb", here)), printed=record)


def _open_parts(data_root: Path, categories: Sequence[str] | None, papers: Sequence[str]) -> list[Part]:
    there = list_categories(data_root)
    names = dict.fromkeys(categories or there)
    for name in names:
        if name not in there:
            raise UserError(f"there is no category {name} in {data_root}; choose among: {', '.join(there)}")
    parts = []
    for name in sorted(names, key=lambda name: papers.index(name) if name in papers else len(papers)):
        category, problem = None, None
        try:
            category = _complete(open_category(data_root, name, holdout=HOLDOUT))
        except UserError as error:
            # The other categories do not depend on it.
            problem = str(error)
        is_synthetic = (data_root / name / MANIFEST).is_file()
        parts.append(Part(name, category, problem, is_synthetic, name in papers and not is_synthetic))
    return parts


def _complete(category: Category) -> Category:
    for split, images in (("training", category.train), ("test", category.test)):
        if not images:
            raise UserError(f"{category.root} has no {split} images: add them, or leave the category out")
    return category
