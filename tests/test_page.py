"""The page of `rarec serve` in a real browser: search, build, press, explain, fail, add; by keyboard; on a phone."""

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
    made.wait(lambda: made.all("#served-items li"))
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
        return "\n".join(element.get_property("textContent") for element in self.all(selector))

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


def test_a_history_is_built_by_searching_and_changes_the_one_list(page, recommender):
    before = page.text("#served-items button")
    words = recommender.bundle.catalogue.titles[3].split()[:2]
    page.search(" ".join(words))
    title = page.all("#found button")[0].text
    page.all("#found button")[0].click()
    page.wait(lambda: title in page.text("#history li"))
    page.wait(lambda: page.text("#served-items button") not in ("", before))
    (item,) = [
        item for item, of in zip(recommender.items, recommender.bundle.catalogue.titles, strict=True) if of == title
    ]
    expected = "\n".join(one.title for one in recommender.recommend([[item]], 10)[0])
    page.wait(lambda: page.text("#served-items button") == expected)
    assert not page.one("#more table").is_displayed()
    page.one("#more summary").click()
    page.wait(lambda: len(page.all("#columns > div")) == len(recommender.bundle.facts["parts"].keys() - {"new"}))
    assert "per_layer" in page.one("#served").text
    assert len(page.all("#scores tr")) == 10
    page.one("#more summary").click()
    page.one("#history button").click()
    page.wait(lambda: not page.all("#history li") and page.text("#served-items button") == before)


def test_without_a_history_the_popular_items_are_shown_and_said_to_be(page, recommender):
    popular = recommender.recommend([[]], 10)[0]
    assert page.text("#served-items button") == "\n".join(one.title for one in popular)
    assert "sell best" in page.one("#state").text


def test_an_item_is_pressed_and_says_why_in_words_that_are_also_read_out(page, recommender):
    page.one("#sample").click()
    page.wait(lambda: "For this customer" in page.text("#state"))
    button = page.all("#served-items button")[0]
    assert button.size["height"] >= 44
    button.click()
    page.wait(lambda: page.all("#served-items ul li"))
    reasons = page.text("#served-items ul li")
    assert "It is like" in reasons
    assert not [title for title in recommender.compare(recommender.items[:1]) if title in reasons]
    assert button.get_attribute("aria-expanded") == "true"
    assert page.one("#heard").get_attribute("role") == page.one("#state").get_attribute("role") == "status"
    assert page.text("#heard") == reasons.replace("\n", " ")
    button.click()
    page.wait(lambda: not page.all("#served-items ul"))
    page.one("#clear").click()
    page.wait(lambda: not page.all("#history li"))


def test_an_error_is_said_and_leaves_no_list_of_another_history(page):
    page.one("#more summary").click()
    page.wait(lambda: page.all("#columns li"))
    offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.browser.execute_cdp_cmd("Network.enable", {})
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**offline, "offline": True})
    try:
        page.one("#sample").click()
        page.wait(lambda: "cannot be reached" in page.one("#state").text)
        assert not page.all("#served-items li, #columns li, #scores tr")
    finally:
        page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**offline, "offline": False})
    page.one("#sample").click()
    page.wait(lambda: page.all("#served-items li"))
    page.browser.get_log("browser")  # where Chromium has noted that it was offline


def test_a_new_product_is_placed_and_its_title_is_text(page):
    title = "<img src=x onerror=alert(1)> amber lamp"
    page.one("details:last-of-type summary").click()
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


@pytest.mark.parametrize(("width", "height", "screens"), [(390, 844, 2), (320, 568, 5)])
def test_a_phone_needs_no_sideways_scrolling_and_few_screens(page, width, height, screens):
    page.one("#sample").click()
    page.wait(lambda: len(page.all("#history li")) > 1 and "For this customer" in page.text("#state"))
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.all("#served-items button")[0].click()
        page.wait(lambda: page.all("#served-items ul li"))
        sizes = "const all = document.documentElement; return [all.scrollWidth, innerWidth, all.scrollHeight]"
        wide, own, high = page.browser.execute_script(sizes)
        assert (wide <= own, own) == (True, width)
        assert high <= screens * height
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
