"""watch and serve as processes."""

import json
import os
import re
import signal
import sys
import time
import urllib.request

import pytest

from dskd_fast.cli import display, main
from dskd_fast.cli import station as module


def until(path, pattern, seconds=60):
    """What matches in a file, as soon as something does."""
    deadline = time.monotonic() + seconds
    while not (found := re.search(pattern, path.read_text() if path.exists() else "")):
        assert time.monotonic() < deadline, path.read_text() if path.exists() else "no file"
        time.sleep(0.02)
    return found


@pytest.fixture
def background(fork, tmp_path):
    """Starts a command line as a process that writes into out and err: background(...) -> end(signal) -> exit code."""

    def start(*arguments):
        def work():
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            display.console.file = sys.stdout
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            (tmp_path / "pid").write_text(str(os.getpid()))
            return main([str(argument) for argument in arguments])

        wait = fork(work)

        def end(number):
            os.kill(int((tmp_path / "pid").read_text()), number)
            return wait()

        return end

    return start


def test_watch_writes_lines_for_programs_and_sentences_for_people(background, tiny_run, write_images, tmp_path):
    write_images(tmp_path / "inbox", 2)
    end = background("watch", tiny_run, tmp_path / "inbox", "--out", tmp_path / "results", "--poll", "0.01")
    until(tmp_path / "out", r"001\.png.*\n")
    assert end(signal.SIGTERM) == 0
    lines = (tmp_path / "out").read_text()
    assert lines == (tmp_path / "results" / "decisions.jsonl").read_text()
    assert [json.loads(line)["path"] for line in lines.splitlines()] == ["000.png", "001.png"]
    said = (tmp_path / "err").read_text()
    assert said.startswith(f"dskd-fast: watching {tmp_path / 'inbox'}, decisions in ")
    assert "stopping after the image in hand" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_where_it_is_answers_and_ends_with_0(background, tiny_run, write_images, tmp_path, number):
    (path,) = write_images(tmp_path, 1)
    end = background("serve", tiny_run, "--port", "0")
    address = until(tmp_path / "out", r"at (http://127\.0\.0\.1:\d+/);")[1]
    with urllib.request.urlopen(f"{address}predict", path.read_bytes(), timeout=60) as answer:
        assert json.load(answer)["decision"] in ("normal", "anomalous")
    assert end(number) == 0
    assert (tmp_path / "err").read_text() == ""


def test_what_cannot_be_is_said_in_a_sentence(cli_error, tiny_run, tmp_path, monkeypatch):
    assert "there is no folder" in cli_error("watch", tiny_run, tmp_path / "none", "--out", tmp_path / "results")
    with module._listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1, port {port} (" in cli_error("serve", tiny_run, "--port", port)
    assert "no address of this machine" in cli_error("serve", tiny_run, "--host", "256.0.0.1")
    monkeypatch.setattr(module, "_PACKAGES", ("fastapi", "no_such_package"))
    message = cli_error("serve", tiny_run)
    assert 'serve needs no_such_package, not installed here: run pip install "dskd-fast[serve]"' in message
    monkeypatch.setattr(module, "threshold_of", lambda *_: None)
    assert "pass --threshold" in cli_error("watch", tiny_run, tmp_path, "--out", tmp_path / "results")
