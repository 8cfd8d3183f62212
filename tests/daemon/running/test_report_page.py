"""`dynlora report`: one page with everything in it, from real files, read by a real browser."""

import html
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from daemon.comparison import compare
from tests.daemon.running.conftest import QUICK, Bench, make_home
from tests.daemon.running.tiny_home import TinyHome
from tests.deploy.server.chromium import PROGRAM, Chromium

VOID = {"meta", "br", "img"}


class Reader(HTMLParser):
    """Checks nesting, and keeps what a browser would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.loaded += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v]
        assert tag not in ("script", "link", "iframe")
        assert not [k for k, _ in attributes if k.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def life(version_dir, tmp_path_factory):
    """Three versions, a held and a failed batch; one class has a name of markup. Only to be looked at."""
    bench = Bench(make_home(version_dir, tmp_path_factory.mktemp("life") / "home"), QUICK)
    bench.service.start()
    bench.drop("cat")
    bench.run()
    bench.behave(exams=[[40, 10, 25, 0], [40, 30, 1, 3]])
    bench.drop("<b>plates")
    bench.run()
    bench.behave(exams=[[40, 10, 0, 0]])
    bench.drop("forks")
    bench.run()
    bench.behave(fail="the <i>worker</i> said no", retry=False)
    bench.drop("pans")
    bench.run()
    bench.service.stop(lambda: True)
    return bench


def test_the_page_tells_the_whole_story_and_loads_nothing(life, dynlora, tmp_path):
    """Matrix, decisions with reasons, class counts, flips; no script, no address, and markup stays words."""
    page = tmp_path / "page.html"
    code, out, _ = dynlora("report", "--home", life.home, "-o", page, "--json")
    assert code == 0
    assert json.loads(out) == {"file": str(page), "version": 2, "versions": 3}
    text = page.read_text()
    reader = Reader()
    reader.feed(text)

    assert reader.open == []
    assert all(address.startswith("data:image/jpeg;base64,") for address in reader.loaded)
    assert "<b>plates" not in text
    words = html.unescape(re.sub(r"<[^>]+>", " ", text))
    for said in (
        "version 2 is live",
        "version 1 on 000001-cat: 25.0% before, 75.0% after, 40 images, 0 lost",
        "version 2 on older-1: 75.0% before, 70.0% after, 40 images, 3 lost",
        "gain: 25.0% → 87.5% right on 40 exam images",
        "expected at least +1.0%, found +0.0%",
        "the <i>worker</i> said no",
        "<b>plates",
        "Version 1 and version 2, asked about 2 kept exam images",
        "8 learnt, 2 exam",
    ):
        assert said in words, said


def test_without_images_none_is_on_the_page(life, dynlora, tmp_path):
    """For a page that leaves the house."""
    page = tmp_path / "page.html"
    assert dynlora("report", "--home", life.home, "-o", page, "--no-images")[0] == 0

    assert "<img" not in page.read_text()
    assert "not looked at" in page.read_text()


def test_an_exam_image_that_is_damaged_costs_no_other_its_answer(life, tmp_path):
    """It alone is left out of the comparison."""
    home = tmp_path / "home"
    shutil.copytree(life.home, home, symlinks=True)
    images = [image for image in (home / "exams").rglob("*.png") if "cat" in str(image)]
    images[0].write_bytes(b"no image")

    assert compare(life.home).images == 2
    assert compare(home).images == 1


def test_a_home_without_any_batch_has_a_page_too(home, dynlora, tmp_path):
    """It says that there is nothing to show yet."""
    page = tmp_path / "page.html"
    assert dynlora("report", "--home", home, "-o", page)[0] == 0

    text = page.read_text()
    assert "no version was graded yet" in text
    assert "version 0 has no parent" in text


def test_a_page_that_cannot_be_written_is_told_by_its_own_name(home, dynlora, tmp_path):
    """Not by that of the file it is written through."""
    page = tmp_path / f"{'x' * 300}.html"
    code, _, err = dynlora("report", "--home", home, "--no-images", "-o", page)

    assert code == 1
    assert f"Error: {page} cannot be written: File name too long; name another with -o" in err
    assert list(tmp_path.glob("*.tmp*")) == []


def test_pruned_versions_and_damaged_manifests_leave_a_page(tmp_path, dynlora):
    """What cannot be compared or read is said, and the rest is shown."""
    tiny = TinyHome(tmp_path / "home")
    tiny.create(published=3)
    tiny.store.prune(2)
    (tiny.store.path(2) / "weights.safetensors").unlink()
    (tiny.store.path(1) / "manifest.json").write_text("{")
    page = tmp_path / "page.html"
    assert dynlora("report", "--home", tiny.home, "-o", page)[0] == 0

    text = html.unescape(page.read_text())
    assert "version 1 cannot be used" in text
    assert "versions 2 and 3 are not both on disk with their weights" in text


@pytest.mark.skipif(PROGRAM is None, reason="needs a Chromium")
def test_a_browser_shows_it_without_a_complaint(life, dynlora, tmp_path):
    """Nothing is blocked by the page's own policy, everything fits the window, charts have a size."""
    page = tmp_path / "page.html"
    assert dynlora("report", "--home", life.home, "-o", page)[0] == 0
    with Chromium(tmp_path / "profile") as browser:
        browser.send("Page.navigate", url=page.as_uri())
        browser.wait_until("document.readyState == 'complete' && document.querySelector('h1') !== null")
        headings = browser.evaluate("[...document.querySelectorAll('h2')].map(h => h.innerText)")
        sizes = browser.evaluate(
            "[...document.querySelectorAll('svg')].map(s => Math.min(s.clientWidth, s.clientHeight))"
        )
        too_wide = browser.evaluate("document.documentElement.scrollWidth > innerWidth")
        styled = browser.evaluate("getComputedStyle(document.body).maxWidth")

        assert browser.errors == []
    assert len(headings) == 7
    assert min(sizes) > 10
    assert not too_wide
    assert styled == "1100px"
