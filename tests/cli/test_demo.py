import json

import pytest

import dskd_fast.cli.commands as commands
import dskd_fast.cli.demo as demo


@pytest.fixture
def tiny(monkeypatch, tiny_options):
    """The demo with few small images and the tiny teacher."""
    counts = {"n_train": 4, "n_validation": 2, "n_test_good": 4, "n_structural": 2, "n_logical": 1}
    monkeypatch.setattr(demo, "_COUNTS", counts | {"size": (120, 96)})
    monkeypatch.setattr(
        commands, "options_for_demo", lambda device, seed: tiny_options(device=device, seed=seed, image_size=32)
    )


def test_the_demo_walks_the_whole_way_once_and_says_so_when_called_again(tiny, cli, cli_error, tmp_path):
    out = tmp_path / "my demo"
    result = cli("demo", "--out", out, "--device", "cpu", "--seed", 3)
    assert result.code == 0
    assert result.err == ""
    for stage in ("1. drawing", "2. training", "3. evaluating", "4. drawing heat maps"):
        assert stage in result.out
    metrics = json.loads((out / "run" / "metrics.json").read_text())
    assert metrics["n_images"] == {"good": 4, "structural": 2, "logical": 1}
    assert metrics["absent"] == []
    assert json.loads((out / "run" / "config.json").read_text())["options"]["seed"] == 3
    rows = [json.loads(line) for line in (out / "heat_maps" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 7
    assert (out / "heat_maps" / "overlays" / "logical_anomalies" / "000.jpg").is_file()
    assert {row["threshold"] for row in rows} == {metrics["threshold"]}

    before = (out / "run" / "config.json").read_bytes()
    drawn = {path: path.stat().st_mtime_ns for path in (out / "data").rglob("*.png")}
    assert len(drawn) == 4 + 2 + 7 + 3
    message = cli_error("demo", "--out", out, "--device", "cpu", "--seed", 3)
    assert str(out / "run") in message
    assert "already exists: choose another name" in message
    assert (out / "run" / "config.json").read_bytes() == before
    message = cli_error("demo", "--out", out, "--device", "cpu", "--seed", 4)
    assert "delete it or choose another folder" in message
    # The same images are not drawn again.
    assert {path: path.stat().st_mtime_ns for path in (out / "data").rglob("*.png")} == drawn
