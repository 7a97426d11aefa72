"""The page of `serve`, served to headless Chromium."""

import threading

import pytest
import uvicorn
from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

from dskd_fast.station.service import make_app


@pytest.fixture
def address(tiny_detector):
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
