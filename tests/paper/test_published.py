import pytest

from dskd_fast.paper.published import read_paper

PAPER = read_paper()
ROUNDING = 0.0005 + 1e-9
HALVED = [
    *(("loco", record, "auroc") for record in PAPER["loco"]["methods"]),
    *(("mvtec-ad", record, measure) for record in PAPER["mvtec-ad"]["methods"] for measure in ("auroc", "spro")),
    *(("students", record, "spro") for record in PAPER["students"]),
]


def test_there_are_six_tables_of_the_right_size_of_shares_of_three_digits():
    names = [record["method"] for record in PAPER["loco"]["methods"]]
    assert names == [record["method"] for record in PAPER["mvtec-ad"]["methods"]]
    assert len(set(names)) == len(names) == 11
    assert (len(PAPER["loco"]["categories"]), len(PAPER["students"]), len(PAPER["gccb"])) == (5, 4 + 3, 6)
    for _, record, _ in HALVED:
        for value in (value for measure in ("auroc", "spro") for value in record.get(measure, {}).values()):
            assert 0 < value < 1
            assert round(value, 3) == value


def test_means_are_of_both_halves_but_for_the_one_that_is_marked():
    wrong = []
    for table, record, measure in HALVED:
        figures = record[measure]
        half = (figures["structural"] + figures["logical"]) / 2
        if half != pytest.approx(figures["mean"], abs=ROUNDING):
            wrong.append((table, record, half))
    assert len(HALVED) == 11 + 22 + 7
    ((table, record, half),) = wrong
    assert (table, record["local"], record["global"]) == ("students", "contextual-affinity", "contextual-affinity")
    misprint = record["misprint"]
    assert (misprint["measure"], misprint["figure"]) == ("spro", "mean")
    assert misprint["expected"] == pytest.approx(half)
    assert record["spro"]["mean"] == 0.708
    assert [r for _, r, _ in HALVED if "misprint" in r] == [record]
