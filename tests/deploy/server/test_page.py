"""The page in a real browser: a dropped picture is classified, and a new version shows by itself."""

from pathlib import Path

import pytest

from tests.deploy.server.chromium import PROGRAM, Chromium
from tests.deploy.server.servers import jpeg, serving_process
from tests.deploy.swaps import point

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        PROGRAM is None, reason="there is no Chromium here (Debian: apt-get install chromium)"
    ),
]


def test_a_dropped_picture_is_answered_and_the_version_changes_live(serving: Path, tmp_path: Path) -> None:
    """Labels, scores and version appear after the drop; after a publish the page asks again by itself."""
    picture = tmp_path / "noise.jpg"
    picture.write_bytes(jpeg(size=(400, 300)))
    with serving_process(serving) as server, Chromium(tmp_path / "profile") as browser:
        browser.send("Page.navigate", url=server.url)
        browser.wait_until("document.getElementById('live')?.innerText.startsWith('version 0')")
        browser.drop(picture, 300, 250)
        browser.wait_until("document.querySelectorAll('#answers li').length === 5")
        browser.wait_until("document.getElementById('said').innerText.startsWith('Version 0')")
        browser.screenshot(tmp_path / "dropped.png")

        point(serving, 1)

        browser.wait_until("document.getElementById('live').innerText.startsWith('version 1')")
        browser.wait_until("document.getElementById('said').innerText.startsWith('Version 1')")
        assert browser.evaluate("document.querySelectorAll('#history li').length") == 2
        browser.screenshot(tmp_path / "changed.png")
        browser.evaluate(
            "{const field = document.getElementById('labels'); field.value = 'cat, a red car';"
            "field.dispatchEvent(new Event('change'))}"
        )
        browser.wait_until("document.querySelectorAll('#answers li').length === 2")
        browser.send("Page.navigate", url=f"{server.url}/docs")
        browser.wait_until("document.querySelectorAll('#operations details').length >= 26")
        browser.screenshot(tmp_path / "docs.png")

        assert browser.errors == []
    print(f"screenshots in {tmp_path}")
