import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dskd_fast.detection.prediction import Prediction
from dskd_fast.errors import UserError
from dskd_fast.station import watch as module
from dskd_fast.station.inbox import Inbox
from dskd_fast.station.journal import Journal
from dskd_fast.station.watch import watch
from dskd_fast.training.checkpoints import stopping_signal

POLL = 0.01


@pytest.fixture
def inbox(tmp_path):
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def lines(out, are_judged=True):
    """Of images that are judged in this line, or in an earlier one under the name that it gives."""
    path = out / "decisions.jsonl"
    found = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    return [line for line in found if ("judged_as" not in line) == are_judged]


def save(path, shade=100):
    """An image of one shade, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}")
    Image.new("RGB", (32, 32), (shade % 256, shade // 256, 50)).save(hidden, path.suffix[1:])
    return hidden.rename(path)


@pytest.fixture
def stub(monkeypatch):
    """A detector that calls every image normal."""
    detector = SimpleNamespace(bits=None, resized=lambda image: torch.zeros(3, 1, 1, dtype=torch.uint8))
    judge = module.judge

    def judge_normal(used, images, paths, threshold):
        if used is not detector:
            return judge(used, images, paths, threshold)
        return [Prediction(path, 0.0, threshold, "normal") for path in paths], None

    monkeypatch.setattr(module, "judge", judge_normal)
    return detector


@pytest.fixture
def watched(stub, inbox, out):
    """Watches until there are `n` new lines, then for some more looks; returns all new ones, as they were emitted.

    `meanwhile` is called with their number again and again.
    """

    def run(n, detector=stub, meanwhile=lambda n: None, extra=12, **options):
        emitted, looks_after = [], 0
        deadline = time.monotonic() + 60

        def is_stopped():
            nonlocal looks_after
            meanwhile(len(emitted))
            looks_after += len(emitted) >= n  # two for each look
            assert time.monotonic() < deadline, emitted
            return looks_after > extra

        arguments = {"threshold": 1.0, "poll": POLL, "patience": 5 * POLL} | options
        before = len(lines(out))
        watch(detector, inbox, out, emit=emitted.append, is_stopped=is_stopped, **arguments)
        assert [json.loads(line) for line in emitted] == lines(out)[before:]
        return lines(out)[before:]

    return run


def test_what_a_line_says_and_which_overlays_there_are(
    watched, tiny_detector, write_images, dead_frames, inbox, out, below
):
    paths = write_images(inbox / "camera 1", 3)
    Image.fromarray(dead_frames["black"][0]).save(inbox / "black.png")
    (inbox / "broken.png").write_bytes(b"\x89PNG garbage")
    (inbox / "photo.heic").write_bytes(b"...")
    (inbox / "notes.txt").write_text("no image")
    judged = tiny_detector.predict(paths)
    threshold = sorted(one.score for one in judged)[1] - 1e-3
    found = {line["path"]: line for line in watched(6, tiny_detector, threshold=threshold)}
    assert len(found) == 6
    for path, one in zip(paths, judged, strict=True):
        line = found[f"camera 1/{path.name}"]
        assert line["score"] == pytest.approx(one.score, rel=1e-4, abs=1e-4)
        assert (line["parts"].keys(), line["decided_by"]) == (one.parts.keys(), one.decided_by)
        assert line["decision"] == ("anomalous" if one.score > threshold else "normal")
        assert line["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (line["size"], line["mtime_ns"]) == (path.stat().st_size, path.stat().st_mtime_ns)
        assert 0 < line["seconds"] < line["latency"]
        assert (line["overlay"] is None) == (line["decision"] == "normal")
    assert found["black.png"]["decision"] == "suspect"
    assert found["black.png"]["reason"].startswith("too dark")
    assert found["broken.png"]["error"].startswith("it is no PNG")
    assert found["broken.png"]["latency"] >= 5 * POLL
    assert found["photo.heic"]["error"].startswith(".heic files are not read")
    drawn = {line["overlay"] for line in found.values()} - {None}
    assert {name for name in below(out) if name.endswith(".jpg")} == drawn


def test_the_order_is_that_of_the_last_change_then_natural(watched, inbox):
    for i, name in enumerate(["b.png", "10.png", "9.png"]):
        save(inbox / name, i)
    for name, when in (("b.png", 10), ("10.png", 20), ("9.png", 20)):
        os.utime(inbox / name, (when, when))
    assert [line["path"] for line in watched(3)] == ["b.png", "9.png", "10.png"]


def test_what_makes_a_file_another_image(watched, inbox, out):
    """And what does not; again after a restart."""
    first = save(inbox / "1.png", 1)
    assert len(watched(1)) == 1
    first.rename(inbox / "2.png")
    os.link(inbox / "2.png", inbox / "linked.png")
    assert watched(0) == []
    os.utime(inbox / "2.png")  # of the hard link, too
    assert watched(0) == []
    shutil.copy(inbox / "2.png", inbox / "copy.png")
    assert [line["path"] for line in watched(1)] == ["copy.png"]
    (inbox / "copy.png").write_bytes((inbox / "2.png").read_bytes())
    assert watched(0) == []
    save(inbox / "copy.png", 2)
    save(inbox / "1.png", 3)
    assert sorted(line["path"] for line in watched(2)) == ["1.png", "copy.png"]
    again = Counter((line["path"], line["judged_as"]) for line in lines(out, are_judged=False))
    assert again == {("2.png", "1.png"): 2, ("linked.png", "1.png"): 2, ("copy.png", "copy.png"): 1}


def test_a_slow_writer_is_waited_for_and_holds_up_nobody(watched, inbox):
    whole, slow = save(inbox / "whole.png", 7).read_bytes(), inbox / "slow.png"
    slow.write_bytes(whole[:40])

    def meanwhile(n):
        state = slow.stat()  # the same for long enough to be tried
        if n >= 1 and state.st_size < len(whole) and time.time() - state.st_mtime > 3 * POLL:
            slow.write_bytes(whole[: state.st_size + 5])

    found = watched(2, meanwhile=meanwhile, patience=1e9)
    assert [(line["path"], line["error"]) for line in found] == [("whole.png", None), ("slow.png", None)]


def test_a_file_that_changes_while_it_is_read_is_read_again(watched, inbox, monkeypatch):
    path, fstat = save(inbox / "1.png"), os.fstat

    def changing(file):
        found = fstat(file)
        if found.st_ino == path.stat().st_ino:
            os.utime(path, (1, 1))
        return found

    monkeypatch.setattr(os, "fstat", changing)
    assert [line["mtime_ns"] for line in watched(1)] == [10**9]


def test_a_file_that_cannot_be_decoded_is_tried_ever_more_rarely_until_its_last_try(inbox):
    path = save(inbox / "1.png")
    files = Inbox(inbox, lambda folder: False, lambda state: False, poll=1)
    tries = []
    for now in range(40):
        for candidate in files.look(now):
            tries.append(now)
            files.postpone(candidate, now, last_try=candidate.unchanged_since + 10)
        if now == 20:
            path.write_bytes(b"another")
    assert tries == [1, 2, 4, 8, 10, 22, 23, 25, 29, 31]


@pytest.mark.parametrize("damage", [b'{"path": "2.png", "score"', b"\0" * 300])
def test_half_a_line_is_cut_off_and_its_image_judged_again(watched, inbox, out, damage, caplog):
    save(inbox / "1.png", 1)
    watched(1)
    with (out / "decisions.jsonl").open("ab") as file:
        file.write(damage)
    save(inbox / "2.png", 2)
    with caplog.at_level("INFO", "dskd_fast"), Journal(out / "decisions.jsonl") as journal:
        assert len(journal) == 1
    assert "half a line" in caplog.text
    assert [line["path"] for line in watched(1)] == ["2.png"]


def test_a_file_that_is_not_ours_or_in_use_is_refused(watched, out, inbox, tmp_path):
    out.mkdir()
    with Journal(out / "decisions.jsonl"), pytest.raises(UserError, match="another process writes into"):
        watched(0)
    (out / "decisions.jsonl").write_text('{"path": "1.png"}\n')
    with pytest.raises(UserError, match="has a line 1 that was not written by this program"):
        watched(0)
    (out / "decisions.jsonl").unlink()
    inbox.rmdir()
    with pytest.raises(UserError, match="there is no folder"):
        watched(0)


def test_decisions_at_another_threshold_are_named(watched, inbox, caplog):
    save(inbox / "a.png")
    for n, threshold in ((1, 1.0), (0, 1.0), (0, 2.0)):
        assert "another run or threshold" not in caplog.text
        watched(n, threshold=threshold)
    assert caplog.text.count("another run or threshold") == 1


def test_a_full_disk_is_waited_out_with_one_message(watched, inbox, out, monkeypatch, caplog):
    monkeypatch.setattr(module, "_RETRY", POLL)
    save(inbox / "1.png", 1)
    write, n_failures = os.write, 0

    def full(file, data):
        nonlocal n_failures
        if bytes(data).startswith(b'{"path') and n_failures < 3:
            n_failures += 1
            write(file, data[:10])  # what there was room for
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", full)
    with caplog.at_level("INFO", "dskd_fast"):
        assert [line["path"] for line in watched(1)] == ["1.png"]
    assert n_failures == 3
    assert caplog.messages[1:] == [
        "the file of decisions cannot be used: No space left on device; waiting until that is mended",
        "mended: it goes on",
    ]


def test_folders_that_vanish_are_waited_out_and_nothing_is_judged_twice(
    watched, inbox, out, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(module, "_RETRY", POLL)
    save(inbox / "1.png", 1)
    stage = 0

    def meanwhile(n):
        nonlocal stage
        before = (stage, n, caplog.text.count("waiting until"))
        if before == (0, 1, 0):
            inbox.rename(tmp_path / "away")
        elif before == (1, 1, 1):
            (tmp_path / "away").rename(inbox)
            out.rename(tmp_path / "out away")
            out.mkdir()  # as a mount point has it
            save(inbox / "2.png", 2)
        elif before == (2, 1, 2):
            shutil.rmtree(out)
            (tmp_path / "out away").rename(out)
        else:
            return
        stage += 1

    with caplog.at_level("INFO", "dskd_fast"):
        assert [line["path"] for line in watched(2, meanwhile=meanwhile)] == ["1.png", "2.png"]
    assert (stage, caplog.text.count("it goes on")) == (3, 2)


def test_what_this_or_an_earlier_watch_has_drawn_is_not_judged(write_images, inbox, tiny_detector):
    write_images(inbox, 2)
    options = {"threshold": -1e9, "poll": POLL}
    for out in (inbox / "results", inbox / "others"):
        emitted, looks = [], iter([False] * 40)
        watch(
            tiny_detector, inbox, out, emit=emitted.append, is_stopped=lambda looks=looks: next(looks, True), **options
        )
        assert [json.loads(line)["path"] for line in emitted] == ["000.png", "001.png"]
        assert len([*(out / "overlays").iterdir()]) == 2
    for folder, out in ((inbox, inbox), (inbox / "results" / "overlays", inbox / "results")):
        with pytest.raises(UserError, match=r"would lie among the images of .*: choose another --out$"):
            watch(tiny_detector, folder, out, emit=print, is_stopped=lambda: True, **options)


@pytest.mark.slow
def test_hundreds_of_images_written_anyhow_are_judged_once_each_by_a_process_that_is_killed(stub, inbox, out, fork):
    """In pieces, renamed into place, renamed later or copied, at random speed."""
    n, n_writers, written = 400, 4, []

    def write(part):
        rng = random.Random(part)
        for i in range(part, n, n_writers):
            target = inbox / f"line {i % 3}" / f"{i}.png"
            way = rng.choice(["in pieces", "into place", "renamed", "copied"])
            data = save(target if way != "in pieces" else target.with_name(f".{i}.png"), i).read_bytes()
            if way == "in pieces":
                with target.open("wb", buffering=0) as file:
                    for piece in (data[:60], data[60:]):
                        file.write(piece)
                        time.sleep(rng.choice((0, 0.001, 3 * POLL)))
            elif way == "renamed":
                time.sleep(rng.choice((0, 3 * POLL)))
                target.rename(target.with_name(f"{i}-renamed.png"))
            elif way == "copied":
                shutil.copy2(target, target.with_name(f"{i}-copy.png"))
            written.extend([hashlib.sha256(data).hexdigest()] * (1 + (way == "copied")))
            time.sleep(rng.choice((0, 0, 0.01)))

    def station():
        (out.parent / "pid").write_text(str(os.getpid()))
        with stopping_signal(True) as is_stopped:
            options = {"threshold": 1.0, "poll": POLL, "patience": 1e9, "is_stopped": is_stopped}
            watch(stub, inbox, out, emit=lambda line: None, **options)

    def judged():
        path = out / "decisions.jsonl"
        return path.read_bytes().count(b'"decision"') if path.exists() else 0

    ends, deadline = [], time.monotonic() + 240
    with ThreadPoolExecutor(n_writers) as pool:
        writers = [pool.submit(write, part) for part in range(n_writers)]
        for until in (40, 140, 280, None):
            wait = fork(station)
            while judged() < until if until else any(not w.done() for w in writers) or judged() < len(written):
                assert time.monotonic() < deadline, (judged(), len(written))
                time.sleep(0.02)
            time.sleep(10 * POLL if until is None else 0)
            os.kill(int((out.parent / "pid").read_text()), signal.SIGKILL if until else signal.SIGTERM)
            ends.append(wait())
    assert ends == [-signal.SIGKILL] * 3 + [0]
    assert {line["error"] for line in lines(out)} == {None}
    assert Counter(line["sha256"] for line in lines(out)) == Counter(written)
    assert len(written) > n
