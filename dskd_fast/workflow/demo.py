"""The demo: synthetic data and a recipe that fit into a few minutes on two cores."""

from pathlib import Path

from dskd_fast.data.augment import for_category
from dskd_fast.data.layout import Category, open_category
from dskd_fast.data.synthetic import CATEGORY, make_screw_bag
from dskd_fast.models.teacher import LITE
from dskd_fast.workflow.train import TrainingOptions

_COUNTS = {"n_train": 64, "n_validation": 16, "n_test_good": 24, "n_structural": 24, "n_logical": 33}
_EXAMPLES_PER_KIND = 3


def make_data(folder: Path, seed: int) -> Category:
    """Draw the data set into `folder`, or take it from there if it is this one already."""
    make_screw_bag(folder, **_COUNTS, seed=seed)
    return open_category(folder, CATEGORY)


def options_for_demo(device: str, seed: int) -> TrainingOptions:
    """A recipe for minutes, not for records: small images, the bundled teacher, a narrow condensing block."""
    return TrainingOptions(
        teacher=LITE,
        image_size=128,
        gccb=256,
        epochs=20,
        batch_size=8,
        augmentation=for_category(CATEGORY).to_text(),
        device=device,
        seed=seed,
    )


def pick_examples(category: Category) -> list[Path]:
    """Test images to draw: a few of each kind."""
    return [
        item.path
        for kind in ("good", "structural", "logical")
        for item in [i for i in category.test if i.kind == kind][:_EXAMPLES_PER_KIND]
    ]
