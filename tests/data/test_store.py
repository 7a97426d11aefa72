import numpy as np
import pytest
import torch
from PIL import Image

import dskd_fast.data.store as store_module
from dskd_fast.data.exposure import measure_exposure
from dskd_fast.data.images import ImageError
from dskd_fast.data.store import ImageStore


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i in range(7):
        array = rng.integers(0, 256, (40 + i, 64 - i, 3), dtype=np.uint8)
        paths.append(tmp_path / f"bild {i} ü.png")
        Image.fromarray(array).save(paths[-1])
    return paths


def expected(path, size):
    resized = Image.open(path).resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


@pytest.mark.parametrize("memory_limit", [2 * 2**30, 0])
def test_batches_are_the_resized_images_in_the_order_asked_for(paths, memory_limit):
    store = ImageStore(paths, 32, memory_limit=memory_limit)
    assert len(store) == 7
    assert store.in_memory == (memory_limit > 0)
    assert store.native_sizes == tuple((40 + i, 64 - i) for i in range(7))
    order = [6, 0, 3, 3]
    for indices in (order, torch.tensor(order), np.array(order)):
        batch = store.batch(indices)
        assert batch.dtype == torch.uint8
        assert batch.shape == (4, 3, 32, 32)
        for image, index in zip(batch, order, strict=True):
            assert torch.equal(image, expected(paths[index], 32))
    assert store.batch([]).shape == (0, 3, 32, 32)
    assert [x.tolist() for x in store.exposures] == [x.tolist() for x in measure_exposure(store.batch(range(7)))]


@pytest.mark.parametrize("memory_limit", [2 * 2**30, 0])
def test_a_batch_is_a_copy(paths, memory_limit):
    store = ImageStore(paths, 32, memory_limit=memory_limit)
    before = store.batch([0]).clone()
    store.batch([0]).zero_()
    assert torch.equal(store.batch([0]), before)


@pytest.mark.parametrize(("short", "in_memory"), [(0, True), (1, False)])
def test_the_limit_is_inclusive_to_the_byte(paths, short, in_memory):
    limit = 7 * 3 * 32 * 32 - short
    assert ImageStore(paths, 32, memory_limit=limit).in_memory is in_memory


@pytest.mark.parametrize(("memory_limit", "later"), [(2 * 2**30, 0), (0, 2)])
def test_how_often_files_are_decoded(paths, monkeypatch, memory_limit, later):
    calls = []
    original = store_module.read_image
    monkeypatch.setattr(store_module, "read_image", lambda path: calls.append(path) or original(path))
    store = ImageStore(paths, 32, memory_limit=memory_limit)
    assert sorted(calls) == sorted(paths)
    calls.clear()
    store.batch([1, 5])
    assert len(calls) == later


@pytest.mark.parametrize("memory_limit", [2 * 2**30, 0])
def test_one_error_names_every_bad_file_and_no_good_one(paths, memory_limit):
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    paths[4].write_bytes(b"")
    paths[6].unlink()
    with pytest.raises(ImageError) as caught:
        ImageStore(paths, 32, memory_limit=memory_limit)
    assert [path for path, _ in caught.value.failures] == [paths[1], paths[4], paths[6]]
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("3 images")
    assert message.count("; ") == 2
    for i, path in enumerate(paths):
        assert (f"{path}: " in message) == (i in (1, 4, 6))


def test_a_streamed_file_that_goes_bad_later(paths):
    store = ImageStore(paths, 32, memory_limit=0)
    paths[2].unlink()
    with pytest.raises(ImageError, match="no such file"):
        store.batch([0, 2])


def test_progress_counts_bad_files_too(paths):
    paths[0].write_bytes(b"")
    seen = []
    with pytest.raises(ImageError):
        ImageStore(paths, 32, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 7) for i in range(1, 8)]


def test_no_images():
    store = ImageStore([], 32)
    assert len(store) == 0
    assert store.native_sizes == ()
    assert store.batch([]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("index", [-1, 7])
@pytest.mark.parametrize("memory_limit", [2 * 2**30, 0])
def test_indices_out_of_range(paths, index, memory_limit):
    with pytest.raises(IndexError, match="from 0 to 6"):
        ImageStore(paths, 32, memory_limit=memory_limit).batch([0, index])


@pytest.mark.parametrize(("arguments", "name"), [({"size": 0}, "size"), ({"memory_limit": -1}, "memory_limit")])
def test_bad_arguments(paths, arguments, name):
    with pytest.raises(ValueError, match=name):
        ImageStore(paths, **{"size": 32, **arguments})
