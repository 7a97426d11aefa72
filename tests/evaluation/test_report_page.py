"""The page of `report` as a browser shows it: headless Chromium, driven by selenium."""

import json
import shutil

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from dskd_fast.evaluation.report import render, write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium: apt-get install chromium chromium-driver (Debian's packages)"
)

KINDS = ("good", "structural", "logical")
NASTY = ["\"><img src=x onerror=alert(1)>'ü漢.png", "<svg onload=alert(1)>&lt;b&gt;.png", "`${alert(1)}`\\.png"]
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(autouse=True)
def _no_error_in_the_console(driver):
    driver.get("about:blank")
    driver.get_log("browser")
    yield
    assert [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.fixture(scope="module")
def nasty_data(data_root, tmp_path_factory):
    """The data set with file names that are markup."""
    category = shutil.copytree(data_root, tmp_path_factory.mktemp("nasty") / "data") / "screw_bag"
    for path, name in zip(sorted((category / "test" / "good").iterdir()), NASTY, strict=False):
        path.rename(path.with_name(name))
    return category


@pytest.fixture(scope="module")
def paths(tiny_run, lite_run, nasty_data, tmp_path_factory):
    """Pages of one run and of two, at a threshold that makes mistakes of both sorts."""
    out = tmp_path_factory.mktemp("pages")
    data = data_of(write_report([tiny_run], out / "first", data_root=nasty_data, device="cpu"))
    scores = {kind: [i["runs"][0]["scores"]["combined"] for i in data["images"] if i["kind"] == kind] for kind in KINDS}
    threshold = (max(scores["good"]) + min(scores["structural"] + scores["logical"])) / 2
    settings = {"threshold": threshold, "data_root": nasty_data, "device": "cpu"}
    return {
        "one": write_report([tiny_run], out / "one", **settings),
        "two": write_report([tiny_run, lite_run], out / "two", **settings),
    }


def data_of(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])


class Shown:
    """A page in the browser, by what a reader does with it."""

    def __init__(self, driver, path, size=(1280, 900), dark=False):
        self.driver, self.data = driver, data_of(path)
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(path.as_uri())

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def js(self, code, *arguments):
        return self.driver.execute_script(f"return {code.strip()}", *arguments)

    def texts(self, selector):
        return self.js("[...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def press(self, group, value):
        self.one(f'#{group} [data-value="{value}"]').click()

    def pressed(self, group):
        return self.js(
            "[...document.querySelectorAll(`#${arguments[0]} [aria-pressed=true]`)].map((e) => e.dataset.value)", group
        )

    def names(self):
        return self.texts("#cards .name")

    def keys(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)

    def focused(self):
        return self.js("document.activeElement.id || document.activeElement.dataset.value || ''")

    def tab_to(self, wanted):
        """Goes there by the keyboard alone; `wanted` is an id, a data-value, or a selector."""
        for _ in range(60):
            self.keys(Keys.TAB)
            if self.focused() == wanted or self.js("document.activeElement.matches(arguments[0])", wanted):
                return
        pytest.fail(f"the Tab key does not get to {wanted}")

    def opacity(self, selector):
        return float(self.js("getComputedStyle(document.querySelector(arguments[0])).opacity", selector))

    def slide_to(self, value, selector="#mix"):
        slider = self.one(selector)
        steps = value - int(slider.get_property("value"))
        slider.send_keys((Keys.ARROW_RIGHT if steps > 0 else Keys.ARROW_LEFT) * abs(steps))


@pytest.fixture
def shown(driver, paths):
    """Opens a page: shown("one", size=..., dark=...)."""

    def open_page(name="one", **settings):
        return Shown(driver, paths[name], **settings)

    return open_page


def mistake(image, run=0):
    decision = image["runs"][run]["decision"]
    if (decision == "anomalous") == (image["kind"] != "good"):
        return None
    return "false alarm" if image["kind"] == "good" else "missed"


def by_score(images, variant="combined", run=0):
    return [i["name"] for i in sorted(images, key=lambda i: i["runs"][run]["scores"][variant], reverse=True)]


# ------------------------------------------------------------------------------------------------------- figures


def test_the_page_shows_the_figures_charts_and_every_image(shown):
    page = shown()
    (run,) = page.data["runs"]
    text = page.one("#runs").text
    for measure in ("auroc", "spro"):
        for kind in ("structural", "logical", "mean"):
            assert f"{run['variants']['combined'][measure][kind]:.3f}" in text
    assert page.texts(".tile dt") == [
        "AUROC, mean",
        "sPRO@0.05, mean",
        "Threshold",
        "False alarms",
        "Missed",
        "Test images",
    ]
    assert len(page.all(".chart svg")) == 3
    assert len(page.all(".curve")) == 4
    assert len(page.all("svg .threshold")) == 1
    assert {bar.get_attribute("class") for bar in page.all(".bar")} == {f"bar {kind}" for kind in KINDS}
    assert all(chart.get_attribute("aria-label") for chart in page.all(".chart svg"))
    assert len(page.all(".card")) == 10
    assert page.one("#count").text == "10 of 10 images"
    assert not page.one("#comparison").is_displayed()
    assert page.driver.title == f"{run['name']} – dskd-fast report"


def test_all_pictures_can_be_decoded(shown):
    page = shown("two")
    WebDriverWait(page.driver, 20).until(lambda _: page.js("[...document.images].every((i) => i.complete)"))
    assert page.js("[...document.images].map((i) => i.naturalWidth)") == [120, 64] * 20


def test_the_histogram_draws_each_bin_at_its_scores_and_the_threshold_between(shown):
    page = shown()
    (run,) = page.data["runs"]
    histogram = run["variants"]["combined"]["histogram"]
    counts = [count for kind in KINDS for count in histogram["counts"][kind] if count]
    told = page.texts(".bar title")
    assert [int(text.split(": ")[1].split(" of ")[0]) for text in told] == counts
    line = float(page.one("svg .threshold").get_attribute("x1"))
    for bar, text in zip(page.all(".bar"), told, strict=True):
        low, high = (float(bound) for bound in text.split(": ")[0].split(" to "))
        left = float(bar.get_attribute("x"))
        right = left + float(bar.get_attribute("width"))
        assert (right < line + 1) or high > run["threshold"] * 0.999
        assert (left > line - 1) or low < run["threshold"] * 1.001


def test_the_curves_are_drawn_through_their_points(shown):
    page = shown()
    part = page.data["runs"][0]["variants"]["combined"]
    curves = [(part[name][kind], limit) for name, limit in (("roc", 1), ("spro_curve", 0.05)) for kind in KINDS[1:]]
    drawn = [
        np.array([point.split(",") for point in curve.get_attribute("points").split()], float)
        for curve in page.all(".curve")
    ]
    # The ROC curves go from corner to corner of the plot, which has the same size for all.
    (left, bottom), (right, top) = drawn[0][0], drawn[0][-1]
    assert left < right
    assert top < bottom
    for ((x, y), limit), points in zip(curves, drawn, strict=True):
        np.testing.assert_allclose(points[:, 0], left + np.array(x) / limit * (right - left), atol=0.02)
        np.testing.assert_allclose(points[:, 1], bottom + np.array(y) * (top - bottom), atol=0.02)


def test_the_switch_changes_scores_curves_and_maps_but_no_decision(shown):
    page = shown()
    (run,) = page.data["runs"]
    missed = page.texts(".card .mistake")
    for variant in ("local", "global", "combined"):
        page.press("variants", variant)
        assert page.pressed("variants") == [variant]
        assert f"{run['variants'][variant]['auroc']['mean']:.3f}" in page.texts(".tile dd")[0]
        assert page.names() == by_score(page.data["images"], variant)
        by_name = {image["name"]: image["runs"][0] for image in page.data["images"]}
        maps = page.js("[...document.querySelectorAll('#cards .heat')].map((i) => i.src.split(',')[1])")
        assert maps == [by_name[name]["maps"][variant] for name in page.names()]
        scores = [float(text) for text in page.texts("#cards .score")]
        assert scores == pytest.approx([by_name[name]["scores"][variant] for name in page.names()], rel=1e-3)
        assert sorted(page.texts(".card .mistake")) == sorted(missed)
        # The run has a threshold for the combined score alone.
        assert len(page.all("svg .threshold")) == (variant == "combined")


# ------------------------------------------------------------------------------------------------------- gallery


def test_the_gallery_is_sorted_by_score_or_name(shown):
    page = shown()
    highest_first = by_score(page.data["images"])
    assert page.names() == highest_first
    order = Select(page.one("#order"))
    order.select_by_value("low")
    assert page.names() == highest_first[::-1]
    order.select_by_value("name")
    assert page.names() == [image["name"] for image in page.data["images"]]


def test_the_gallery_is_filtered_by_type(shown):
    page = shown()
    assert page.pressed("kinds") == list(KINDS)
    page.press("kinds", "good")
    page.press("kinds", "logical")
    assert page.pressed("kinds") == ["structural"]
    assert page.names() == by_score([i for i in page.data["images"] if i["kind"] == "structural"])
    assert page.one("#count").text == "3 of 10 images"
    page.press("kinds", "structural")
    assert page.names() == []
    assert page.one("#count").text.startswith("No image of 10 matches")
    page.press("kinds", "good")
    assert set(page.texts("#cards .kind")) == {"good"}


def test_the_gallery_is_filtered_by_mistake(shown):
    page = shown()
    found = {None: [], "false alarm": [], "missed": []}
    for image in page.data["images"]:
        found[mistake(image)].append(image)
    assert all(found.values())
    wanted = {
        "false alarm": found["false alarm"],
        "missed": found["missed"],
        "mistakes": found["false alarm"] + found["missed"],
        "all": page.data["images"],
    }
    for value, images in wanted.items():
        page.press("mistakes", value)
        assert page.pressed("mistakes") == [value]
        assert page.names() == by_score(images)
        assert f"({len(images)})" in page.one(f'#mistakes [data-value="{value}"]').text
    page.press("mistakes", "mistakes")
    page.press("kinds", "good")
    assert page.names() == by_score(found["missed"])


def test_suspect_images_are_no_mistakes_and_their_reason_is_shown(driver, paths, tmp_path):
    data = data_of(paths["one"])
    (run,) = data["runs"]
    mistaken = [image for image in data["images"] if mistake(image)]
    for image in mistaken[:1] + mistaken[-1:]:
        result = image["runs"][0]
        run["decisions"][image["kind"]] -= result["decision"] == "anomalous"
        run["suspects"][image["kind"]] += 1
        result |= {"decision": "suspect", "reason": "too dark <b>"}
    (tmp_path / "suspects.html").write_text(render(data), encoding="utf-8")
    page = Shown(driver, tmp_path / "suspects.html")
    tiles = dict(zip(page.texts(".tile dt"), page.texts(".tile dd"), strict=True))
    assert tiles["Suspect"].startswith("2")
    counts = {value: sum(mistake(image) == value for image in mistaken[1:-1]) for value in ("false alarm", "missed")}
    assert tiles["False alarms"].startswith(str(counts["false alarm"]))
    assert tiles["Missed"].startswith(str(counts["missed"]))
    page.press("mistakes", "mistakes")
    assert page.names() == by_score(mistaken[1:-1])
    page.press("mistakes", "all")
    assert page.texts(".card .decision").count("suspect") == 2
    driver.find_element(By.XPATH, "//span[text()='suspect']/ancestor::button").click()
    assert "suspect: too dark <b>" in page.one("#viewer-panels").text


def test_the_slider_goes_from_the_photograph_to_the_heat_map(shown):
    page = shown()
    for value, photo, heat in ((50, 1, 1), (0, 1, 0), (25, 1, 0.5), (75, 0.5, 1), (100, 0, 1)):
        page.slide_to(value)
        assert page.one("#mix").get_property("value") == str(value)
        for card in (".card:first-child", ".card:last-child"):
            assert (page.opacity(f"{card} .photo"), page.opacity(f"{card} .heat")) == (photo, heat)
    assert page.one("#mix").get_attribute("aria-valuetext") == "heat map alone"


def test_the_heat_map_has_the_colours_of_the_overlays(shown, driver):
    """The filter in the page, on a grey wedge over black, against what overlay.colours says."""
    page = shown()
    page.slide_to(100)
    drawn = driver.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        const wedge = document.createElement("canvas");
        [wedge.width, wedge.height] = [256, 1];
        const context = wedge.getContext("2d");
        for (let i = 0; i < 256; i++) {
          context.fillStyle = `rgb(${i},${i},${i})`;
          context.fillRect(i, 0, 1, 1);
        }
        const result = document.createElement("canvas");
        [result.width, result.height] = [256, 1];
        const target = result.getContext("2d");
        target.fillRect(0, 0, 256, 1);
        target.filter = "url(#heat)";
        target.drawImage(wedge, 0, 0);
        done([...target.getImageData(0, 0, 256, 1).data]);
        """
    )
    colours = page.data["colours"]
    stops = len(colours["red"]) - 1
    for grey in (0, 64, 128, 192, 255):
        at = grey / 255 * stops
        low = min(int(at), stops - 1)

        def mixed(name, low=low, share=at - low):
            return colours[name][low] * (1 - share) + colours[name][low + 1] * share

        expected = [255 * mixed(name) * mixed("opacity") for name in ("red", "green", "blue")]
        assert drawn[4 * grey : 4 * grey + 3] == pytest.approx(expected, abs=4)


def test_a_large_gallery_is_made_as_the_reader_comes_to_it(driver, paths, tmp_path):
    data = data_of(paths["one"])
    data["images"] = [{**data["images"][i % 10], "name": f"{i:04d}.png"} for i in range(1000)]
    (tmp_path / "large.html").write_text(render(data), encoding="utf-8")
    page = Shown(driver, tmp_path / "large.html")
    assert len(page.all(".card")) <= 120
    assert page.one("#count").text == "1000 of 1000 images"

    def has_scrolled_to_the_end(_):
        page.js("scrollTo(0, document.documentElement.scrollHeight)")
        return page.js("document.querySelectorAll('.card').length") == 1000

    WebDriverWait(driver, 60, poll_frequency=0.05).until(has_scrolled_to_the_end)
    assert len(set(page.names())) == 1000
    before = page.js("scrollY")
    page.press("variants", "local")
    assert page.js("scrollY") == pytest.approx(before, abs=1000)
    Select(page.one("#order")).select_by_value("name")
    assert page.names()[:3] == ["0000.png", "0001.png", "0002.png"]


# ------------------------------------------------------------------------------------------------------ one image


def test_a_card_opens_the_image_large_and_the_keys_go_on(shown):
    page = shown()
    names = by_score(page.data["images"])
    page.all(".open")[3].click()
    assert page.one("#viewer").get_property("open")
    assert page.js("document.getElementById('viewer-title').textContent") == names[3]
    assert page.js("document.querySelector('#viewer .photo').clientWidth") > 300
    page.keys(Keys.ARROW_RIGHT)
    assert page.js("document.getElementById('viewer-title').textContent") == names[4]
    page.keys(Keys.ARROW_LEFT * 9)
    assert page.js("document.getElementById('viewer-title').textContent") == names[0]
    assert not page.one("#viewer-previous").is_enabled()
    page.slide_to(90, "#viewer-mix")
    assert page.js("document.getElementById('viewer-title').textContent") == names[0]
    assert page.opacity("#viewer .photo") == pytest.approx(0.2)
    assert page.one("#mix").get_property("value") == "90"
    scores = page.data["images"][[i["name"] for i in page.data["images"]].index(names[0])]["runs"][0]["scores"]
    told = [float(text) for text in page.texts("#viewer td")]
    assert told == pytest.approx([scores[variant] for variant in ("combined", "local", "global")], rel=1e-3)
    page.keys(Keys.ESCAPE)
    assert not page.one("#viewer").get_property("open")


# -------------------------------------------------------------------------------------------------- several runs


def test_two_runs_stand_side_by_side(shown):
    page = shown("two")
    first, second = page.all(".run")
    assert first.location["y"] == second.location["y"]
    assert first.location["x"] < second.location["x"]
    rows = page.js(
        "[...document.querySelectorAll('#comparison tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    for row, run in zip(rows, page.data["runs"], strict=True):
        figures = run["variants"]["combined"]
        values = [figures[key][kind] for key in ("auroc", "spro") for kind in ("structural", "logical", "mean")]
        assert row[:7] == [run["name"], *(f"{value:.3f}" for value in values)]
        assert row[7] == f"{run['decisions']['good']} of 4"
    assert len(page.all(".card")) == 10
    for panel in page.all(".card:first-child .panels"):
        assert [name.text for name in panel.find_elements(By.CLASS_NAME, "run-name")] == [
            run["name"] for run in page.data["runs"]
        ]
    assert len(page.all(".card:first-child .heat")) == 2


def test_the_gallery_follows_the_chosen_run(shown):
    page = shown("two")
    images = page.data["images"]
    assert by_score(images, run=0) != by_score(images, run=1)
    assert page.names() == by_score(images, run=0)
    Select(page.one("#run")).select_by_index(1)
    assert page.names() == by_score(images, run=1)
    page.press("mistakes", "mistakes")
    assert page.names() == by_score([i for i in images if mistake(i, 1)], run=1)


def test_what_a_run_does_not_have_is_not_offered(driver, paths, tmp_path):
    data = data_of(paths["two"])
    # The second run has one student and no threshold, and has seen five of the images.
    run = data["runs"][1]
    run |= {"threshold": None, "decisions": None, "name": "<b>one student</b>"}
    del run["variants"]["global"]
    for i, image in enumerate(data["images"]):
        del image["runs"][1]["scores"]["global"], image["runs"][1]["maps"]["global"]
        image["runs"][1]["decision"] = None
        if i >= 5:
            image["runs"][1] = None
    (tmp_path / "less.html").write_text(render(data), encoding="utf-8")
    page = Shown(driver, tmp_path / "less.html")
    page.press("variants", "global")
    assert "has no global student" in page.all(".run")[1].text
    assert page.texts("#viewer .no-map, #cards .no-map") == ["no global student"] * 5
    assert [cell.text for cell in page.all("#comparison tbody tr:nth-child(2) td")[:6]] == ["–"] * 6

    Select(page.one("#run")).select_by_visible_text("<b>one student</b>")
    assert page.pressed("variants") == ["combined"]
    assert not page.one('#variants [data-value="global"]').is_enabled()
    assert page.one('#variants [data-value="local"]').is_enabled()
    assert not page.one("#mistakes").is_displayed()
    assert "no threshold" in page.one("#mistakes-absent").text
    assert page.one("#count").text == "5 of 5 images"
    Select(page.one("#run")).select_by_index(0)
    assert page.one("#mistakes").is_displayed()
    assert page.one("#count").text == "10 of 10 images"


def test_curves_that_cannot_be_computed_are_absent_with_the_reason(driver, paths, tmp_path):
    data = data_of(paths["one"])
    (run,) = data["runs"]
    run["absent"] = [
        "no sPRO of structural anomalies: <img src=x onerror=alert(1)>",
        "no sPRO of logical anomalies: no",
    ]
    for part in run["variants"].values():
        part["spro_curve"] = {"structural": None, "logical": None}
        part["spro"] = {"structural": None, "logical": None, "mean": None}
        part["roc"]["logical"] = part["auroc"]["logical"] = part["auroc"]["mean"] = None
    (tmp_path / "absent.html").write_text(render(data), encoding="utf-8")
    page = Shown(driver, tmp_path / "absent.html")
    assert len(page.all(".chart svg")) == 2
    assert len(page.all(".curve")) == 1
    assert page.texts(".absent li") == run["absent"]
    assert page.texts(".tile dd")[1].startswith("–")


# ---------------------------------------------------------------------------------------- names and the network


def test_names_are_shown_and_not_executed(shown):
    page = shown()
    assert {f"good/{name}" for name in NASTY} <= set(page.names())
    for name in NASTY:
        position = page.names().index(f"good/{name}")
        card = page.all(".open")[position]
        assert card.get_attribute("aria-label").startswith(f"good/{name}, good; score ")
        card.click()
        assert page.js("document.getElementById('viewer-title').textContent") == f"good/{name}"
        page.one("#viewer-close").click()
    # An alert would have stopped the driver by now.
    assert page.js("document.querySelectorAll('[onerror], [onload], img:not([src^=\"data:\"])').length") == 0


def test_the_page_may_not_use_a_network(shown, driver):
    page = shown()
    assert page.js("performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('data:')).length") == 0
    blocked = driver.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
        fetch("http://127.0.0.1:9/").catch(() => {});
        """
    )
    assert blocked == "connect-src"
    driver.get_log("browser")


# ------------------------------------------------------------------------------------- keyboard, window, dark mode


def test_everything_can_be_done_with_the_keyboard(shown):
    page = shown()
    page.tab_to("local")
    page.keys(Keys.SPACE)
    assert page.pressed("variants") == ["local"]
    assert page.focused() == "local"
    page.tab_to("mix")
    page.keys(Keys.END)
    assert page.opacity(".card .photo") == 0
    page.tab_to("order")
    page.keys(Keys.ARROW_DOWN)
    assert page.names() == by_score(page.data["images"], "local")[::-1]
    page.tab_to("good")
    page.keys(Keys.ENTER)
    assert page.pressed("kinds") == ["structural", "logical"]
    assert page.focused() == "good"
    page.tab_to("missed")
    page.keys(Keys.SPACE)
    assert page.pressed("mistakes") == ["missed"]
    page.tab_to(".open")
    page.keys(Keys.ENTER)
    assert page.one("#viewer").get_property("open")
    page.tab_to("viewer-mix")
    page.keys(Keys.HOME)
    assert page.opacity("#viewer .heat") == 0
    page.keys(Keys.ESCAPE)
    assert page.js("document.activeElement.className") == "open"


@pytest.mark.parametrize("dark", [False, True])
def test_focus_can_be_seen(shown, dark):
    page = shown(dark=dark)
    for wanted in ("combined", "mix", "order", "good", "all", ".open"):
        page.tab_to(wanted)
        outline = [page.js(f"getComputedStyle(document.activeElement).outline{what}") for what in ("Style", "Width")]
        assert outline == ["solid", "3px"]


CONTROLS = "button, select, input, [role=group], [role=region]"


def test_every_control_has_a_name(shown):
    page = shown("two")
    # What is behind an open dialog has no name while it is open.
    for where, n in (("main, .view", 20), ("#viewer", 4)):
        controls = [control for part in page.all(where) for control in part.find_elements(By.CSS_SELECTOR, CONTROLS)]
        named = [control.accessible_name.strip() for control in controls if control.is_displayed()]
        assert len(named) >= n
        assert all(named), named
        page.js("document.querySelector('.open').click()")
    assert page.js("[...document.images].every((i) => i.hasAttribute('alt'))")


# What is wider than it should be: the page or the dialog itself, or something in it that has no scroll bar of its own.
STICKS_OUT = """
((selector) => {
  const whole = document.querySelector(selector);
  const right = Math.min(whole.getBoundingClientRect().right, document.documentElement.clientWidth) + 1;
  const parts = [...whole.querySelectorAll("*")].filter((e) => !e.closest(".scroll, .skip"));
  const beyond = parts.filter((e) => e.getBoundingClientRect().right > right).map((e) => e.outerHTML.slice(0, 90));
  return whole.scrollWidth > whole.clientWidth ? [whole.tagName, ...beyond] : beyond;
})(arguments[0])
"""


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("width", [320, 360])
def test_a_narrow_window_needs_no_sideways_scrolling(shown, name, width):
    page = shown(name, size=(width, 640))
    assert page.js("innerWidth") == width
    assert page.js(STICKS_OUT, "html") == []
    page.js("document.querySelector('.open').click()")
    assert page.one("#viewer").is_displayed()
    assert page.js(STICKS_OUT, "#viewer") == []


# Of an element's text against the first ground that is not transparent behind it, as WCAG 2 defines it.
CONTRAST = """
((selector) => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b]
    .map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  return [...document.querySelectorAll(selector)].map((element) => {
    let ground = element;
    while (channels(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
    const style = getComputedStyle(element);
    const text = element instanceof SVGElement ? style.fill : style.color;
    const both = [text, getComputedStyle(ground).backgroundColor].map((colour) => luminance(channels(colour)));
    return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
  });
})(arguments[0])
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_light_and_dark(shown, dark):
    page = shown(dark=dark)
    ground = page.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(ground) < 60) if dark else (min(ground) > 200)
    selectors = (
        "h1, h2, .muted, .tile dt, .tile dd, .detail, .chart text, .switch button, select, td, .score, .decision"
    )
    for selector in (*selectors.split(", "), ".mistake", ".kind", ".name", "#scale-text"):
        found = page.js(CONTRAST, selector)
        assert found
        assert min(found) >= 4.5, selector


def test_motion_is_reduced_for_those_who_ask_for_it(shown, driver):
    page = shown()
    reduced = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": reduced})
    durations = "[...new Set([...document.querySelectorAll('*')].map((e) => getComputedStyle(e).transitionDuration))]"
    assert page.js(durations) == ["0s"]
    assert page.js("document.getAnimations().length") == 0
