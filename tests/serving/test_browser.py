"""The page in headless Chromium: by mouse, by keyboard, on a phone's screen, and never a request to another host."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from geostream.locating.make import make_index
from geostream.store import Store
from tests.helpers import TinyPlace, tiny_places, write_layout
from tests.locating.indexes import small_index
from tests.runs.small_runs import run_with_checkpoint
from tests.serving.pages import Here, page_here, picture, wait_until

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here (apt install chromium-driver)"
    ),
]
OPTIONS = (
    "--headless=new --no-sandbox --disable-dev-shm-usage --use-angle=swiftshader --enable-unsafe-swiftshader "
    "--disable-background-networking --disable-component-update --no-first-run"
)
PATIENCE = 90.0  # seconds; the map is drawn without a GPU, maybe beside other tests


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for option in OPTIONS.split():
        options.add_argument(option)
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Driver(DRIVER))
    driver.set_page_load_timeout(PATIENCE)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def places_and_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[TinyPlace], Here]]:
    store = Store.open(tmp_path_factory.mktemp("store"))
    _, places = small_index(store)
    with page_here(store) as here:
        yield places, here


@pytest.fixture
def photos(places_and_page: tuple[list[TinyPlace], Here], tmp_path: Path) -> list[Path]:
    """Three photos of the test places, and one file that is none."""
    places, _ = places_and_page
    files = []
    for number in (12, 13, 14):
        files.append(tmp_path / f"photo-{number}.jpg")
        files[-1].write_bytes(places[number].images["view-00.jpg"])
    (tmp_path / "letter.jpg").write_bytes(b"Dear Sir")
    return [*files, tmp_path / "letter.jpg"]


class Screen:
    """The page as somebody sees it."""

    def __init__(self, chromium: webdriver.Chrome, url: str, width: int = 1280, height: int = 800) -> None:
        self.chromium = chromium
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for kind in ("browser", "performance"):
            chromium.get_log(kind)  # what others have left
        chromium.get(url)
        wait_until(lambda: "places" in self.text("about"), PATIENCE)

    def find(self, name: str) -> Any:
        return self.chromium.find_element(By.ID, name)

    def all(self, selector: str) -> list[Any]:
        return self.chromium.find_elements(By.CSS_SELECTOR, selector)

    def text(self, name: str) -> str:
        return str(self.find(name).get_attribute("textContent"))

    def take(self, *photos: Path) -> None:
        """Choose files, and wait until all are answered or refused."""
        before = len(self.all("#photos li"))
        self.find("files").send_keys("\n".join(map(str, photos)))
        wait_until(lambda: len(self.all("#photos li")) == before + len(photos), PATIENCE)
        wait_until(lambda: not self.all("#photos .mark.wait"), PATIENCE)

    @property
    def focused(self) -> Any:
        return self.chromium.switch_to.active_element

    def press(self, key: str) -> None:
        self.focused.send_keys(key)

    def tab_to(self, selector: str) -> None:
        """Press the tab key until an element has the focus."""
        wanted = self.all(selector)[0]
        for _ in range(40):
            if self.focused == wanted:
                return
            webdriver.ActionChains(self.chromium).send_keys(Keys.TAB).perform()
        raise AssertionError(f"{selector} cannot be reached by keyboard")

    def tiles_on_map(self) -> int:
        """How many tile images the browser has asked for since the page was opened."""
        return int(
            self.chromium.execute_script(
                "return performance.getEntriesByType('resource').filter((one) => one.name.includes('/tiles/')).length"
            )
        )

    def requests(self) -> list[str]:
        """URLs of all requests since the page was opened."""
        events = [json.loads(entry["message"])["message"] for entry in self.chromium.get_log("performance")]
        return [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Errors in the browser's console: scripts that failed, and what the Content-Security-Policy forbade."""
        return [entry["message"] for entry in self.chromium.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def url(places_and_page: tuple[list[TinyPlace], Here]) -> str:
    return f"{places_and_page[1].url}/"


def test_photos_are_answered_on_a_map_without_another_host(
    chromium: webdriver.Chrome, url: str, photos: list[Path]
) -> None:
    screen = Screen(chromium, url)
    screen.take(*photos[:3])
    assert len(screen.all("#candidates li")) == 5
    assert screen.text("verdict") == "Not sure"  # nothing was learned
    assert len(screen.all("#map .pin")) == 5
    wait_until(lambda: screen.tiles_on_map() > 5, PATIENCE)  # the ground, beside the five candidates
    wait_until(lambda: "3 photos answered" in screen.text("status"), PATIENCE)
    screen.all("#candidates button")[2].click()
    assert screen.all("#candidates button")[2].get_attribute("aria-pressed") == "true"
    assert screen.all("#map .pin.chosen")[0].text == "3"
    asked = screen.requests()
    own = urlsplit(url).netloc
    foreign = [one for one in asked if urlsplit(one).scheme in ("http", "https") and urlsplit(one).netloc != own]
    assert len(asked) > 10 and not foreign
    assert not screen.complaints()


def test_everything_can_be_reached_by_keyboard(chromium: webdriver.Chrome, url: str, photos: list[Path]) -> None:
    screen = Screen(chromium, url)
    screen.tab_to("#files")
    screen.take(*photos[:3])
    screen.tab_to("#photos button")
    screen.press(Keys.ARROW_RIGHT)
    assert screen.focused == screen.all("#photos button")[1]
    assert screen.text("name") == "photo-13.jpg"
    assert screen.focused.get_attribute("aria-current") == "true"
    screen.tab_to("#candidates button")
    screen.press(Keys.ARROW_DOWN)
    assert screen.all("#candidates button")[1].get_attribute("aria-pressed") == "true"
    screen.tab_to("#download")
    screen.tab_to("#map canvas")
    screen.tab_to("#map .pin")
    screen.press(Keys.ENTER)
    assert screen.all("#candidates button")[0].get_attribute("aria-pressed") == "true"
    assert screen.find("status").get_attribute("aria-live") == "polite"
    shown = [one for one in screen.all("button, input, canvas") if one.is_displayed()]
    assert len(shown) > 10 and all((one.accessible_name or "").strip() for one in shown)


def test_a_file_that_is_no_photo_and_too_many_photos(
    chromium: webdriver.Chrome, url: str, photos: list[Path], tmp_path: Path
) -> None:
    screen = Screen(chromium, url)
    screen.take(photos[3])
    assert screen.text("verdict") == "No answer" and "letter.jpg: not an image" in screen.text("why")
    assert len(screen.all("#photos .mark.wrong")) == 1
    screen.take(photos[0])
    screen.all("#photos button")[1].click()
    assert screen.text("verdict") == "Not sure"
    many = [tmp_path / f"many-{number}.jpg" for number in range(100)]
    for file in many:
        file.write_bytes(picture())
    screen.find("files").send_keys("\n".join(map(str, many)))
    wait_until(lambda: "100 photos are too many" in screen.text("status"), PATIENCE)
    assert len(screen.all("#photos li")) == 2


def test_the_answers_can_be_downloaded(
    chromium: webdriver.Chrome, url: str, photos: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "downloads"
    folder.mkdir()
    chromium.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    screen = Screen(chromium, url)
    screen.take(*photos[:2])
    screen.find("download").click()
    wait_until((folder / "places.geojson").is_file, PATIENCE)
    features = json.loads((folder / "places.geojson").read_text())["features"]
    assert {one["properties"]["photo"] for one in features} == {"photo-12.jpg", "photo-13.jpg"}
    assert len(features) == 10 and all(one["geometry"]["type"] == "Point" for one in features)


def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    chromium: webdriver.Chrome, url: str, photos: list[Path]
) -> None:
    screen = Screen(chromium, url, 390, 844)
    screen.take(*photos[:3])
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= 390
    for name in ("drop", "map", "result", "download"):
        box = screen.find(name).rect
        assert box["width"] > 100 and box["height"] > 20 and box["x"] >= 0 and box["x"] + box["width"] <= 390, name
    assert screen.find("map").rect["y"] < 844  # the map is on the first screen


def test_a_data_set_without_coordinates_has_tiles_and_says_why_there_is_no_map(
    chromium: webdriver.Chrome, tmp_path: Path, photos: list[Path]
) -> None:
    store = Store.open(tmp_path / "none")
    places = [replace(place, position=(math.nan, math.nan)) for place in tiny_places()]
    layout = write_layout(store, places, coordinates="none")
    make_index(*run_with_checkpoint(store, layout, "run"), layout, "base")
    with page_here(store) as here:
        screen = Screen(chromium, here.url)
        assert "no coordinates" in screen.text("nomap") and not screen.all("#map canvas")
        screen.take(photos[0])
        assert len(screen.all("#candidates img")) == 5
        assert not screen.complaints()
