"""The page of `report` as a browser shows it: headless Chromium, driven by selenium."""

import copy
import json
import shutil

import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from dskd_fast.detection.overlay import colours
from dskd_fast.detection.scoring.parts import PARTS
from dskd_fast.evaluation.page import render, write_report

from .browser import Browser, by_score

KINDS = ("good", "structural", "logical")
VARIANTS = ("combined", "local", "global")
WITHOUT_MAP = tuple(name for name in PARTS if name not in VARIANTS)


@pytest.fixture(scope="module")
def browser(start_chromium):
    with start_chromium(Browser) as browser:
        yield browser


@pytest.fixture(scope="module")
def two_runs(tiny_run, tiny_detector, nasty_names, tmp_path_factory, edit):
    """What the page of two runs shows, at a threshold that makes mistakes of both sorts; some names are markup."""
    folder, category = tmp_path_factory.mktemp("two"), nasty_names()
    other = shutil.copytree(tiny_run, folder / "other")
    # It has no parts, and ranks the images differently.
    edit(other / "config.json", lambda config: config["options"].update(scoring="paper"))
    scores = dict(zip(category.test, tiny_detector.predict([item.path for item in category.test]), strict=True))
    of_good, of_bad = (
        [s.score for i, s in scores.items() if (i.kind == "good") == is_good] for is_good in (True, False)
    )
    threshold = (max(of_good) + min(of_bad)) / 2
    page = write_report([tiny_run, other], folder / "page", threshold=threshold, data_root=category.root, device="cpu")
    return json.loads(page.read_text().split('<script type="application/json" id="data">')[1].split("</script>")[0])


@pytest.fixture
def shown(browser, two_runs, tmp_path):
    """Opens a page: shown(n_runs, change=..., width=..., **media); `change` edits what the page shows."""

    def open_page(n_runs=1, change=lambda data: None, width=1280, **media):
        data = copy.deepcopy(two_runs)
        for part in (data, *data["images"]):
            part["runs"] = part["runs"][:n_runs]
        change(data)
        (tmp_path / "page.html").write_text(render(data), encoding="utf-8")
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in media.items()]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get((tmp_path / "page.html").as_uri())
        return browser, data["runs"][0], data["images"]

    browser.get("about:blank")
    browser.get_log("browser")
    yield open_page
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def mistake(image, run=0):
    if (image["runs"][run]["decision"] == "anomalous") == (image["kind"] != "good"):
        return None
    return "false alarm" if image["kind"] == "good" else "missed"


def test_the_page_shows_the_figures_and_every_image(shown):
    page, run, _ = shown()
    text = page.one("#runs").text
    figures = run["variants"]["combined"]
    for kind in ("structural", "logical", "mean"):
        assert all(f"{figures[measure][kind]:.3f}" in text for measure in ("auroc", "spro"))
    assert len(page.all(".tile")) == 6
    assert all(chart.get_attribute("aria-label") for chart in page.all(".chart svg"))
    assert page.one("#count").text == "10 of 10 images"
    assert not page.one("#comparison").is_displayed()
    assert page.title == f"{run['name']} – dskd-fast report"
    WebDriverWait(page, 20).until(lambda _: page.js("[...document.images].every((i) => i.complete)"))
    assert page.js("[...document.images].map((i) => i.naturalWidth)") == [120, 64] * 10


def test_histogram_and_curves_are_drawn_to_scale(shown):
    page, run, _ = shown()
    part, threshold = run["variants"]["combined"], run["threshold"]
    bars = page.js("[...document.querySelectorAll('.bar')].map((b) => [b.textContent, b.getAttribute('class')])")
    counts = [(f"bar {kind}", count) for kind in KINDS for count in part["histogram"]["counts"][kind] if count]
    assert [(name, int(text.split(": ")[1].split()[0])) for text, name in bars] == counts
    line = float(page.one("svg .threshold").get_attribute("x1"))
    for bar, (text, _) in zip(page.all(".bar"), bars, strict=True):
        low, high = (float(bound) for bound in text.split(": ")[0].split(" to "))
        left, width = (float(bar.get_attribute(name)) for name in ("x", "width"))
        assert left + width < line + 1 or high > threshold * 0.999
        assert left > line - 1 or low < threshold * 1.001

    curves = [(part[name][kind], limit) for name, limit in (("roc", 1), ("spro_curve", 0.05)) for kind in KINDS[1:]]
    points = [curve.get_attribute("points").split() for curve in page.all(".curve")]
    drawn = [np.array([point.split(",") for point in curve], float) for curve in points]
    # The grid's lines lie at 0 to 1; the plots of both sorts of curves have the same size.
    grid = page.js("[...document.querySelectorAll('.chart:nth-child(2) .grid')].map((g) => [g.x1, g.x2, g.y1])")
    (left, right, bottom), *_, (_, _, top) = ([length["baseVal"]["value"] for length in line] for line in grid)
    for ((x, y), limit), found in zip(curves, drawn, strict=True):
        np.testing.assert_allclose(found[:, 0], left + np.array(x) / limit * (right - left), atol=0.02)
        np.testing.assert_allclose(found[:, 1], bottom + np.array(y) * (top - bottom), atol=0.02)


def test_the_switch_changes_scores_curves_and_maps_but_no_decision(shown):
    page, run, images = shown()
    mistakes = sorted(page.texts(".card .mistake"))
    for variant in ("local", "global", "combined"):
        page.press("variants", variant)
        assert page.pressed("variants") == [variant]
        assert f"{run['variants'][variant]['auroc']['mean']:.3f}" in page.texts(".tile dd")[0]
        page.assert_cards(images, variant, variant)
        assert sorted(page.texts(".card .mistake")) == mistakes
        # The run has a threshold for the combined score alone.
        assert len(page.all("svg .threshold")) == (variant == "combined")


def test_a_part_without_a_map_of_its_own_has_scores_and_curves_and_another_map(shown):
    page, run, images = shown()
    assert page.texts("#variants button")[2:] == [
        "Local whitened",
        "Global",
        "Sum",
        "Patches",
        "Arrangement",
        "Condensed",
        "Global means",
        "Teacher means",
    ]
    for part in WITHOUT_MAP:
        page.press("variants", part)
        figures = run["variants"][part]
        assert page.texts(".tile dd")[0].startswith(f"{figures['auroc']['mean']:.3f}")
        assert len(page.all(".chart .curve")) == 2
        has_place = PARTS[part].has_map
        lack = "no map of its own" if has_place else "no place: distance of the whole image"
        shown_map = "combined" if has_place else "global"
        assert f"{lack}; the {shown_map} map is shown" in page.one(".run .meaning").text
        assert page.one(".run").text.count(lack) == 3  # also instead of the sPRO, and of its curve
        page.assert_cards(images, part, shown_map)
        assert page.texts("#cards .no-map") == ["no place: distance of the whole image"] * (0 if has_place else 10)


def test_the_gallery_is_sorted_and_filtered(shown):
    page, _, images = shown()
    names = by_score(images)
    for index, order in enumerate((names, names[::-1], [image["name"] for image in images])):
        page.choose("#order", index)
        assert page.names() == order
    page.choose("#order", 0)
    found = {kind: [image for image in images if mistake(image) == kind] for kind in ("false alarm", "missed")}
    assert all(found.values())
    for value, wanted in (found | {"mistakes": [image for image in images if mistake(image)], "all": images}).items():
        page.press("mistakes", value)
        assert page.pressed("mistakes") == [value]
        assert page.names() == by_score(wanted)
        assert f"({len(wanted)})" in page.one(f'#mistakes [data-value="{value}"]').text
    assert page.pressed("kinds") == list(KINDS)
    for kind in ("good", "logical"):
        page.press("kinds", kind)
    assert page.pressed("kinds") == ["structural"]
    assert page.names() == by_score([image for image in images if image["kind"] == "structural"])
    assert page.one("#count").text == "3 of 10 images"
    page.press("kinds", "structural")
    assert page.names() == []
    assert page.one("#count").text.startswith("No image of 10 matches")


def test_the_slider_goes_from_the_photograph_to_the_heat_map_in_the_colours_of_the_overlays(shown):
    page, _, _ = shown()
    assert page.opacities(".card:last-child") == [1, 1]
    for keys, opacities in (
        (Keys.HOME, [1, 0]),
        (Keys.ARROW_RIGHT * 25, [1, 0.5]),
        (Keys.ARROW_RIGHT * 50, [0.5, 1]),
        (Keys.END, [0, 1]),
    ):
        page.one("#mix").send_keys(keys)
        assert page.opacities(".card:last-child") == opacities
    assert page.one("#mix").get_attribute("aria-valuetext") == "heat map alone"
    # The filter in the page, on a grey wedge over black.
    drawn = page.js("""(() => {
      const target = document.createElement("canvas").getContext("2d");
      target.fillRect(0, 0, 256, 1);
      target.filter = "url(#heat)";
      for (let i = 0; i < 256; i++) {
        target.fillStyle = `rgb(${i},${i},${i})`;
        target.fillRect(i, 0, 1, 1);
      }
      return [...target.getImageData(0, 0, 256, 1).data];
    })()""")
    rgb, opacity = colours(np.arange(256) / 255)
    np.testing.assert_allclose(np.reshape(drawn, (256, 4))[:, :3], rgb * opacity[:, None], atol=4)


def test_two_runs_stand_side_by_side_and_the_gallery_follows_the_chosen_one(shown, two_runs):
    page, _, images = shown(2)
    first, second = page.all(".run")
    assert first.location["y"] == second.location["y"]
    assert first.location["x"] < second.location["x"]
    for number, run in enumerate(two_runs["runs"], start=1):
        figures = run["variants"]["combined"]
        values = [figures[key][kind] for key in ("auroc", "spro") for kind in ("structural", "logical", "mean")]
        cells = page.texts(f"#comparison tbody tr:nth-child({number}) :is(th, td)")
        assert cells[:8] == [run["name"], *(f"{value:.3f}" for value in values), f"{run['decisions']['good']} of 4"]
    assert page.texts(".card:first-child .run-name") == [run["name"] for run in two_runs["runs"]]
    assert len(page.all(".card:first-child .heat")) == 2
    assert page.names() == by_score(images) != by_score(images, run=1)
    page.choose("#run", 1)
    assert page.names() == by_score(images, run=1)
    page.press("mistakes", "mistakes")
    assert page.names() == by_score([image for image in images if mistake(image, 1)], run=1)


def test_what_a_run_does_not_have_is_absent_with_the_reason_and_not_offered(shown):
    def take_away(data):
        # The first run has no sPRO and one AUROC, the second one student, no threshold, and five of the images.
        first, second = data["runs"]
        first["absent"] = ["no sPRO: <img src=x onerror=alert(1)>", "no AUROC of logical anomalies: no"]
        for part in first["variants"].values():
            part["spro_curve"] = part["spro"] = {"structural": None, "logical": None, "mean": None}
            part["roc"]["logical"] = part["auroc"]["logical"] = part["auroc"]["mean"] = None
        second |= {"threshold": None, "decisions": None, "name": "<b>one student</b>"}
        del second["variants"]["global"]
        for i, image in enumerate(data["images"]):
            image["runs"][1]["decision"] = None
            del image["runs"][1]["scores"]["global"], image["runs"][1]["maps"]["global"]
            image["runs"][1] = image["runs"][1] if i < 5 else None

    page, run, _ = shown(2, take_away)
    assert [len(page.all(f".run:first-child {part}")) for part in (".chart svg", ".curve")] == [2, 1]
    assert page.texts(".run:first-child .absent li") == run["absent"]
    assert page.texts(".run:first-child .tile dd")[1].startswith("–")
    page.press("variants", "condensed")
    assert "has no part condensed" in page.all(".run")[1].text
    page.press("variants", "global")
    assert "has no global student" in page.all(".run")[1].text
    assert page.texts("#cards .no-map") == ["no global student"] * 5
    assert page.texts("#comparison tbody tr:nth-child(2) td") == ["–"] * 8
    assert page.texts("#run option")[1] == "<b>one student</b>"
    for number, count in ((1, 5), (0, 10)):
        page.choose("#run", number)
        assert page.one("#count").text == f"{count} of {count} images"
        assert [page.one(f"#mistakes{part}").is_displayed() for part in ("", "-absent")] == [count == 10, count == 5]
        assert page.all("#variants button")[2].is_enabled() == (count == 10)
        assert page.pressed("variants") == ["combined"]


def test_names_are_shown_and_not_executed_and_the_network_is_not_used(shown):
    page, _, _ = shown()
    for name, card in zip(page.names(), page.all(".open"), strict=True):
        kind = name.split("/")[0].removesuffix("_anomalies")
        assert card.get_attribute("aria-label").startswith(f"{name}, {kind}; score ")
        card.click()
        assert page.texts("#viewer-title") == [name]
        page.one("#viewer-close").click()
    assert sum("alert" in name for name in page.names()) == 3
    # An alert would have stopped the driver by now.
    assert page.all('[onerror], [onload], img:not([src^="data:"])') == []
    assert page.js("performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('data:'))") == []
    blocked = page.execute_async_script(
        'document.addEventListener("securitypolicyviolation", (event) => arguments[0](event.effectiveDirective));'
        'fetch("http://127.0.0.1:9/").catch(() => {});'
    )
    assert blocked == "connect-src"
    page.get_log("browser")


def test_everything_can_be_done_with_the_keyboard(shown):
    page, _, images = shown()
    style = "(({outlineStyle, outlineWidth}) => [outlineStyle, outlineWidth])(getComputedStyle(document.activeElement))"
    keys = {"[data-value=local]": Keys.SPACE, "#order": Keys.ARROW_DOWN, "[data-value=good]": Keys.ENTER}
    for selector, key in keys.items():
        page.tab_to(selector)
        assert page.js(style) == ["solid", "3px"]
        page.keys(key)
        assert page.js("document.activeElement.matches(arguments[0])", selector)
    assert (page.pressed("variants"), page.pressed("kinds")) == (["local"], ["structural", "logical"])
    names = by_score([image for image in images if image["kind"] != "good"], "local")[::-1]
    assert page.names() == names
    page.tab_to(".open")
    page.keys(Keys.ENTER)
    assert page.texts("#viewer-title") == names[:1]
    assert page.js("document.querySelector('#viewer .photo').clientWidth") > 300
    page.keys(Keys.ARROW_RIGHT * 2)
    assert page.texts("#viewer-title") == names[2:3]
    page.keys(Keys.ARROW_LEFT * 9)
    assert page.texts("#viewer-title") == names[:1]
    assert not page.one("#viewer-previous").is_enabled()
    (scores,) = (image["runs"][0]["scores"] for image in images if image["name"] == names[0])
    listed = [float(text) for text in page.texts("#viewer td")]
    assert listed == pytest.approx([scores[variant] for variant in (*VARIANTS, *WITHOUT_MAP)], rel=1e-3)
    page.tab_to("#viewer-mix")
    page.keys(Keys.END + Keys.ARROW_LEFT * 10)
    assert page.texts("#viewer-title") == names[:1]
    assert page.opacities("#viewer") == pytest.approx([0.2, 1])
    assert page.one("#mix").get_property("value") == "90"
    page.keys(Keys.ESCAPE)
    assert not page.one("#viewer").get_property("open")
    assert page.js("document.activeElement.className") == "open"


@pytest.mark.slow
def test_a_narrow_window_needs_no_sideways_scrolling(shown):
    page, _, _ = shown(2, width=320)
    # The page or the dialog, or something in it that has no scroll bar of its own.
    sticks_out = """[...document.querySelectorAll(`${arguments[0]}, ${arguments[0]} *`)].filter((e) =>
        !e.closest(".scroll, .skip") && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML)"""
    for where in ("html", "#viewer"):
        assert page.js(sticks_out, where) == []
        page.js("document.querySelector('.open').click()")
        assert page.one("#viewer").is_displayed()


# The colours of an element's text and of the first ground that is not transparent behind it.
COLOURS = """[...document.querySelectorAll(arguments[0])].map((element) => {
  let ground = element;
  while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
  const { fill, color } = getComputedStyle(element);
  const both = [element instanceof SVGElement ? fill : color, getComputedStyle(ground).backgroundColor];
  return both.map((colour) => colour.match(/[\\d.]+/g).map(Number).slice(0, 3));
})"""


def contrast(colours):
    """As WCAG 2 defines it."""
    channels = np.array(colours) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    darker, lighter = np.sort(linear @ (0.2126, 0.7152, 0.0722), axis=1).T
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(shown, scheme):
    page, _, _ = shown(color_scheme=scheme)
    ground = page.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(ground) < 60) if scheme == "dark" else (min(ground) > 200)
    texts = "h1|h2|.muted|dt|dd|.detail|.chart text|button|select|td|.score|.decision|.mistake|.kind|.name|#scale-text"
    for selector in texts.split("|"):
        assert contrast(page.js(COLOURS, selector)).min() >= 4.5, selector
