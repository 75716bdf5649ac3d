"""The page as a reader has it: on a phone, on a desk, in the dark, on paper, with the keyboard, without eyes."""

from __future__ import annotations

import io
import itertools
import json
import re
from contextlib import contextmanager
from pathlib import Path

import axe_playwright_python
import pytest
from PIL import Image

from dither.report import write_report

SECTIONS = ["warnings", "claim", "attack", "ledger", "curves", "samples", "cost", "evaluation", "files"]
PHONE, DESK = 360, 1280
AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"

# Every visible text against the nearest opaque ground behind it, by WCAG 2.2's formula; returns those below 4.5.
CONTRAST = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walk.nextNode();) {
    const element = node.parentElement, box = element.getBoundingClientRect();
    if (!node.data.trim() || !box.width || box.right < 0 || element.closest("title, desc")) continue;
    let behind = element, ground = [0, 0, 0, 0];
    while (behind && !(ground.length === 3 || ground[3] === 1)) {
      ground = numbers(getComputedStyle(behind).backgroundColor);
      behind = behind.parentElement;
    }
    const style = getComputedStyle(element);
    const ink = numbers(element.closest("svg") ? style.fill : style.color);
    const [high, low] = [light(ink), light(ground)].sort((a, b) => b - a);
    found.push([(high + 0.05) / (low + 0.05), node.data.trim().slice(0, 40)]);
  }
  return found;
}"""


@contextmanager
def opened(browser, file: Path, width: int = DESK, scheme: str = "light"):
    """The page; on leaving, it must have said nothing on the console and asked nobody for anything."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url[:200]))
    page.on("request", lambda request: request.url.startswith("data:") or complaints.append(request.url[:200]))
    page.goto(file.as_uri())
    assert complaints == [file.as_uri()]
    yield page
    assert set(complaints) == {file.as_uri()}
    context.close()


@pytest.fixture(scope="session")
def report(run) -> Path:
    return run / "report.html"  # `dither train` wrote it


def test_long_paths_and_digests_of_public_data_fit_a_phone(browser, copy):
    said = {"path": "/data/" + "x" * 90, "sha256": "0" * 64, "taken_as_public": "on the word of A"}
    checkpoint = {**said, "sha256": {"dit.pt": "0" * 64}}
    certificate = json.loads((copy / "certificate.json").read_text())
    pretraining = {**said, "examples": 9, "labels": True, "steps": 7}
    tuning = {"mode": "lora", "trained_numbers": 1, "all_numbers": 9, "parameters": ["blocks.0." + "x" * 90]}
    certificate["public"] = {"checkpoint": checkpoint, "pretraining": pretraining, "fine_tuning": tuning}
    (copy / "certificate.json").write_text(json.dumps(certificate))
    with opened(browser, write_report(copy), PHONE) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE


def test_an_evaluation_with_a_private_score_fits_a_phone(browser, copy):
    score = {"accuracy": 0.8531, "classifier": "CNN", "epsilon_spent_on_held_out_images": 2.0, "delta": 1e-5}
    score = {
        name: {"value": value} for name, value in (score | {"noise_multipliers": [3.7308205695202794] * 9}).items()
    }
    weights = {"value": "0" * 64, "private": True}
    found = {
        "private_score": score,
        "distance_to_held_out_images": {"weights_sha256": weights, "frechet_distance": 7.5},
    }
    (copy / "evaluation.json").write_text(json.dumps(found))
    with opened(browser, write_report(copy), PHONE) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE
        assert page.locator("#evaluation dl dt").count() == 4 and page.locator("#evaluation h3").is_visible()


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_every_section_is_there_in_order_and_nothing_is_wider_than_the_screen(browser, report, width):
    with opened(browser, report, width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        boxes = [page.locator(f"main > #{name}").bounding_box() for name in SECTIONS]
        tops = [box["y"] for box in boxes]
        assert tops == sorted(tops)
        assert all(box["height"] > 60 and box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
        assert all(page.locator(f"#{name} h2").is_visible() for name in SECTIONS)
        charts = [page.locator("#curves svg").nth(i).bounding_box() for i in range(3)]
        beside = charts[1]["y"] == charts[0]["y"]
        assert beside == (width == DESK)
        loaded = page.evaluate("[...document.images].map((i) => i.naturalWidth)")
        assert len(loaded) == 3 and min(loaded) > 100
        shot = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("L")
        assert shot.width == width and shot.height > boxes[-1]["y"]
        for box in boxes:  # ink in every section
            part = shot.crop(tuple(int(v) for v in (box["x"], box["y"], box["x"] + box["width"], box["y"] + 60)))
            assert part.getextrema()[0] < 100 and part.getextrema()[1] > 230


@pytest.mark.parametrize(("width", "scheme"), [(PHONE, "light"), (DESK, "dark")])
@pytest.mark.parametrize(("folder", "pictures"), [("run", 3), ("evaluated", 4)])
def test_accessible_by_axe_and_by_contrast(browser, folder, pictures, width, scheme, request):
    report = request.getfixturevalue(folder) / "report.html"
    with opened(browser, report, width, scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.evaluate(AXE.read_text())
        found = page.evaluate("axe.run()")
        assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == []
        passed = {rule["id"] for rule in found["passes"]}
        expected = {"color-contrast", "image-alt", "heading-order", "html-has-lang", "landmark-one-main", "bypass"}
        assert passed >= expected
        contrast = page.evaluate(CONTRAST)
        assert len(contrast) > 100
        assert min(contrast)[0] >= 4.5, min(contrast)
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => +h.tagName[1])")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
        alts = page.evaluate("[...document.images].map((i) => i.alt)")
        assert len(set(alts)) == len(alts) == pictures and "after step 2" in alts[0]
        if folder == "evaluated":
            assert page.locator("#evaluation tr").count() > 10 and page.locator("#evaluation dl dt").count() == 4
            assert "nearest training images" in alts[-1]


def test_the_keyboard_reaches_every_link_and_shows_where_it_is(browser, report):
    with opened(browser, report) as page:
        page.keyboard.press("Tab")
        skip = page.locator(":focus")
        assert skip.inner_text() == "Skip to the report"
        assert skip.bounding_box()["x"] >= 0
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        page.reload()
        reached = set()
        for _ in range(page.locator("a, summary, [tabindex='0']").count() + 1):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.getAttribute('href')"))
            width = page.evaluate(
                "document.activeElement === document.body || getComputedStyle(document.activeElement).outlineWidth"
            )
            assert width in (True, "3px")
        links = page.evaluate("[...document.links].map((a) => a.getAttribute('href'))")
        assert len(links) > 15 and reached >= set(links)
        for link in links:
            target = page.locator(link).count() if link.startswith("#") else (report.parent / link).exists()
            assert target, link


def test_on_paper(browser, report):
    with opened(browser, report, DESK, "dark") as page:
        paper = page.pdf(format="A4", print_background=False)
        assert paper.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", paper)) >= 2
        page.emulate_media(media="print")
        assert not page.locator("nav").is_visible()
        assert page.locator("#attack table").is_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert min(page.evaluate(CONTRAST))[0] >= 4.5


def test_what_others_wrote_is_text(browser, copy):
    evil = "<img src=x onerror=alert(1)><script>alert(2)<"
    hostile = copy.rename(copy.parent / evil)
    certificate = json.loads((hostile / "certificate.json").read_text())
    certificate |= {"private": False, "reasons": [evil], "mechanism": evil, "versions": {evil: evil}}
    (hostile / "certificate.json").write_text(json.dumps(certificate))
    (hostile / "evaluation.json").write_text(json.dumps({evil: {"value": evil}}))
    (hostile / "config.yaml").write_text(json.dumps({"recipe": {"model": evil}}))
    with opened(browser, write_report(hostile)) as page:
        assert page.title() == f"Privacy report: {evil}"
        assert page.locator("h1").inner_text() == evil
        assert page.locator("script").count() == 0
        assert page.locator("[onerror]").count() == 0
        assert page.locator("#evaluation td").inner_text().startswith(evil)


def test_the_policy_stops_what_escaping_would_miss(browser, report, tmp_path):
    """The page with a script, a foreign style and a picture from elsewhere put into it: none of them works."""
    planted = "<script>document.title = 'owned'</script><style>h1 { color: red }</style><img src='file:///nowhere.png'>"
    file = tmp_path / "planted.html"
    file.write_text(report.read_text().replace("<main", planted + "<main"))
    page = browser.new_page()
    page.goto(file.as_uri())
    assert page.title() == "Privacy report: hospital scans"
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") != "rgb(255, 0, 0)"
    page.close()
