"""The benchmarks' report, from a small file made by hand."""

import json

import pytest

from bench import tables

NAMES = {"kind": "affinity", "work": "256 px, level 1", "shape": [2, 256, 64, 64], "mode": "forward+backward"}
OURS = {"precision": "bf16", "ours": True}


def timed(contestant, median, **extra):
    info = NAMES | {"contestant": contestant, "precision": "fp32", "reference": contestant == "eager"} | extra
    stats = {"median": median, "iqr": 0.08 * median, "rounds": 5, "min": 0.9 * median, "data": [median] * 5}
    return {"group": f"{info['work']} {info['mode']}", "name": "test", "stats": stats, "extra_info": info}


@pytest.fixture
def content():
    errors = {"100 %": [1.25e-7, 3e-6], "1 %": [1.31, 0.0456]}
    entries = [
        # Its own row was timed while the machine was twice slower than in turn with the others.
        timed("eager", 0.069, errors=errors, extra_bytes=3 * 2**30, percent_of_product=12.3),
        timed("cpu", 0.003, **OURS, reference_seconds=0.0345, extra_bytes=2**20 + 2**19, percent_of_product=61.2),
        timed("tiles", 0.138, reference_seconds=0.0345, extra_bytes_note="measured on Linux alone"),
        timed("DSKD", 9.996, kind="dskd", work="4 | 5 images", shape=None, mode="training step", ours=True, images=16),
    ]
    for side in (32, 64):
        work = {"kind": "growth", "work": f"N = {side**2:,}", "shape": [1, 256, side, side]}
        entries.append(timed("eager", 5 * side**4 / 1e9, **work, extra_bytes=24 * side**4))
    left_out = timed("KeOps", 1, group=entries[0]["group"])["extra_info"] | {"reason": "it would take\n 24 | 3 GiB"}
    point = {"noise": 0.1, "contestant": "eager", "precision": "fp32", "ours": False, "error": 1e-3}
    names = {"device": "cpu", "threads": 2, "python": "3.11.7", "torch": "2.14.1", "triton": None}
    return {
        "machine_info": {"cpu": {"brand_raw": "Some CPU @ 2 GHz", "flags": ["a"] * 100}},
        "benchmarks": entries,
        "not_timed": [left_out],
        "only_full": ["sPRO of 60 maps", "affinity: 512 px"],
        "convergence": [point, point | {"noise": 1, "error": None}],
        "environment": names | {"commit": "0f4af86", "command": "pytest", "date": "2026-02-03"},
    }


@pytest.fixture
def make(tmp_path, capsys):
    """Writes the content, runs the command, and returns (exit code, what it printed, its errors)."""

    def run(content, out=tmp_path / "out"):
        path = tmp_path / "results.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tables.main([str(path), "--out", str(out)]), *capsys.readouterr()

    return run


def test_the_tables_have_what_the_file_has(make, content):
    code, text, errors = make(content)
    assert (code, errors) == (0, "")
    machine = "Measured on cpu, CPU Some CPU @ 2 GHz, 2 threads with Python 3.11.7, PyTorch 2.14.1"
    assert f"{machine}, at commit `0f4af86`, 2026-02-03, by ``pytest``." in text
    lines = text.split("### 256 px, level 1, 2 x 256 x 64 x 64, forward+backward\n\n")[1].split("\n\n#")[0].splitlines()
    assert lines[0].startswith("| contestant | precision | median, ms | spread, ms | speed-up over eager, fp32 | ")
    assert lines[2:] == [
        "| **cpu** | bf16 | 3.00 | ±0.12 | 11.5x | 1.50 |  |  |  |  | 61 |",
        "| eager | fp32 | 69.0 | ±2.8 | 1.00x | 3,070 | 1.2e-7 | 1.3 | 3.0e-6 | 0.046 | 12 |",
        "| tiles | fp32 | 138 | ±5.5 | 0.250x |  |  |  |  |  |  |",
        "| KeOps | fp32 | not timed: it would take 24 \\| 3 GiB |  |  |  |  |  |  |  |  |",
        "",
        "Extra memory was not measured: measured on Linux alone.",
    ]
    assert "| **DSKD** | fp32 | 10.0 | ±0.40 | 1.60 |" in text.split("### 4 \\| 5 images, training step")[1]
    assert " | cpu, bf16: 3.00 ms | eager, fp32: 69.0 ms | 11.5x | 1.50 / 3,070 |" in text.split("## At a glance")[1]
    assert text.endswith("`--bench-full` times these as well: sPRO of 60 maps; affinity: 512 px.\n")
    assert text.index("### N = 1,024, 1 x 256 x 32 x 32") < text.index("### N = 4,096, 1 x 256 x 64 x 64")


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ("", "results.json is not a result of this project's benchmarks"),
        ('{"benchmarks": [], "version": "5.3.1"}', "'environment'"),
        ('{"rows": [{"kind": "x", "group": "g", "work": "w", "mode": "m", "contestant": "c"}]}', "kind 'x'"),
    ],
)
def test_another_file_is_refused(make, tmp_path, broken, expected):
    code, text, errors = make(broken)
    assert (code, text, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("bench.tables: ")
    assert expected in errors
    assert not (tmp_path / "out").exists()
