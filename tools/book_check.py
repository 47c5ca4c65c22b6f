"""Read the built book in a browser, every page, as a reader would, and print one table.

    python tools/book_check.py                    # all pages of _build/html
    python tools/book_check.py --screenshots DIR  # keep a picture of every page, wide and narrow

Every page: no error in the console, no failed request, none to another machine, mathematics
set, no markup left in the text, nothing cut off at the right, axe-core without serious violation
in light and dark, headings in order, a language, words for every picture, links that lead
somewhere, launch buttons for its own notebook, nothing wider than a telephone. Then what a reader
does: opens a solution, answers a quiz, moves a slider, follows the focus by keyboard, searches,
downloads a notebook, turns the light off, prints.

Needs Chromium; CHROMIUM names it where it is not found.
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
KEY_SLIDERS = {  # page and label: what the book's argument rests on
    ("03_grpo_from_zero", "ratio"): "advantage and clip",
    ("09_memory", "GiB available"): "memory planner",
    ("11_int8", "bits"): "quantization error",
    ("14_ewc", "lambda"): "Fisher and EWC",
}
NOT_PAGES = {"index.html", "genindex.html", "py-modindex.html", "search.html"}  # and _static

PROBLEMS_JS = """() => {
  const found = [];
  if (!document.documentElement.lang) found.push("no language");
  let level = 0;
  for (const h of document.querySelectorAll("article h1, article h2, article h3, article h4,"
      + "article h5, article h6")) {
    const now = +h.tagName[1];
    if (now > level + 1) found.push(`heading order: h${level} then h${now} "${h.textContent}"`);
    level = now;
  }
  if (document.querySelectorAll("article h1").length !== 1) found.push("not exactly one h1");
  for (const image of document.images)
    if (!image.hasAttribute("alt") || (image.closest("article") && !image.alt.trim()))
      found.push("no words for the picture " + image.src.slice(0, 80));
  if (document.querySelector("mjx-merror, [data-mjx-error]")) found.push("a formula is in error");
  const text = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
  while (text.nextNode()) {
    const parent = text.currentNode.parentElement;
    if (/\\\\\\(|\\\\\\[/.test(text.currentNode.data)
        && !parent.closest("pre, code, script, style, mjx-container, .sig"))
      found.push("a formula is not set: " + text.currentNode.data.trim().slice(0, 60));
    if (/\\|[ :]*-{2,}[-:]* *\\|/.test(text.currentNode.data.replaceAll("\u2014", "--"))
        && !parent.closest("pre, code, script, style"))
      found.push("a table is not set: " + text.currentNode.data.trim().slice(0, 60));
    if (/`|(^|\\s)[*][*][A-Za-z]|\\]\\(/.test(text.currentNode.data)
        && !parent.closest("pre, code, script, style, mjx-container, .sig"))
      found.push("markup is shown: " + text.currentNode.data.trim().slice(0, 60));
  }
  for (const a of document.querySelectorAll("article a[href^=http]"))
    if (/[.](py|md|sh|json|yml|txt)$/.test(a.hostname))
      found.push("a file name became a web address: " + a.href);
  return found;
}"""

# What a reader at a desk would have to scroll for: code in the text, printed output, formulas.
# Code cells are left out: ruff holds them to 76 characters.
CUT_JS = """() => [...document.querySelectorAll("article pre, article div.math mjx-container")]
  .filter(e => e.offsetParent && !e.closest(".cell_input")
    && e.scrollWidth > e.clientWidth + (e.tagName === "PRE" ? 20 : 1))
  .map(e => `cut off by ${e.scrollWidth - e.clientWidth} px: `
    + (e.closest("div.math")?.id || e.textContent.trim().slice(0, 60)))"""

LINKS_JS = """() => ({
  ids: [...document.querySelectorAll("[id]")].map(e => e.id),
  links: [...new Set([...document.querySelectorAll("a[href]")].map(a => a.href))]})"""

WIDTH_JS = """() => {
  const wide = document.documentElement.scrollWidth, page = document.documentElement.clientWidth;
  if (wide <= page + 1) return [];
  const guilty = [...document.querySelectorAll("article *")]
    .filter(e => e.getBoundingClientRect().right > page + 1)
    .slice(0, 3).map(e => e.tagName.toLowerCase() + "." + e.className);
  return [`${wide} px wide on a screen of ${page}: ` + guilty.join(", ")];
}"""

NARROW_JS = """() => {
  const found = [], wide = document.querySelector("article").clientWidth;
  for (const note of document.querySelectorAll("article aside.margin"))
    if (note.offsetWidth < 0.8 * wide) found.push("a margin note squeezes the text");
  for (const number of document.querySelectorAll("article div.math .eqno")) {
    const formula = number.parentElement.querySelector("mjx-container").getBoundingClientRect();
    if (formula.height && number.getBoundingClientRect().top < formula.bottom - 2)
      found.push("a number beside its formula: " + number.parentElement.id);
  }
  for (const button of document.querySelectorAll(".bd-header-article :is(button, label, a)")) {
    const box = button.getBoundingClientRect();
    if (box.width && getComputedStyle(button).visibility === "visible"
        && !button.closest(".dropdown-menu") && (box.left < 0 || box.right > innerWidth))
      found.push("a button off the screen: " + (button.title || button.className));
  }
  return found;
}"""

AXE_JS = """async only => {
  const options = {resultTypes: ["violations"], preload: false};
  if (only) options.runOnly = {type: "rule", values: only};
  return (await axe.run(document, options)).violations.map(v => (
    {id: v.id, impact: v.impact, count: v.nodes.length,
     first: v.nodes.slice(0, 2).map(n => n.target.join(" ") + " " + n.html.slice(0, 120)),
     why: (v.nodes[0].failureSummary || "").slice(0, 300)}));
}"""


@dataclass
class Findings:
    """What is wrong, by kind, each with the page it is on."""

    pages: int = 0
    ids: dict[str, set[str]] = field(default_factory=dict)  # the places of each page
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
            pass  # the browser went on to the next page before it had all of the last

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
    """Note errors of the console and of the network; other machines are never reached."""

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


def check_page(page, base: str, name: str, axe: str, findings: Findings, pictures: Path | None):
    settle(page, f"{base}/{name}")
    problems = page.evaluate(PROBLEMS_JS) + page.evaluate(CUT_JS) + chapter_problems(page, name)
    for problem in problems:
        findings.add("page problems", name, problem)
    there = page.evaluate(LINKS_JS)
    findings.ids[name], findings.links[name] = set(there["ids"]), there["links"]
    page.evaluate(axe)
    for theme, rules in (("light", None), ("dark", ["color-contrast"])):
        set_theme(page, theme)
        for violation in page.evaluate(AXE_JS, rules):
            if violation["impact"] in SEVERE:
                what = "{id} ({impact}), {count}: {first} {why}".format(**violation)
                findings.add("accessibility violations", name, f"{theme}, {what}")
    set_theme(page, "light")
    if pictures:
        picture(page, pictures / f"{name.replace('/', '-')[:-5]}-wide.png")
    page.set_viewport_size(NARROW)
    for problem in page.evaluate(WIDTH_JS) + page.evaluate(NARROW_JS):
        findings.add("page problems", name, problem)
    if pictures:
        picture(page, pictures / f"{name.replace('/', '-')[:-5]}-narrow.png")
    page.set_viewport_size(WIDE)


def chapter_problems(page, name: str) -> list[str]:
    """A chapter says its number, and launches its own notebook, which the repository has."""
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
    """Every link within the book leads to a file of it, and to a place that is there."""
    for name, links in findings.links.items():
        for link in links:
            if not link.startswith(base):
                continue
            address = urlparse(link)
            path = unquote(address.path).lstrip("/")
            place = unquote(address.fragment)
            known = findings.ids.get(path)
            if not (folder / path).is_file():
                findings.add("page problems", name, f"a link to no page: {path}")
            elif place and known is not None and place not in known:
                findings.add("page problems", name, f"a link to no place: {path}#{place}")


def picture(page, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(500)  # the side bars slide away
    page.screenshot(path=path, full_page=True)


# What a reader does. Each gets the page and the book's address, and fails by AssertionError.


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
    """On every chapter, to both ends: another picture and another value each time."""
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
    """Every stop of the Tab key on a page is drawn with a line around it, on the screen."""
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
        assert there["seen"], f"no focus is seen on {there['what']}"
        stops.add(there["what"])
    assert len(stops) > 20, f"the Tab key stops at {len(stops)} places only"


def prints(page, base: str) -> None:
    """On paper: no bars, the solutions open, nothing wider than the sheet."""
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
    for _ in range(3):  # the button goes round: as the system, light, dark
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
        except Exception as error:  # the browser's own errors are findings too
            what = f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            findings.add("reader's actions that fail", action.__name__, what)


def check(folder: Path, only: str = "", pictures: Path | None = None) -> Findings:
    import axe_playwright_python

    axe = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text()
    findings = Findings()
    with serve(folder) as base, browser_page() as page:
        watch(page, base, findings)
        for name in pages(folder):
            if only in name:
                findings.pages += 1
                check_page(page, base, name, axe, findings, pictures)
                print(f"\r{findings.pages} {name:60.60}", end="", file=sys.stderr, flush=True)
        dead_links(findings, folder, base)
        if not only:
            act(page, base, findings)
    print(file=sys.stderr)
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="pages whose name has this; no actions then")
    parser.add_argument("--screenshots", type=Path, help="folder for a picture of every page")
    arguments = parser.parse_args()
    if not chromium():
        print("book check skipped: no Chromium here (install it, or set CHROMIUM to its path)")
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
