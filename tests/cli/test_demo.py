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
    out, command = tmp_path / "my demo", ("demo", "--out", tmp_path / "my demo", "--device", "cpu", "--seed")
    code, said, err = cli(*command, 3)
    assert (code, err) == (0, "")
    for stage in ("1. drawing", "2. training", "3. evaluating", "4. drawing heat maps"):
        assert stage in said
    metrics = json.loads((out / "run" / "metrics.json").read_text())
    assert metrics["n_images"] == {"good": 4, "structural": 2, "logical": 1}
    assert metrics["absent"] == []
    assert json.loads((out / "run" / "config.json").read_text())["options"]["seed"] == 3
    rows = [json.loads(line) for line in (out / "heat_maps" / "predictions.jsonl").read_text().splitlines()]
    assert [row["threshold"] for row in rows] == [metrics["threshold"]] * 7
    assert (out / "heat_maps" / "overlays" / "logical_anomalies" / "000.jpg").is_file()

    def there():
        return {path: path.stat().st_mtime_ns for path in (*(out / "data").rglob("*.png"), out / "run" / "config.json")}

    before = there()
    assert len(before) == 4 + 2 + 7 + 3 + 1
    assert f"{out / 'run'} already exists: choose another name" in cli_error(*command, 3)
    assert "delete it or choose another folder" in cli_error(*command, 4)
    assert there() == before  # the same images are not drawn again
