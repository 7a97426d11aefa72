import pytest

from dskd_fast.choices import EXPERIMENTS
from dskd_fast.data.layout import MVTEC_AD_CATEGORIES
from dskd_fast.errors import UserError
from dskd_fast.paper.plan import contestants_of, make_plan, papers_categories
from dskd_fast.paper.published import read_paper
from dskd_fast.runs.options import TrainingOptions

PAPER = read_paper()
RECIPE = TrainingOptions("wide_resnet50_2")
LOSSES = {"Pi": "cosine", "CA": "contextual-affinity", "flat Pi": "flattened-cosine"}


def by_label(experiment, recipe=RECIPE):
    return {contestant.label: contestant for contestant in contestants_of(experiment, recipe, PAPER)}


def losses_of(contestant):
    """What its students are trained with; None for one whose figures do not count."""
    local, global_ = (student.options(RECIPE) for student in contestant.pair)
    return (
        None if contestant.of == "global" else local.local_loss,
        None if contestant.of == "local" else global_.global_loss,
    )


def test_the_students_are_those_that_the_paper_prints():
    rows = contestants_of("ablation-students", RECIPE, PAPER)
    assert [losses_of(row) for row in rows] == [(record["local"], record["global"]) for record in PAPER["students"]]
    assert [row.printed for row in rows] == PAPER["students"]
    assert [rows[i].label for i in (0, 3, 6)] == ["local Pi", "global CA", "local Pi + global CA"]
    # The whole method, and one student with the other's loss for each.
    runs = {student.run for row in rows for student in row.pair}
    assert runs == {"dskd", "local-contextual-affinity", "global-cosine"}


def test_the_losses_are_each_alone_and_in_pairs():
    rows = by_label("ablation-losses")
    expected = {f"local {a}": (LOSSES[a], None) for a in LOSSES} | {f"global {a}": (None, LOSSES[a]) for a in LOSSES}
    expected |= {f"local {a} + global {b}": (LOSSES[a], LOSSES[b]) for a in LOSSES for b in LOSSES}
    assert {label: losses_of(row) for label, row in rows.items()} == expected
    assert len(rows) == 6 + 9
    assert sum(row.printed is not None for row in rows.values()) == 7
    assert len({student.run for row in rows.values() for student in row.pair}) == 5
    # A student alone is evaluated with a pair that is there anyway.
    assert {row.pair for row in rows.values()} == {row.pair for row in rows.values() if row.of == "combined"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_categories_are_those_of_the_data_in_the_papers_order(experiment, tmp_path, write_images):
    names = ["zebra", "cable", "juice_bottle", "breakfast_box", "bottle"]
    for name in names:
        write_images(tmp_path / name / "train" / "good", 1)
        write_images(tmp_path / name / "test" / "good", 1)
    plan = make_plan(experiment, tmp_path, None, RECIPE, 1)
    first = ["bottle", "cable"] if experiment == "mvtec-ad" else ["breakfast_box", "juice_bottle"]
    assert [part.name for part in plan.parts][:2] == [part.name for part in plan.parts if part.is_papers] == first
    assert sorted(part.name for part in plan.parts) == sorted(names)
    assert not any(part.is_synthetic for part in plan.parts)
    chosen = make_plan(experiment, tmp_path, ["zebra", first[1], "zebra"], RECIPE, 1)
    assert [part.name for part in chosen.parts] == [first[1], "zebra"]
    expected = MVTEC_AD_CATEGORIES if experiment == "mvtec-ad" else tuple(PAPER["loco"]["categories"])
    assert papers_categories(experiment, PAPER) == expected


def test_the_synthetic_category_is_not_the_papers_and_one_that_is_not_there_is_named(data_root):
    (part,) = make_plan("loco", data_root, None, RECIPE, 1).parts
    assert part.name in PAPER["loco"]["categories"]
    assert (part.is_synthetic, part.is_papers) == (True, False)
    assert part.label == "screw_bag (synthetic)"
    with pytest.raises(UserError, match=r"no category pushpins in .*; choose among: screw_bag"):
        make_plan("loco", data_root, ["screw_bag", "pushpins"], RECIPE, 1)


@pytest.mark.parametrize("missing", ["test", "train"])
def test_a_category_that_cannot_be_trained_or_tested_is_known_at_once(tmp_path, write_images, missing):
    for split in {"train", "test"} - {missing}:
        write_images(tmp_path / "part" / split / "good", 1)
    (part,) = make_plan("loco", tmp_path, None, RECIPE, 1).parts
    assert part.category is None
    assert missing in part.problem
    assert str(tmp_path / "part") in part.problem
