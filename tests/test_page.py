"""The page of `rarec serve` in a real browser: search, build, compare, explain, add; by keyboard; on narrow screens."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving import Service, service

_there = bool(importlib.util.find_spec("selenium") and shutil.which("chromedriver"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not _there and "chromium" not in os.environ.get("RAREC_REQUIRE", ""), reason="needs Chromium and chromedriver"
    ),
]


@pytest.fixture(scope="module")
def serving(run) -> Iterator[Service]:
    with service(run.directory("export"), "--device", "cpu") as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service_of_driver = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service_of_driver)
    driver.implicitly_wait(10)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, serving) -> Iterator["Page"]:
    browser.set_window_size(1200, 1000)
    browser.get(f"{serving.url}/")
    made = Page(browser)
    made.wait(lambda: "per_layer" in made.text("#served") and made.all("#served-items li"))
    yield made
    assert browser.get_log("browser") == []


class Page:
    """The page in the browser."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def all(self, selector: str) -> list[Any]:
        return self.browser.execute_script("return [...document.querySelectorAll(arguments[0])]", selector)

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return "\n".join(element.text for element in self.all(selector))

    def wait(self, what: Any) -> None:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, 60, 0.05, [StaleElementReferenceException]).until(lambda _: what())

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def search(self, words: str) -> None:
        self.one("#query").send_keys(words)
        self.wait(lambda: self.all("#found button"))


def test_a_history_is_built_by_searching_and_changes_what_is_recommended(page, recommender):
    before = page.text("#served-items li")
    words = recommender.bundle.catalogue.titles[3].split()[:2]
    page.search(" ".join(words))
    title = page.all("#found button")[0].text
    page.all("#found button")[0].click()
    page.wait(lambda: title in page.text("#history li"))
    page.wait(lambda: page.text("#served-items li") not in ("", before))
    (item,) = [
        item for item, of in zip(recommender.items, recommender.bundle.catalogue.titles, strict=True) if of == title
    ]
    expected = [one.title for one in recommender.recommend([[item]], 10)[0]]
    page.wait(lambda: [row.text for row in page.all("#served-items li")] == expected)
    assert len(page.all("#columns > div")) == len(recommender.bundle.facts["parts"])
    page.one("#history button").click()
    page.wait(lambda: not page.all("#history li") and page.text("#served-items li") == before)


def test_a_sample_user_is_taken_and_an_item_explained(page):
    page.one("#sample").click()
    page.wait(lambda: len(page.all("#history li")) > 1)
    page.wait(lambda: page.text("#state") == "" and page.all("#served-items button"))
    page.all("#served-items button")[0].click()
    page.wait(lambda: page.all("#why tr"))
    assert page.all("#served-items button")[0].get_attribute("aria-expanded") == "true"
    assert "Nearest in the history" in page.text("#why")
    page.one("#clear").click()
    page.wait(lambda: not page.all("#history li"))


def test_a_new_product_is_placed_and_its_title_is_text(page):
    title = "<img src=x onerror=alert(1)> amber lamp"
    page.one("#title").send_keys(title)
    page.one("#new button").click()
    page.wait(lambda: "Place" in page.text("#place p"))
    assert page.text("#place strong") == title
    assert not page.all("#place img")


def test_the_keyboard_alone_does_it(page):
    from selenium.webdriver.common.keys import Keys

    for _ in range(20):
        page.press(Keys.TAB)
        if page.browser.switch_to.active_element.get_attribute("id") == "query":
            break
    page.press("lamp")
    page.wait(lambda: page.all("#found button"))
    page.press(Keys.ARROW_DOWN)
    page.press(Keys.ENTER)
    page.wait(lambda: len(page.all("#history li")) == 1)
    assert page.browser.switch_to.active_element.get_attribute("id") == "query"
    page.press("lamp")
    page.wait(lambda: page.all("#found button"))
    page.press(Keys.ENTER)
    page.wait(lambda: len(page.all("#history li")) == 2)
    page.press(Keys.TAB)
    assert page.browser.switch_to.active_element.get_attribute("aria-label").startswith("Remove ")
    page.press(Keys.ENTER)
    page.wait(lambda: len(page.all("#history li")) == 1)
    assert page.browser.switch_to.active_element.tag_name == "button"


def test_every_field_and_button_has_a_name(page):
    for element in page.all("input, button"):
        if element.is_displayed():
            assert element.accessible_name
    assert page.one("html").get_attribute("lang") == "en"


@pytest.mark.parametrize("width", [400, 320])
def test_a_narrow_screen_needs_no_sideways_scrolling(page, width):
    page.one("#sample").click()
    page.wait(lambda: len(page.all("#history li")) > 1)
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        wide, own = page.browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert (wide <= own, own) == (True, width)
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
