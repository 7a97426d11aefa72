import asyncio
import base64
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

import dskd_fast
from dskd_fast.data.images import pixel_limit
from dskd_fast.detection.calibration import decide
from dskd_fast.station import service
from dskd_fast.station.batches import Batches
from dskd_fast.station.service import make_app


@pytest.fixture(scope="module")
def client(tiny_detector):
    app = make_app(tiny_detector, run="screw_bag", threshold=1.0, max_bytes=100_000)
    with TestClient(app) as client:
        yield client


@pytest.fixture
def paths(data_root):
    return sorted((data_root / "screw_bag" / "test").glob("*/*.png"))


def test_a_photograph_is_judged_as_by_the_detector(client, tiny_detector, paths, dead_frames, tmp_path):
    Image.fromarray(dead_frames["black"][0]).save(tmp_path / "black.png")
    paths = [*paths, tmp_path / "black.png"]
    for path, found in zip(paths, tiny_detector.predict(paths), strict=True):
        answer = client.post("/predict", content=path.read_bytes()).json()
        assert answer.pop("score") == pytest.approx(found.score, rel=1e-4, abs=1e-4)
        assert answer.pop("parts").keys() == found.parts.keys()
        expected = {"decision": decide(found.score, 1.0, found.suspect), "threshold": 1.0, "reason": found.suspect}
        expected |= {"decided_by": found.decided_by, "overlay": None, "map": None, "width": 120, "height": 96}
        assert answer.items() >= expected.items()


def test_overlay_and_map_come_on_request(client, tiny_detector, paths):
    answer = client.post("/predict?overlay=true&map=true", content=paths[0].read_bytes()).json()
    drawn = Image.open(io.BytesIO(base64.b64decode(answer["overlay"])))
    assert (drawn.format, drawn.width) == ("JPEG", 2 * 120 + 2)
    values = tifffile.imread(io.BytesIO(base64.b64decode(answer["map"])))
    np.testing.assert_allclose(values, tiny_detector.predict(paths[0])[0].map, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("request_of", "code", "sentence"),
    [
        (lambda data: {"content": b""}, 422, "the image cannot be used: the file is empty"),
        (lambda data: {"content": data[:-20]}, 422, "the image cannot be used: it is damaged or truncated"),
        (lambda data: {"content": b"GIF89a"}, 422, "the image cannot be used: it is a GIF, and no PNG"),
        (lambda data: {"content": bytes(100_001)}, 413, "the body has more than 100,000 bytes: send a smaller file"),
        (lambda data: {"content": iter([bytes(60_000)] * 2)}, 413, "the body has more than 100,000 bytes"),
        (lambda data: {"files": {"image": data}}, 415, "the body is a form: send the image file itself"),
        (lambda data: {"content": data, "params": {"map": "x"}}, 422, "map='x' is not possible: use true or false"),
        (lambda data: {"content": data, "params": {"Map": 1}}, 422, "there is no parameter 'Map': overlay and map are"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(client, paths, request_of, code, sentence):
    answer = client.post("/predict", **request_of(paths[0].read_bytes()))
    assert answer.status_code == code
    assert answer.json()["detail"].startswith(sentence)
    assert client.get("/health").json()["run"] == "screw_bag"


def test_images_of_too_many_pixels_and_too_many_requests_are_refused(client, paths, monkeypatch):
    data = paths[0].read_bytes()
    with pixel_limit(10_000):
        assert "it has 120 x 96 pixels, more than the limit" in client.post("/predict", content=data).json()["detail"]
    monkeypatch.setattr(service, "MOST_AT_ONCE", 0)
    answer = client.post("/predict", content=data)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_a_body_that_takes_too_long_frees_its_place(tiny_detector, monkeypatch):
    monkeypatch.setattr(service, "BODY_SECONDS", 0.01)
    app = make_app(tiny_detector, run="screw_bag", threshold=1.0, max_bytes=100_000)
    sent = []

    async def send(message):
        sent.append(message)

    async def request():
        async with app.router.lifespan_context(app):
            scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}
            await app(scope, lambda: asyncio.sleep(60), send)
            assert app.state.service.n_requests == 0

    asyncio.run(request())
    assert sent[0]["status"] == 408


def test_requests_that_come_together_share_batches_and_get_their_own_answers(tiny_detector, paths, monkeypatch):
    sizes = []
    judge = service.judge

    def watched(detector, images, *others):
        sizes.append(len(images))
        return judge(detector, images, *others)

    monkeypatch.setattr(service, "judge", watched)
    app = make_app(tiny_detector, run="screw_bag", threshold=None, max_bytes=100_000, wait=30)
    with TestClient(app) as client, ThreadPoolExecutor(8) as pool:
        ready = threading.Barrier(8)

        def score(path, begin=lambda: None):
            begin()
            answer = client.post("/predict", content=path.read_bytes()).json()
            assert answer["decision"] is None
            return answer["score"]

        alone = [score(path) for path in paths[:8]]
        assert sizes == [1] * 8  # nobody was announced to wait for
        together = list(pool.map(score, paths[:8], [ready.wait] * 8))
    assert sum(sizes) == 16
    assert len(sizes) < 16
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-4)


def test_a_batch_waits_for_what_is_announced_no_longer_than_its_bound_and_errors_are_everyones():
    done = []

    def work(items):
        done.append(items)
        if "bad" in items:
            raise ValueError("bad")
        return items

    with Batches(work, most=2, wait=0.05) as batches:
        with batches.announced() as submit_late:
            with batches.announced() as submit:
                started = time.monotonic()
                assert submit("first").result() == "first"
                assert time.monotonic() - started >= 0.05
            with batches.announced() as submit:
                first = submit("second")
                assert submit_late("bad").exception().args == first.exception().args == ("bad",)
        with batches.announced() as submit:
            assert submit("third").result() == "third"
    assert done == [["first"], ["second", "bad"], ["third"]]


def test_openapi_and_the_page_need_nothing_from_elsewhere(client):
    described = client.get("/openapi.json").json()
    assert {*described["paths"]} == {"/predict", "/health"}
    assert described["info"]["version"] == dskd_fast.__version__
    assert "image/png" in described["paths"]["/predict"]["post"]["requestBody"]["content"]
    page = client.get("/").text
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")
    assert client.get("/docs").status_code == 404


@pytest.fixture
def address(tiny_detector):
    """Of a service that a browser can reach."""
    app = make_app(tiny_detector, run="<b>screws</b>", threshold=-1e9, max_bytes=100_000)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


def test_photographs_are_judged_and_shown_and_problems_said(
    start_chromium, address, write_images, dead_frames, tmp_path
):
    shown = {
        "a <img src=x onerror=alert(1)>.png": "anomalous",
        "black.png": "suspect: too dark",
        "broken.png": "the image cannot be used: it is no PNG",
        "large.bmp": "at most 0.1 MiB are taken",
    }
    files = [tmp_path / name for name in shown]
    write_images(tmp_path, 1)[0].rename(files[0])
    Image.fromarray(dead_frames["black"][0]).save(files[1])
    files[2].write_bytes(b"\x89PNG garbage")
    Image.new("RGB", (200, 200)).save(files[3])
    with start_chromium(webdriver.Chrome) as browser:
        browser.get(address)
        assert browser.find_element("id", "title").text == "<b>screws</b>"
        browser.find_element("id", "files").send_keys("\n".join(map(str, files)))
        WebDriverWait(browser, 30).until(lambda b: b.find_element("id", "status").text == "4 of 4 done")
        cards = browser.find_elements("css selector", ".card")
        found = {card.find_element("css selector", ".name").text: card.text for card in cards}
        assert found.keys() == shown.keys()
        assert all(text in found[name] for name, text in shown.items()), found
        assert ["decided by" in found[name] for name in shown] == [True, True, False, False]
        widths = browser.execute_script("return [...document.querySelectorAll('.card img')].map((i) => i.naturalWidth)")
        assert sorted(widths) == [2 * 80 + 2, 2 * 120 + 2]
        # The answer 422 is one of them; no other, as of the content security policy.
        said = [entry["message"] for entry in browser.get_log("browser")]
        assert all("422" in message for message in said), said
