"""Read the built book in a browser, every page, as a reader would, and print one table.

    python tools/book_check.py                    # all pages of _build/html
    python tools/book_check.py --screenshots DIR  # keep a picture of every page, wide and narrow

Every page must have no error in the console, no failed request and none to another machine,
typeset mathematics, no markup left in the text, nothing cut off at the right, no serious axe-core
violation in light and dark, headings in order, a language, words for every picture, links that
lead somewhere, launch buttons for its own notebook, and nothing wider than a telephone
(book_check.js). Then it does what a reader does: opens a solution, answers a quiz, moves a slider,
follows the focus by keyboard, searches, downloads a notebook, turns the light off, prints.

Needs Chromium; set CHROMIUM to its path where it is not found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDE = {"width": 1280, "height": 900}
NARROW = {"width": 390, "height": 844}
SEVERE = ("serious", "critical")
KEY_SLIDERS = {  # page and label: the sliders that the book's argument rests on
    ("03_grpo_from_zero", "ratio"): "advantage and clip",
    ("09_memory", "GiB available"): "memory planner",
    ("11_int8", "bits"): "quantization error",
    ("14_ewc", "lambda"): "Fisher and EWC",
}
NOT_PAGES = {"index.html", "genindex.html", "py-modindex.html", "search.html"}  # and _static


@dataclass
class Findings:
    """What is wrong, by kind, and on which page."""

    pages: int = 0
    ids: dict[str, set[str]] = field(default_factory=dict)  # anchors of each page
    links: dict[str, list[str]] = field(default_factory=dict)  # addresses on each page
    wrong: dict[str, list[str]] = field(
        default_factory=lambda: {
            "page problems": [],
            "console errors": [],
            "failed requests": [],
            "external requests": [],
            "accessibility violations": [],
            "reader's actions that fail": [],
        }
    )

    def add(self, kind: str, page: str, what: str) -> None:
        line = f"{page}: {what}"
        if line not in self.wrong[kind]:
            self.wrong[kind].append(line)


def chromium() -> str | None:
    """The browser: $CHROMIUM, else the first of the usual names on the path."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on the loopback interface; its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    class Patient(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # the browser left the page before it had loaded everything

    server = Patient(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


@contextmanager
def browser_page() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        try:
            yield browser.new_page(viewport=WIDE, color_scheme="light")
        finally:
            browser.close()


def pages(folder: Path) -> list[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*.html"))
    return sorted(
        path.as_posix()
        for path in found
        if not path.parts[0].startswith("_") and path.as_posix() not in NOT_PAGES
    )


def watch(page, base: str, findings: Findings) -> None:
    """Note errors of the console and the network; block every request to another machine."""

    def here() -> str:
        return urlparse(page.url).path.lstrip("/")

    def route(route) -> None:
        url = route.request.url
        if url.startswith((base, "data:", "blob:")):
            route.continue_()
        else:
            findings.add("external requests", here(), url[:120])
            route.abort()

    def console(message) -> None:
        if message.type == "error":
            findings.add("console errors", here(), message.text[:200])

    def response(response) -> None:
        if response.status >= 400:
            findings.add("failed requests", here(), f"{response.status} {response.url[:120]}")

    page.route("**/*", route)
    page.on("console", console)
    page.on("pageerror", lambda error: findings.add("console errors", here(), str(error)[:200]))
    page.on("response", response)


def settle(page, url: str) -> None:
    page.goto(url, wait_until="load")
    page.evaluate("() => window.MathJax?.startup ? MathJax.startup.promise : null")


def set_theme(page, theme: str) -> None:
    page.evaluate("t => document.documentElement.dataset.theme = t", theme)
    page.wait_for_timeout(300)  # colours fade over


def check_page(page, base: str, name: str, scripts: str, findings: Findings, pictures: Path | None):
    settle(page, f"{base}/{name}")
    page.evaluate(scripts)
    problems = page.evaluate("[...bookCheck.problems(), ...bookCheck.cutOff()]")
    there = page.evaluate("bookCheck.links()")
    findings.ids[name], findings.links[name] = set(there["ids"]), there["links"]
    for theme, rules in (("light", None), ("dark", ["color-contrast"])):
        set_theme(page, theme)
        for violation in page.evaluate("rules => bookCheck.accessibility(rules)", rules):
            if violation["impact"] in SEVERE:
                what = "{id} ({impact}), {count}: {first} {why}".format(**violation)
                findings.add("accessibility violations", name, f"{theme}, {what}")
    set_theme(page, "light")
    picture(page, pictures, name, "wide")
    page.set_viewport_size(NARROW)
    problems += page.evaluate("bookCheck.narrow()")
    picture(page, pictures, name, "narrow")
    page.set_viewport_size(WIDE)
    for problem in problems + chapter_problems(page, name):
        findings.add("page problems", name, problem)


def chapter_problems(page, name: str) -> list[str]:
    """A chapter must show its number and launch its own notebook, which must exist."""
    if not name.startswith("notebooks/"):
        return []
    notebook = Path(name).with_suffix(".ipynb").as_posix()
    found = [] if (ROOT / notebook).exists() else [f"{notebook} is not in the repository"]
    if not page.title().startswith(f"{int(Path(name).name[:2])}. "):
        found.append(f"the title has no number: {page.title()}")
    links = page.eval_on_selector_all(
        ".dropdown-launch-buttons a", "links => links.map(a => a.href)"
    )
    found += [] if links else ["no launch button"]
    return found + [
        f"launches {link}"
        for link in links
        if not link.startswith("https://")
        or not unquote(link).split("&branch=")[0].endswith(f"/{notebook}")
    ]


def dead_links(findings: Findings, folder: Path, base: str) -> None:
    """Every link within the book must lead to an existing file and anchor."""
    for name, links in findings.links.items():
        for link in links:
            if not link.startswith(base):
                continue
            address = urlparse(link)
            path = unquote(address.path).lstrip("/")
            place = unquote(address.fragment)
            known = findings.ids.get(path)
            if not (folder / path).is_file():
                findings.add("page problems", name, f"a link to a missing page: {path}")
            elif place and known is not None and place not in known:
                findings.add("page problems", name, f"a link to a missing anchor: {path}#{place}")


def picture(page, folder: Path | None, name: str, width: str) -> None:
    """Keep a picture of the page, where a folder for pictures is given."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(500)  # the side bars slide away
        file = f"{name.removesuffix('.html').replace('/', '-')}-{width}.png"
        page.screenshot(path=folder / file, full_page=True)


# What a reader does. Each action gets the page and the book's address, and fails by AssertionError.


def opens_a_solution(page, base: str) -> None:
    settle(page, f"{base}/notebooks/03_grpo_from_zero.html")
    solution = page.locator(".solution.toggle-hidden, .toggle.toggle-hidden").first
    handle = solution.element_handle()
    before = handle.bounding_box()["height"]
    solution.locator("button.toggle-button").first.click()
    page.wait_for_timeout(600)
    assert handle.bounding_box()["height"] > before, "the solution did not open"


def answers_a_quiz(page, base: str) -> None:
    settle(page, f"{base}/notebooks/03_grpo_from_zero.html")
    for verdict in ("correct", "incorrect"):
        want = "true" if verdict == "correct" else "false"
        button = page.locator(f".MCButton[data-correct='{want}']").first
        button.scroll_into_view_if_needed()
        button.click()
        page.wait_for_timeout(300)
        said = page.locator(".Feedback").first.inner_text()
        assert said.strip(), f"a {verdict} answer explains nothing"


def moves_every_slider(page, base: str) -> None:
    """On every chapter, to both ends: picture and value must change."""
    moved = set()
    for name in (name for name in pages(HTML) if name.startswith("notebooks/")):
        settle(page, f"{base}/{name}")
        for slider in page.locator(".explore").all():
            control = slider.locator("input[type=range]")
            shown = []
            for key in ("Home", "End"):
                control.focus()
                control.press(key)
                images = slider.locator("img:visible")
                assert images.count() == 1, f"{name}: {images.count()} pictures at once"
                src, words = (
                    images.first.get_attribute("src"),
                    slider.locator("output").inner_text(),
                )
                shown.append((src, words))
            assert shown[0][0] != shown[1][0], f"{name}: the picture stays the same"
            assert shown[0][1] != shown[1][1], f"{name}: the value stays the same"
            label = slider.locator("label").inner_text().strip().rstrip(":")
            moved.add((Path(name).stem, label))
    for slider, subject in KEY_SLIDERS.items():
        assert slider in moved, f"no slider {slider} about {subject}"


def finds_fisher(page, base: str) -> None:
    settle(page, f"{base}/search.html?q=Fisher")
    link = page.locator("#search-results li a").first
    link.wait_for(timeout=10_000)
    found = page.locator("#search-results li a").all_inner_texts()
    assert any("Fisher" in text for text in found), f"found only {found[:5]}"


def downloads_the_notebook(page, base: str) -> None:
    settle(page, f"{base}/notebooks/03_grpo_from_zero.html")
    href = page.locator("a.btn-download-notebook-button, a.btn-download-source-button").first
    url = page.evaluate("a => a.href", href.element_handle())
    answer = page.request.get(url)
    assert answer.ok and answer.json()["nbformat"] == 4, f"{url} is no notebook"


def sees_the_focus(page, base: str) -> None:
    """Every stop of the Tab key on a page has a visible outline."""
    settle(page, f"{base}/book/how_to_read.html")
    stops = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        there = page.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e);
            return e === document.body ? null : {what: e.outerHTML.slice(0, 80),
              seen: s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2}; }"""
        )
        if there is None:
            break
        assert there["seen"], f"no visible focus on {there['what']}"
        stops.add(there["what"])
    assert len(stops) > 20, f"the Tab key stops at only {len(stops)} places"


def prints(page, base: str) -> None:
    """On paper: no navigation bars, open solutions, nothing wider than the sheet."""
    settle(page, f"{base}/notebooks/03_grpo_from_zero.html")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 720, "height": 1000})  # A4 without its margins
    try:
        for bar in (".bd-sidebar-primary", ".bd-header-article", ".bd-sidebar-secondary"):
            assert not page.locator(bar).first.is_visible(), f"{bar} is printed"
        hidden = page.locator(".solution .section, .solution p:not(.admonition-title)").first
        assert hidden.is_visible(), "a solution is printed closed"
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 721, f"{wide} px wide on a sheet of 720"
    finally:
        page.emulate_media(media="screen")
        page.set_viewport_size(WIDE)


def turns_the_light_off(page, base: str) -> None:
    settle(page, f"{base}/book/index.html")

    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    before = background()
    for _ in range(3):  # the button cycles through system, light and dark
        page.locator("button.theme-switch-button:visible").first.click()
        page.wait_for_timeout(500)
        if background() != before:
            break
    assert background() != before, "the colours did not change"
    page.evaluate("localStorage.clear()")


ACTIONS: tuple[Callable, ...] = (
    opens_a_solution,
    answers_a_quiz,
    moves_every_slider,
    finds_fisher,
    downloads_the_notebook,
    sees_the_focus,
    prints,
    turns_the_light_off,
)


def act(page, base: str, findings: Findings) -> None:
    for action in ACTIONS:
        try:
            action(page, base)
        except Exception as error:  # errors of the browser itself are findings too
            what = f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            findings.add("reader's actions that fail", action.__name__, what)


def check(folder: Path, only: str = "", pictures: Path | None = None) -> Findings:
    import axe_playwright_python

    axe = Path(axe_playwright_python.__file__).with_name("axe.min.js")
    scripts = "\n".join(path.read_text() for path in (axe, Path(__file__).with_suffix(".js")))
    findings = Findings()
    with serve(folder) as base, browser_page() as page:
        watch(page, base, findings)
        for name in pages(folder):
            if only in name:
                findings.pages += 1
                check_page(page, base, name, scripts, findings, pictures)
                print(f"\r{findings.pages} {name:60.60}", end="", file=sys.stderr, flush=True)
        dead_links(findings, folder, base)
        if not only:
            act(page, base, findings)
    print(file=sys.stderr)
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only pages with this in their name; no actions")
    parser.add_argument(
        "--screenshots", type=Path, help="keep pictures of the pages in this folder"
    )
    arguments = parser.parse_args()
    if not chromium():
        print("book check skipped: no Chromium found (install it, or set CHROMIUM to its path)")
        return 0
    if not pages(HTML):
        sys.exit(f"no pages in {HTML}; run `make book` first")
    findings = check(HTML, arguments.only, arguments.screenshots)
    for lines in findings.wrong.values():
        print(*lines, sep="\n", end="\n" if lines else "")
    print(f"\n{'pages':32}{findings.pages:5}")
    for kind, lines in findings.wrong.items():
        print(f"{kind:32}{len(lines):5}")
    return int(any(findings.wrong.values()) or not findings.pages)


if __name__ == "__main__":
    sys.exit(main())
