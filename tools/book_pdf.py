"""Print the built book into one PDF, _build/cpugrpo_edu.pdf.

    python tools/book_pdf.py                # the whole book
    python tools/book_pdf.py --only 03_grpo # the pages whose name has this

Chromium prints every page as a reader's browser would (print rules of book/_static/book.css:
solutions open, sliders at their first position). The pages are then joined in the order of
_toc.yml under one title page and contents, with bookmarks, running page numbers, and links from
page to page that stay inside the document.

Needs Chromium; CHROMIUM names it where it is not found.
"""

from __future__ import annotations

import argparse
import html
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

import yaml
from book_check import HTML, ROOT, browser_page, chromium, serve, set_theme, settle
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, DictionaryObject, NameObject

OUTPUT = ROOT / "_build" / "cpugrpo_edu.pdf"
PAPER = {"format": "A4", "margin": dict.fromkeys(("top", "bottom", "left", "right"), "18mm")}
FRONT = "<style>body {font: 11pt sans-serif} a {color: inherit; text-decoration: none}</style>"


@dataclass(frozen=True)
class Chapter:
    """A page of the book: its file, title, depth below its part, and what was printed."""

    name: str
    part: str
    depth: int
    title: str
    printed: PdfReader


def listed(toc: dict) -> Iterator[tuple[str, str, int]]:
    """Page, part and depth of everything in _toc.yml, in its order."""

    def below(entries: list[dict], part: str, depth: int) -> Iterator[tuple[str, str, int]]:
        for entry in entries:
            yield entry["file"] + ".html", part, depth
            yield from below(entry.get("sections", []), part, depth + 1)

    yield toc["root"] + ".html", "", 0
    for part in toc["parts"]:
        yield from below(part["chapters"], part["caption"], 1)


def print_page(page, address: str) -> PdfReader:
    settle(page, address)
    set_theme(page, "light")
    options = {"scale": 0.75, "print_background": True, "outline": True, "tagged": True}
    return PdfReader(io.BytesIO(page.pdf(**PAPER, **options)))


def print_html(page, text: str) -> PdfReader:
    page.set_content(FRONT + text)
    return PdfReader(io.BytesIO(page.pdf(**PAPER)))


def contents(chapters: list[Chapter], first: list[int]) -> str:
    """The table of contents as HTML, a row for each part and each page."""
    rows, part = [], ""
    for chapter, number in zip(chapters, first, strict=True):
        if chapter.part != part:
            part = chapter.part
            rows.append(f'<tr><th colspan=2 style="text-align:left;padding-top:.7em">{part}')
        rows.append(
            f'<tr><td style="padding-left:{chapter.depth}em">{html.escape(chapter.title)}'
            f'<td style="text-align:right">{number}'
        )
    return f"<h1>Contents</h1><table style='width:100%;line-height:1.35'>{''.join(rows)}</table>"


def title_page(config: dict) -> str:
    title, _, subject = config["title"].partition(": ")
    return (
        f'<div style="text-align:center;padding-top:80mm"><h1 style="font-size:32pt">{subject}</h1>'
        f"<p style='font-size:16pt'>{title}</p>"
        f"<p>{config['author']}, {config['copyright']}</p></div>"
    )


def headings(printed: PdfReader) -> Iterator[tuple[str, int]]:
    """The sections of a printed page of the book, and the sheets that they begin on."""
    for entry in printed.outline[1:2]:  # below the page's own title, which comes first
        for section in entry if isinstance(entry, list) else []:
            if not isinstance(section, list):
                yield str(section.title), printed.get_destination_page_number(section)


def page_numbers(page, count: int) -> PdfReader:
    """As many pages, empty but for their number at the foot."""
    page.set_content('<p style="break-after:page">&nbsp;</p>' * count)
    number = (
        '<p style="width:100%;text-align:center;font:9pt sans-serif"><span class=pageNumber></span>'
    )
    options = {"display_header_footer": True, "header_template": "<p></p>"}
    return PdfReader(io.BytesIO(page.pdf(**PAPER, **options, footer_template=number)))


def inner_links(writer: PdfWriter, base: str, starts: dict[str, int]) -> None:
    """Links to other pages of the book become links to where they are in this document."""
    for page in writer.pages:
        for reference in page.get("/Annots", []):
            annotation = reference.get_object()
            action = annotation.get("/A", {})
            url = urlparse(str(action.get("/URI", "")))
            if f"{url.scheme}://{url.netloc}" != base:
                continue
            target = starts.get(unquote(url.path).lstrip("/"))
            del annotation["/A"]
            if target is not None:
                where = ArrayObject([writer.pages[target].indirect_reference, NameObject("/Fit")])
                annotation[NameObject("/A")] = DictionaryObject(
                    {NameObject("/S"): NameObject("/GoTo"), NameObject("/D"): where}
                )


def join(page, base: str, config: dict, chapters: list[Chapter]) -> PdfWriter:
    """Title page, contents and chapters, numbered, with bookmarks."""
    title = print_html(page, title_page(config))
    guess = print_html(page, contents(chapters, [0] * len(chapters)))
    lead = len(title.pages) + len(guess.pages)
    first, at = [], lead
    for chapter in chapters:
        first.append(at)
        at += len(chapter.printed.pages)
    table = print_html(page, contents(chapters, [number + 1 for number in first]))

    writer = PdfWriter()
    writer.append(title)
    writer.append(table, "Contents")
    part, parent = "", None
    for chapter, start in zip(chapters, first, strict=True):
        writer.append(chapter.printed, import_outline=False)
        if chapter.part != part:
            part = chapter.part
            parent = writer.add_outline_item(title=part, page_number=start)
        entry = writer.add_outline_item(title=chapter.title, page_number=start, parent=parent)
        for heading, page_number in headings(chapter.printed):
            writer.add_outline_item(title=heading, page_number=start + page_number, parent=entry)
    sheets = page_numbers(page, len(writer.pages)).pages
    for leaf, sheet in zip(writer.pages, sheets, strict=True):
        leaf.merge_page(sheet)
        leaf.compress_content_streams()  # merging has unpacked them
    inner_links(writer, base, {c.name: n for c, n in zip(chapters, first, strict=True)})
    writer.add_metadata({"/Title": config["title"], "/Author": config["author"]})
    return writer


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="pages whose name has this")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if not chromium():
        sys.exit("no Chromium here to print with; install it, or set CHROMIUM to its path")
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    pages = list(listed(yaml.safe_load((ROOT / "_toc.yml").read_text())))
    if missing := [name for name, _, _ in pages if not (HTML / name).exists()]:
        sys.exit(f"{missing[0]} is not in {HTML}; run `make book` first")
    chapters = []
    with serve(HTML) as base, browser_page() as page:
        for name, part, depth in pages:
            if arguments.only in name:
                printed = print_page(page, f"{base}/{name}")
                title = page.title().partition(" \u2014 ")[0]
                chapters.append(Chapter(name, part, depth, title, printed))
                print(f"\r{len(chapters)} {name:60.60}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        writer = join(page, base, config, chapters)
    writer.compress_identical_objects()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    writer.write(arguments.output)
    print(f"{arguments.output}: {len(writer.pages)} pages from {len(chapters)} of the book")
    return 0


if __name__ == "__main__":
    sys.exit(main())
