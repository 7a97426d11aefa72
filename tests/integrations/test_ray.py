"""Ray Data on this machine; `tests/integrations.sh FOLDER ray` makes an environment that has it."""

import contextlib
import os
import re
import shutil
import signal
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

import dskd_fast
from dskd_fast.data.images import read_image
from dskd_fast.detection.predict import predict
from dskd_fast.errors import UserError

pytest.importorskip("ray", reason='needs ray: pip install "dskd-fast[ray]", or bash tests/integrations.sh FOLDER ray')

import pyarrow.parquet as pq
import ray

from dskd_fast.integrations.ray import Predict


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two workers at a time on this machine, and a core for reading, without which they may wait for ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # or it keeps a token in the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        memory = 100 * 2**20
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=memory)
        yield ray.data.ActorPoolStrategy(size=2)
        ray.shutdown()


@pytest.fixture(scope="module")
def archive(data_root, dead_frames, tmp_path_factory):
    """Twenty-six images, of which one is black, one damaged and one no image."""
    folder = tmp_path_factory.mktemp("archive")
    originals = [path for path in sorted(data_root.glob("screw_bag/*/*/*.png")) if "ground_truth" not in path.parts]
    paths = [folder / f"{i:03d}.png" for i in range(len(originals))]
    for path, original in zip(paths, originals, strict=True):
        shutil.copy(original, path)
    Image.fromarray(dead_frames["black"][0]).save(paths[3])
    paths[5].write_bytes(paths[5].read_bytes()[:-40])
    paths[11].write_text("no image")
    return paths


@pytest.fixture(scope="module")
def expected(tiny_detector, archive, tmp_path_factory):
    """What `predict` finds, by path."""
    found = predict(tiny_detector, archive, tmp_path_factory.mktemp("out"), threshold=1.0, overlays="none")
    return {one.path: one for one in found}


def check(rows, expected):
    """One row an image, with what `predict` has found; scores but for rounding, since batches are others."""
    assert sorted(row["path"] for row in rows) == sorted(expected)
    for row in rows:
        one = expected[row["path"]]
        names = ("threshold", "decision", "reason", "error", "decided_by")
        assert {name: row[name] for name in names} == {name: getattr(one, name) for name in names}
        assert (row["score"] is None) == (one.score is None)
        if one.score is not None:
            found = [row["score"], *(row[f"part_{name}"] for name in one.parts)]
            assert found == pytest.approx([one.score, *one.parts.values()], rel=1e-3, abs=1e-3)


def test_a_killed_worker_costs_no_image_and_doubles_none(cluster, archive, expected, tiny_run, tmp_path):
    killed = tmp_path / "killed"

    class Mortal(Predict):
        """One of the workers is killed after its first batch, when its pictures are written."""

        def __call__(self, batch):
            found = super().__call__(batch)
            with contextlib.suppress(FileExistsError):
                os.close(os.open(killed, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
            return found

    images = ray.data.from_items([{"path": str(path)} for path in archive], override_num_blocks=5)
    options = {"out": str(tmp_path / "pictures"), "threshold": 1.0, "overlays": "all"}
    found = images.map_batches(
        Mortal, fn_constructor_args=[str(tiny_run)], fn_constructor_kwargs=options, batch_size=4, compute=cluster
    )
    found.write_parquet(str(tmp_path / "scores"))
    assert killed.exists()
    rows = pq.read_table(tmp_path / "scores").to_pylist()
    check(rows, expected)
    pictures = [path.relative_to(tmp_path / "pictures").as_posix() for path in tmp_path.glob("pictures/*/*/*")]
    assert sorted(pictures) == sorted(row["overlay"] for row in rows if row["overlay"])
    assert len(pictures) == len(archive) - 2


@pytest.mark.usefixtures("cluster")
def test_the_script_of_the_readme_gives_the_same(archive, expected, tiny_run, tmp_path):
    text = (Path(dskd_fast.__file__).parent / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(import ray\n.*?)```", text, flags=re.DOTALL)
    for there, here in [
        ('"/data/archive"', repr(str(archive[0].parent))),
        ("/data/my_run", str(tiny_run)),
        ("/data/results", str(tmp_path)),
        ("size=8", "size=1"),
        ('"overlays": "anomalous"', '"overlays": "anomalous", "threshold": 1.0'),
    ]:
        assert there in script
        script = script.replace(there, here)
    # What an earlier job has left is not counted twice.
    for _ in range(2):
        exec(script, {})
    rows = pq.read_table(tmp_path / "scores").to_pylist()
    check(rows, expected)
    drawn = sorted(row["path"] for row in rows if row["decision"] in ("anomalous", "suspect"))
    assert sorted(row["path"] for row in rows if row["overlay"]) == drawn


def batch_of(paths, **columns):
    """As `map_batches` passes it: objects, since lengths and sizes differ."""
    batch = {}
    for name, values in {"path": list(map(str, paths)), **columns}.items():
        batch[name] = np.empty(len(paths), object)
        batch[name][:] = values
    return batch


def test_pixels_and_urls_give_the_same(archive, expected, tiny_run):
    memory = fsspec.filesystem("memory")
    for path in archive:
        memory.pipe_file(f"/archive/{path.name}", path.read_bytes())
    function = Predict(str(tiny_run), threshold=1.0)
    urls = [f"memory://archive/{path.name}" for path in archive]
    rows = function(batch_of(urls)).to_pylist()
    check([row | {"path": str(path)} for row, path in zip(rows, archive, strict=True)], expected)
    missing, *_ = function(batch_of(["memory://archive/none.png"])).to_pylist()
    assert (missing["score"], missing["error"]) == (None, "there is no such file")
    readable = [path for path in archive if expected[str(path)].error is None]
    rows = function(batch_of(readable, image=[read_image(path) for path in readable])).to_pylist()
    check(rows, {str(path): expected[str(path)] for path in readable})


@pytest.mark.parametrize("kind", ["a folder", "a URL"])
def test_a_batch_that_is_done_again_writes_the_same_pictures(archive, tiny_run, tmp_path, kind):
    out = str(tmp_path) if kind == "a folder" else "memory://pictures"
    file_system, root = fsspec.core.url_to_fs(out)
    function = Predict(str(tiny_run), out, overlays="all", save_maps=True)
    contents = []
    for _ in range(2):
        rows = function(batch_of(archive[:4])).to_pylist()
        files = [row[name] for row in rows for name in ("overlay", "map")]
        contents.append({name: file_system.cat_file(f"{root}/{name}") for name in files})
    assert contents[0] == contents[1]
    # Nothing half written lies beside them.
    assert len(file_system.find(root)) == len(contents[0]) == 8


def test_a_picture_that_cannot_be_written_is_an_error_of_its_row(archive, tiny_run, tmp_path):
    (tmp_path / "overlays").write_text("in the way")
    row, *_ = Predict(str(tiny_run), str(tmp_path), overlays="all")(batch_of(archive[:1])).to_pylist()
    assert row["score"] is not None
    assert row["overlay"] is None
    assert row["error"].startswith("cannot write")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [np.zeros((64, 64, 3), np.uint16)]}, "dtype uint16"),
        ({"image": [None]}, "NoneType"),
        ({"bytes": [b""]}, "empty"),
    ],
)
def test_what_is_no_image_is_an_error_of_its_row(tiny_run, columns, message):
    (row,) = Predict(str(tiny_run))(batch_of(["a.png"], **columns)).to_pylist()
    assert row["path"] == "a.png"
    assert message in row["error"]


def test_wrong_arguments_are_refused_in_a_sentence(tiny_run):
    for arguments, message in [({"overlays": "all"}, "pass out"), ({"out": "nowhere://folder"}, "fsspec knows")]:
        with pytest.raises(UserError, match=message):
            Predict(str(tiny_run), **arguments)
    with pytest.raises(UserError, match="the columns are item: have path"):
        Predict(str(tiny_run))({"item": np.array(["a.png"])})
