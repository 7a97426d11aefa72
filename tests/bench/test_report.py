"""The benchmarks' report, from a small file made by hand."""

import copy
import importlib.util
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLOTS = ("convergence.svg", "time.svg", "memory.svg", "speedup.svg")


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("bench_report", ROOT / "bench" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def who(kind, work, shape, mode, contestant, precision="float32", ours=False):
    group = f"{kind}: {work}, {shape}, {mode}"
    return {
        "kind": kind,
        "group": group,
        "work": work,
        "shape": shape,
        "mode": mode,
        "contestant": contestant,
        "precision": precision,
        "ours": ours,
    }


def timed(*names, median, ours=False, rounds=5, **extra):
    common = {
        "reference": False,
        "images": None,
        "errors": None,
        "extra_bytes": None,
        "extra_bytes_note": None,
        "product_seconds": None,
        "percent_of_product": None,
    }
    extra_info = common | who(*names, ours=ours) | extra
    group = extra_info.pop("group")
    stats = {"median": median, "iqr": 0.08 * median, "min": 0.9 * median, "rounds": rounds}
    return {"group": group, "name": f"test[{names}]", "stats": stats, "extra_info": extra_info}


def not_timed(*names, reason, ours=False):
    return who(*names, ours=ours) | {"reason": reason}


def affinity(level, channels, side):
    names = "affinity", f"256 px, level {level}", [2, channels, side, side], "forward+backward"
    product = {"product_seconds": 0.0021}
    return [
        timed(
            *names,
            "eager",
            median=0.0345,
            reference=True,
            errors={"100 %": [1.25e-7, 3e-6], "1 %": [1.31, 0.0456]},
            extra_bytes=3 * 2**30,
            percent_of_product=12.3,
            **product,
        ),
        timed(*names, "KeOps", median=0.069, extra_bytes_note="measured on Linux alone", product_seconds=0.00231),
        timed(
            *names,
            "triton_fused",
            "bf16",
            median=0.003,
            ours=True,
            errors={"100 %": [2e-3, None], "1 %": [0.0021, None]},
            extra_bytes=2**20 + 2**19,
            percent_of_product=61.2,
            product_seconds=0.00042,
        ),
    ]


@pytest.fixture(scope="module")
def content():
    cosine = "cosine", "512 px, level 1", [1, 256, 128, 128], "scoring"
    model = "dskd", "256 px", [16, 3, 256, 256], "training step"
    entries = [entry for level, c, h in ((1, 256, 64), (2, 512, 32), (3, 1024, 16)) for entry in affinity(level, c, h)]
    for side in (32, 64, 128):
        growth = "growth", f"N = {side**2:,}", [1, 256, side, side], "forward+backward"
        seconds = side**4 / 1e9
        if side < 128:
            entries.append(
                timed(*growth, "eager", median=5 * seconds, reference=True, extra_bytes=24 * side**4),
            )
        entries.append(timed(*growth, "triton_fused", "tf32", median=seconds, ours=True, extra_bytes=2000 * side**2))
    entries += [
        timed(*cosine, "eager", median=2.5, rounds=1, extra_bytes_note="no such count | here"),
        timed(*model, "eager", median=1.6, reference=True, images=16),
        timed(*model, "dskd-fast", "tf32", median=0.4, images=16, ours=True),
        timed("spro", "4 | 5 maps", None, "sPRO", "MVTec's script", None, median=120.0, reference=True),
        timed("spro", "4 | 5 maps", None, "sPRO", "dskd-fast", None, median=0.75, ours=True),
        timed("cold", "first call", None, "start", "triton_fused", None, median=9.996, ours=True),
    ]
    last = "growth", "N = 16,384", [1, 256, 128, 128], "forward+backward"
    return {
        "machine_info": {"cpu": {"brand_raw": "Some CPU @ 2 GHz"}},
        "benchmarks": entries,
        "not_timed": [
            not_timed(*last, "eager", reason="it would take 24 GiB,\n  16 | 3 are free: see <class 'x'>"),
            not_timed(
                "cosine", "256 px, level 1", [2, 256, 64, 64], "forward", "cuda", "ieee", reason="no GPU", ours=True
            ),
        ],
        "convergence": [
            {"noise": noise, "contestant": contestant, "precision": precision, "ours": ours, "error": error(noise)}
            for contestant, precision, ours, error in (
                ("eager", "float32", False, lambda noise: 1e-6 / noise**2),
                ("triton_fused", "bf16", True, lambda noise: 2e-3),
                ("tiles", "float32", False, lambda noise: None),
            )
            for noise in (1, 0.1, 0.01, 0.001)
        ],
        "environment": {
            "commit": "0f4af86",
            "command": "pytest bench/ --benchmark-only -k 'a | b'",
            "device": "NVIDIA H100",
            "threads": 16,
            "python": "3.11.7",
            "torch": "2.14.1",
            "triton": "3.6.0",
            "pykeops": None,
            "anomalib": None,
            "date": "2026-02-03",
        },
    }


@pytest.fixture
def make(tmp_path, report, capsys):
    """Writes the content, runs the command, and returns (exit code, what it printed, its errors)."""

    def run(content, *options):
        path = tmp_path / "results.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        code = report.main([str(path), *options])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def text(make, content):
    code, text, errors = make(content, "--no-plots")
    assert (code, errors) == (0, "")
    return text


def rows_below(text, title):
    """The cells of the first table below a heading; the header's are the first row."""
    lines = iter(text.split(f"### {title}\n")[1].splitlines())
    table = []
    for line in lines:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")])
        elif table:
            break
    assert len({len(row) for row in table}) == 1
    return [table[0], *table[2:]]


def test_the_first_paragraph_tells_where_it_was_measured(text):
    assert text.split("\n\n")[1] == (
        "Measured on NVIDIA H100, CPU Some CPU @ 2 GHz, 16 threads with Python 3.11.7, PyTorch 2.14.1, Triton 3.6.0, "
        "at commit `0f4af86`, 2026-02-03, by `pytest bench/ --benchmark-only -k 'a | b'`."
    )


def test_a_table_has_all_that_was_measured(text):
    assert rows_below(text, "256 px, level 1, 2 x 256 x 64 x 64, forward+backward") == [
        [
            "contestant",
            "precision",
            "median, ms",
            "spread, ms",
            "speed-up over eager, float32",
            "extra memory, MiB",
            "error of map, 100 %",
            "error of map, 1 %",
            "error of gradient, 100 %",
            "error of gradient, 1 %",
            "% of product",
        ],
        ["**triton_fused**", "bf16", "3.00", "±0.12", "11.5x", "1.50", "2.0e-3", "2.1e-3", "", "", "61"],
        ["eager", "float32", "34.5", "±1.4", "1.00x", "3,070", "1.2e-7", "1.3", "3.0e-6", "0.046", "12"],
        ["KeOps", "float32", "69.0", "±2.8", "0.500x", "- (1)", "", "", "", "", ""],
    ]
    below = text.split("### 256 px, level 1, 2 x 256 x 64 x 64")[1].split("###")[0]
    assert "\n(1) measured on Linux alone.\n" in below
    told = "One N x N x C matrix product, timed after each row, takes 0.420 ms in bf16, 2.10 to 2.31 ms in float32."
    assert f"\n{told}\n" in below


def test_what_was_not_timed_is_a_row_with_its_reason(text):
    *_, last = rows_below(text, "N = 16,384, 1 x 256 x 128 x 128, forward+backward")
    reason = "not timed: it would take 24 GiB, 16 ¦ 3 are free: see &lt;class 'x'>"
    assert last == ["eager", "float32", reason, "", ""]
    assert rows_below(text, "256 px, level 1, 2 x 256 x 64 x 64, forward") == [
        ["contestant", "precision", "median"],
        ["**cuda**", "ieee", "not timed: no GPU"],
    ]


def test_what_was_rejected_keeps_its_errors(make, content):
    names = "affinity", "256 px, level 1", [2, 256, 64, 64], "forward+backward"
    wrong = not_timed(*names, "eager", "bf16", reason="it is wrong")
    wrong |= {"errors": {"100 %": [13.0, 0.5], "1 %": [None, math.inf]}}
    code, text, _ = make(content | {"not_timed": [wrong]}, "--no-plots")
    assert code == 0
    table = rows_below(text, "256 px, level 1, 2 x 256 x 64 x 64, forward+backward")
    assert table[-1] == ["eager", "bf16", "not timed: it is wrong", "", "", "", "13", "", "0.50", "inf", ""]


def test_a_speed_up_is_over_the_calls_that_took_turns(make, content):
    """The reference's own row was timed while the machine was twice slower."""
    names = "affinity", "256 px, level 1", [2, 256, 64, 64], "forward+backward"
    entries = [
        timed(*names, "eager", median=0.06, reference=True),
        timed(*names, "KeOps", median=0.012),
        timed(*names, "tiles", median=0.09, reference_seconds=0.045),
        timed(*names, "cpu", "bf16", median=0.01, ours=True, reference_seconds=0.03),
    ]
    code, text, _ = make(content | {"benchmarks": entries, "not_timed": []}, "--no-plots")
    assert code == 0
    table = rows_below(text, "256 px, level 1, 2 x 256 x 64 x 64, forward+backward")
    assert table[0][4] == "speed-up over eager, float32"
    assert {row[0]: row[4] for row in table[1:]} == {
        "**cpu**": "3.00x",
        "KeOps": "5.00x",
        "eager": "1.00x",
        "tiles": "0.500x",
    }
    glance = text.split("## At a glance\n\n")[1].split("\n\n")[0]
    assert "| cpu, bf16: 10.0 ms | KeOps, float32: 12.0 ms | 0.600x |" in glance
    alone = {"benchmarks": entries[3:], "not_timed": []}
    assert "| 3.00x |" in make(content | alone, "--no-plots")[1]


@pytest.fixture
def parts(content, tmp_path, report, capsys):
    """Writes the parts of a run, and returns (exit code, what the command printed, its errors)."""

    def run(*changes):
        paths = [tmp_path / f"part{i}.json" for i in range(len(changes))]
        for path, change in zip(paths, changes, strict=True):
            path.write_text(json.dumps(content | change), encoding="utf-8")
        code = report.main([*map(str, paths), "--no-plots"])
        return code, *capsys.readouterr()

    return run


def test_the_parts_of_a_run_give_the_report_of_the_whole(parts, content, text, tmp_path):
    entries, whole = content["benchmarks"], content["environment"]
    only = (
        who("spro", "4 | 5 maps", None, "sPRO", "dskd-fast", None),
        who("cold", "elsewhere", None, "start", "cpu", None),
    )
    first = {"benchmarks": entries[::2], "only_full": only, "environment": whole | {"command": "pytest -k a"}}
    second = {"benchmarks": entries[1::2], "not_timed": [], "convergence": []}
    code, together, errors = parts(first, second | {"environment": whole | {"command": "pytest -k b", "date": "later"}})
    assert (code, errors) == (0, "")
    told = f"`{whole['command']}`"
    expected = text.replace(f"{whole['date']}, by {told}", f"{whole['date']}, later, by `pytest -k a && pytest -k b`")
    # What one part has, no other leaves out.
    expected += "\n## Not in the quick run\n\n`--bench-full` times these as well:\n\n- Cold start: elsewhere (start)\n"
    assert together == expected
    assert (tmp_path / "benchmarks.md").read_text(encoding="utf-8") == together


def test_of_two_times_the_last_is_taken_and_none_is_lost_to_a_reason(parts):
    names = "affinity", "256 px, level 3", [2, 1024, 16, 16], "scoring", "cpu", "bf16"
    other, reason = timed(*names, median=0.002, ours=True), not_timed(*names, reason="no time", ours=True)
    older = {"benchmarks": [timed(*names, median=0.001, ours=True)], "not_timed": []}
    for newer, times in (
        ({"benchmarks": [other], "not_timed": []}, ["2.00", "±0.080"]),
        ({"benchmarks": [], "not_timed": [reason]}, ["1.00", "±0.040"]),
    ):
        code, text, _ = parts(older, newer)
        assert code == 0
        assert rows_below(text, "256 px, level 3, 2 x 1024 x 16 x 16, scoring")[1:] == [["**cpu**", "bf16", *times]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"environment": {"commit": "1"}}, "commit 0f4af86, "),
        ({"machine_info": {"cpu": {"brand_raw": "Another CPU"}}}, "the processor Some CPU @ 2 GHz, "),
    ],
)
def test_parts_of_different_runs_are_refused(parts, content, tmp_path, change, told):
    if "environment" in change:
        change = {"environment": content["environment"] | change["environment"]}
    mistake(parts({}, change), f"part0.json was measured with {told}", "part1.json with ", "one machine")
    assert not (tmp_path / "benchmarks.md").exists()


def test_groups_that_the_full_run_alone_has_are_listed(make, content, text):
    assert "--bench-full" not in text
    entries = [
        who("spro", "60 maps", None, "sPRO", "dskd-fast", None),
        who("affinity", "512 px, level 1", [1, 256, 128, 128], "scoring", "eager"),
        who("affinity", "512 px, level 1", [1, 256, 128, 128], "forward", "eager"),
        who("affinity", "256 px, level 1", [16, 256, 64, 64], "scoring", "eager"),
    ]
    code, text, _ = make(content | {"only_full": entries}, "--no-plots")
    assert code == 0
    assert text.endswith(
        "\n## Not in the quick run\n\n`--bench-full` times these as well:\n\n"
        "- Contextual affinity: 256 px, level 1, 16 x 256 x 64 x 64 (scoring); "
        "512 px, level 1, 1 x 256 x 128 x 128 (scoring, forward)\n"
        "- sPRO: 60 maps (sPRO)\n"
    )


def test_empty_columns_are_left_out(text):
    title = "512 px, level 1, 1 x 256 x 128 x 128, scoring"
    header, row = rows_below(text, title)
    assert header == ["contestant", "precision", "median, s", "spread, s"]
    assert row == ["eager", "float32", "2.50", "-"]
    assert "Extra memory was not measured: no such count \\| here." in text.split(title)[1].split("##")[0]


def test_the_other_kinds_have_tables_of_their_own(text):
    assert rows_below(text, "256 px, 16 x 3 x 256 x 256, training step") == [
        ["contestant", "precision", "median, s", "spread, s", "images/s", "speed-up over eager, float32"],
        ["**dskd-fast**", "tf32", "0.400", "±0.016", "40.0", "4.00x"],
        ["eager", "float32", "1.60", "±0.064", "10.0", "1.00x"],
    ]
    assert rows_below(text, "4 \\| 5 maps") == [
        ["contestant", "median, s", "spread, s", "speed-up over MVTec's script"],
        ["**dskd-fast**", "0.750", "±0.030", "160x"],
        ["MVTec's script", "120", "±4.8", "1.00x"],
    ]
    assert rows_below(text, "first call, start") == [
        ["contestant", "median, s", "spread, s"],
        ["**triton_fused**", "10.0", "±0.40"],
    ]


def test_the_fastest_of_ours_is_set_beside_the_fastest_other(text, make, content):
    """Not beside the slowest, nor beside what has no time; tables without both are left out."""
    growing = "Contextual affinity as the number of positions grows"
    lines = text.split("## At a glance\n\n")[1].split("\n\n")[0].replace("\\|", "¦").splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]] == [
        [
            f"Contextual affinity: 256 px, level {level}, 2 x {c} x {side} x {side}, forward+backward",
            "triton_fused, bf16: 3.00 ms",
            "eager, float32: 34.5 ms",
            "11.5x",
            "1.50 / 3,070",
        ]
        for level, c, side in ((1, 256, 64), (2, 512, 32), (3, 1024, 16))
    ] + [
        [
            f"{growing}: N = 1,024, 1 x 256 x 32 x 32, forward+backward",
            "triton_fused, tf32: 1.05 ms",
            "eager, float32: 5.24 ms",
            "5.00x",
            "1.95 / 24.0",
        ],
        [
            f"{growing}: N = 4,096, 1 x 256 x 64 x 64, forward+backward",
            "triton_fused, tf32: 16.8 ms",
            "eager, float32: 83.9 ms",
            "5.00x",
            "7.81 / 384",
        ],
        [
            "The whole model: 256 px, 16 x 3 x 256 x 256, training step",
            "dskd-fast, tf32: 0.400 s",
            "eager, float32: 1.60 s",
            "4.00x",
            "",
        ],
        ["sPRO: 4 ¦ 5 maps", "dskd-fast: 0.750 s", "MVTec's script: 120 s", "160x", ""],
    ]
    alone = [entry for entry in content["benchmarks"] if entry["extra_info"]["kind"] in ("cosine", "cold")]
    assert "At a glance" not in make(content | {"benchmarks": alone, "not_timed": []}, "--no-plots")[1]


def test_sections_and_groups_are_in_order(text, report):
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## At a glance", *(f"## {title}" for title in report.SECTIONS.values())]
    counts = [line.split(", 1 x")[0] for line in text.splitlines() if line.startswith("### N")]
    assert counts == ["### N = 1,024", "### N = 4,096", "### N = 16,384"]


def test_a_file_without_the_nullable_parts(make, content):
    bare = {key: content[key] for key in ("benchmarks", "environment")}
    bare = copy.deepcopy(bare) | {"machine_info": {"cpu": None}}
    bare["benchmarks"] = bare["benchmarks"][1:2]
    bare["benchmarks"][0]["group"] = None
    bare["environment"] = {"device": None}
    code, text, _ = make(bare, "--no-plots")
    assert code == 0
    assert text.split("\n\n")[1] == "Measured on an unknown machine."
    assert rows_below(text, "256 px, level 1, 2 x 256 x 64 x 64, forward+backward")[1] == [
        "KeOps",
        "float32",
        "69.0",
        "±2.8",
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (9.996, "10.0"), (0.00123456, "0.00123"), (12345, "12,300"), (math.nan, "nan"), (math.inf, "inf")],
)
def test_significant_digits(report, value, expected):
    assert report.significant(value) == expected


def test_only_tables_are_written_without_plots(text, tmp_path):
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmarks.md", "results.json"]
    assert (tmp_path / "benchmarks.md").read_text(encoding="utf-8") == text
    assert ".svg" not in text


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plots_are_written_and_shown(make, content, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "folder"
    code, text, errors = make(content, "--out", str(folder), "--format", suffix)
    assert (code, errors) == (0, "")
    names = [Path(name).with_suffix(f".{suffix}").name for name in PLOTS]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "benchmarks.md"])
    assert [name for name in names if f"({name})" in text] == names
    for name in names:
        data = (folder / name).read_bytes()
        if suffix == "svg":
            assert ET.fromstring(data).tag == "{http://www.w3.org/2000/svg}svg"
        else:
            assert data.startswith(b"\x89PNG")
    if suffix == "svg":
        drawn = (folder / "speedup.svg").read_text(encoding="utf-8")
        # matplotlib writes each text as a comment next to its outlines.
        assert all(f"<!-- {label} -->" in drawn for label in ("triton_fused, bf16", "KeOps, float32", "0.50", "12"))
        assert "<!-- error = value: nothing but noise -->" in (folder / "convergence.svg").read_text(encoding="utf-8")


def test_the_same_run_gives_the_same_plots(make, content, tmp_path):
    pytest.importorskip("matplotlib")
    make(content, "--out", str(tmp_path / "a"))
    make(content, "--out", str(tmp_path / "b"))
    for name in PLOTS:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_plots_without_data_are_told_and_not_written(make, content, tmp_path):
    pytest.importorskip("matplotlib")
    spro = [entry for entry in content["benchmarks"] if entry["extra_info"]["kind"] == "spro"]
    code, text, _ = make(content | {"benchmarks": spro, "convergence": []})
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmarks.md", "results.json"]
    assert [name for name in PLOTS if f"\n`{name}` was not drawn: the file has no " in text] == list(PLOTS)


def test_speed_ups_at_some_levels_only(make, content, tmp_path):
    """With one panel, and a bar that is missing in another."""
    pytest.importorskip("matplotlib")
    entries = affinity(1, 256, 64) + affinity(2, 512, 32)[:2]
    for count in (3, 5):
        code, *_ = make(content | {"benchmarks": entries[:count], "not_timed": []})
        assert code == 0
        drawn = (tmp_path / "speedup.svg").read_text(encoding="utf-8")
        assert ("<!-- not timed -->" in drawn) == (count == 5)


def mistake(result, *expected):
    code, output, errors = result
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1
    assert errors.startswith("report: ")
    for part in expected:
        assert part in errors


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ("", "is empty"),
        ("{", "is not JSON"),
        ("[]", "is not a result of this project's benchmarks"),
        ("{}", "'benchmarks' is missing"),
        ('{"benchmarks": [], "version": "5.3.1"}', "'environment' is missing"),
        (
            '{"benchmarks": [{"group": null, "name": "a", "stats": {"median": 1, "iqr": 0, "rounds": 1}, '
            '"extra_info": {}}]}',
            "'kind' is missing",
        ),
        ('{"benchmarks": [{"name": "a", "stats": {"median": 0}, "extra_info": {}}]}', "the median of a is 0.0"),
    ],
)
def test_another_file_is_refused(make, tmp_path, broken, expected):
    mistake(make(broken, "--out", str(tmp_path / "out")), "results.json", expected)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_an_unknown_kind_is_refused(make, content):
    other = copy.deepcopy(content["benchmarks"][:1])
    other[0]["extra_info"]["kind"] = "other"
    mistake(make(content | {"benchmarks": other}), "'other' is not a kind")


def test_bytes_that_are_not_text_are_refused(report, capsys, tmp_path):
    (tmp_path / "results.json").write_bytes(b"\xff\xfe\x00")
    mistake((report.main([str(tmp_path / "results.json")]), *capsys.readouterr()), "is not JSON")


def test_a_folder_is_refused(report, capsys, tmp_path):
    mistake((report.main([str(tmp_path)]), *capsys.readouterr()), "cannot be read")


def test_a_missing_file_is_told(report, capsys, tmp_path):
    path = tmp_path / "absent" / "results.json"
    mistake((report.main([str(path)]), *capsys.readouterr()), f"{path} does not exist", "--benchmark-json")
    assert not any(tmp_path.iterdir())


def test_a_missing_matplotlib_is_told(make, content, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    mistake(make(content, "--out", str(tmp_path / "out")), "pip install matplotlib", "--no-plots")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert make(content, "--no-plots")[0] == 0


def test_a_folder_that_cannot_be_written_is_told(make, content, tmp_path):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    mistake(make(content, "--no-plots", "--out", str(tmp_path / "taken")), "cannot be written", "--out")
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "mine"


def test_nothing_is_left_where_the_writing_fails(make, content, tmp_path, monkeypatch, report):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "out"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(report.Path, "replace", full)
        mistake(make(content, "--no-plots", "--out", str(folder)), "No space left on device")
    assert not any(folder.iterdir())


def test_as_a_command_without_torch(content, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    code = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['matplotlib'] = None; "
        f"sys.argv = ['report', {str(path)!r}, '--no-plots']; runpy.run_module('bench.report', run_name='__main__')"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
