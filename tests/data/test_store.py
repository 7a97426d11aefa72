import numpy as np
import pytest
import torch
from PIL import Image

import dskd_fast.data.store as store_module
from dskd_fast.data.exposure import measure_exposure
from dskd_fast.data.images import ImageError
from dskd_fast.data.store import Batches, ImageStore

KEEP_ALL = 2 * 2**30


@pytest.fixture
def paths(write_images, tmp_path):
    return [write_images(tmp_path / f"größe {i}", 1, size=(64 - i, 40 + i), seed=i)[0] for i in range(7)]


def expected(path, size):
    resized = Image.open(path).resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


@pytest.mark.parametrize(("memory_limit", "decoded_later"), [(KEEP_ALL, 0), (0, 2)])
def test_batches_are_the_resized_images_in_the_order_asked_for(paths, monkeypatch, memory_limit, decoded_later):
    calls, read = [], store_module.read_image_and_peak
    monkeypatch.setattr(store_module, "read_image_and_peak", lambda path, **o: calls.append(path) or read(path, **o))
    store = ImageStore(paths, 32, memory_limit=memory_limit)
    assert sorted(calls) == sorted(paths)
    store.batch([0, 1]).zero_()  # a batch is a copy
    assert len(calls) - 7 == decoded_later
    assert len(store) == 7
    assert store.native_sizes == tuple((40 + i, 64 - i) for i in range(7))
    order = [6, 0, 3, 3, 1]
    for indices in (order, torch.tensor(order), np.array(order)):
        batch = store.batch(indices)
        assert (batch.dtype, batch.shape) == (torch.uint8, (5, 3, 32, 32))
        assert torch.equal(batch, torch.stack([expected(paths[i], 32) for i in order]))
    assert [x.tolist() for x in store.exposures] == [x.tolist() for x in measure_exposure(store.batch(range(7)))]
    batches = Batches(store, order, 2)
    for _ in range(2):
        assert [len(batch) for batch in batches] == [2, 2, 1]
        assert torch.equal(torch.cat(list(batches)), store.batch(order))
    for index in (-1, 7):
        with pytest.raises(IndexError, match="from 0 to 6"):
            store.batch([0, index])


def test_the_limit_is_inclusive_to_the_byte_and_no_images_are_possible(paths):
    for short, in_memory in ((0, True), (1, False)):
        assert ImageStore(paths, 32, memory_limit=7 * 3 * 32 * 32 - short).in_memory is in_memory
    store = ImageStore([], 32)
    assert (len(store), store.native_sizes, store.batch([]).shape) == (0, (), (0, 3, 32, 32))


@pytest.mark.parametrize("memory_limit", [KEEP_ALL, 0])
def test_one_error_names_every_bad_file_and_no_good_one(paths, memory_limit):
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    paths[4].write_bytes(b"")
    paths[6].unlink()
    seen = []
    with pytest.raises(ImageError, match=r"^3 images are unusable [^\n]+$") as caught:
        ImageStore(paths, 32, memory_limit=memory_limit, progress=lambda *counts: seen.append(counts[1:]))
    assert [path for path, _ in caught.value.failures] == [paths[1], paths[4], paths[6]]
    assert [f"{path}: " in str(caught.value) for path in paths] == [i in (1, 4, 6) for i in range(7)]
    assert seen == [(i, 7) for i in range(1, 8)]


def test_values_of_16_bits_are_read_with_the_range_that_is_given(tmp_path):
    deep, shallow = tmp_path / "deep.png", tmp_path / "shallow.png"
    Image.fromarray(np.full((40, 48), 1023, np.uint16)).save(deep)
    Image.fromarray(np.full((40, 48), 200, np.uint8)).save(shallow)
    store = ImageStore([deep, shallow], 32, bits=10, memory_limit=0)
    assert store.peaks == (1023, None)
    assert store.batch([0, 1]).float().mean((1, 2, 3)).tolist() == [255, 200]
    with pytest.raises(ImageError, match="above 511"):
        ImageStore([deep, shallow], 32, bits=9)
