import pytest

from dskd_fast.paper.published import read_paper


def test_the_tables_are_whole_and_means_are_of_both_halves_but_for_the_misprint_that_is_marked():
    paper = read_paper()
    loco, mvtec_ad, students = paper["loco"]["methods"], paper["mvtec-ad"]["methods"], paper["students"]
    names = [record["method"] for record in loco]
    assert names == [record["method"] for record in mvtec_ad]
    assert len(set(names)) == len(names) == 11
    assert (len(paper["loco"]["categories"]), len(students), len(paper["gccb"])) == (5, 4 + 3, 6)
    wrong = []
    for record in (*loco, *mvtec_ad, *students):
        for measure in {"auroc", "spro"} & record.keys():
            figures = record[measure]
            assert all(0 < value < 1 and round(value, 3) == value for value in figures.values())
            if "structural" not in figures:  # LOCO's sPRO is by category
                continue
            half = (figures["structural"] + figures["logical"]) / 2
            if half != pytest.approx(figures["mean"], abs=0.0005 + 1e-9):
                wrong.append((record, half))
    ((record, half),) = wrong
    assert (record["local"], record["global"]) == ("contextual-affinity", "contextual-affinity")
    assert record["misprint"].items() >= {"measure": "spro", "figure": "mean"}.items()
    assert record["misprint"]["expected"] == pytest.approx(half)
    assert record["spro"]["mean"] == 0.708
    assert [r for r in (*loco, *mvtec_ad, *students) if "misprint" in r] == [record]
