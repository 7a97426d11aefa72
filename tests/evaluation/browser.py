"""The page of `report`, by what a reader does with it in a browser."""

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select


def by_score(images, variant="combined", run=0):
    return [i["name"] for i in sorted(images, key=lambda i: i["runs"][run]["scores"][variant], reverse=True)]


class Browser(webdriver.Chrome):
    def all(self, selector):
        return self.find_elements("css selector", selector)

    def one(self, selector):
        return self.find_element("css selector", selector)

    def js(self, code, *arguments):
        return self.execute_script(f"return {code.strip()}", *arguments)

    def texts(self, selector):
        return self.js("[...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def names(self):
        return self.texts("#cards .name")

    def assert_cards(self, images, scores, maps):
        """The cards are of these images in the order of these scores, and show them and these maps."""
        by_name = {image["name"]: image["runs"][0] for image in images}
        assert self.names() == by_score(images, scores)
        shown = [by_name[name] for name in self.names()]
        drawn = self.js("[...document.querySelectorAll('#cards .heat')].map((i) => i.src.split(',')[1])")
        assert drawn == [image["maps"][maps] for image in shown]
        found = [float(text) for text in self.texts("#cards .score")]
        assert found == pytest.approx([image["scores"][scores] for image in shown], rel=1e-3)

    def press(self, group, value):
        self.one(f'#{group} [data-value="{value}"]').click()

    def pressed(self, group):
        return [button.get_attribute("data-value") for button in self.all(f"#{group} [aria-pressed=true]")]

    def choose(self, selector, index):
        Select(self.one(selector)).select_by_index(index)

    def keys(self, *keys):
        self.switch_to.active_element.send_keys(*keys)

    def tab_to(self, selector):
        for _ in range(60):
            self.keys(Keys.TAB)
            if self.js("document.activeElement.matches(arguments[0])", selector):
                return
        pytest.fail(f"the Tab key does not get to {selector}")

    def opacities(self, where):
        return [
            float(self.js("getComputedStyle(document.querySelector(arguments[0])).opacity", f"{where} {part}"))
            for part in (".photo", ".heat")
        ]
