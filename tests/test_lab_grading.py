"""The instructor's and the student's side of nbgrader in JupyterLab, used by a browser."""

from __future__ import annotations

import os
from pathlib import Path

import grading_fixtures as small
import nbformat
import pytest
from lab_fixtures import ROOT, idle, lab_page, needs_browser

pytest.importorskip("playwright.sync_api")
pytest.importorskip("jupyterlab")
pytest.importorskip("nbgrader", reason="grading needs the extra cpugrpo-edu[grading]")

from cpugrpo_edu.course import course as grading
from cpugrpo_edu.course import inventory

BANK = ROOT / "notebooks" / "instructor" / "concept_inventory.json"

pytestmark = [pytest.mark.slow, needs_browser]

SOLVED = {"why": "It lowers the variance and leaves the mean."}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A course with a released assignment, open in a browser: its folder, page, screenshots."""
    root = tmp_path / "course"
    grading.new_course(root)
    grading.Course(root).release("small", small.write_master(tmp_path / "master"))
    pictures = Path(os.environ.get("SCREENSHOTS", tmp_path))
    with lab_page(root, tmp_path) as (page, address):
        page.goto(f"{address}/lab")
        page.get_by_role("menuitem", name="Nbgrader").wait_for()
        yield root, page, address, pictures


def from_menu(page, name):
    page.get_by_role("menuitem", name="Nbgrader").click()
    page.get_by_role("menuitem", name=name).click()


def test_formgrader_assignment_list_and_validation(lab):
    root, page, address, pictures = lab
    from_menu(page, "Formgrader")
    frame = page.frame_locator("iframe").first
    frame.get_by_role("link", name="small", exact=True).first.wait_for()
    page.screenshot(path=pictures / "formgrader.png")

    from_menu(page, "Assignment List")
    page.get_by_role("button", name="Fetch").click()
    page.get_by_role("button", name="Submit").wait_for()
    page.screenshot(path=pictures / "assignment-list.png")
    fetched = root / "small" / "small.ipynb"
    assert fetched.exists()

    # Not solved: validation says so. Solved: it passes, without the hidden tests.
    for answers, said in ((None, "failed"), (SOLVED, "passes all the tests")):
        if answers is not None:
            done = small.submission(nbformat.read(fetched, as_version=4), **answers)
            nbformat.write(done, fetched)
        page.goto(f"{address}/lab/tree/small/small.ipynb?reset")
        idle(page)
        page.get_by_role("button", name="Validate").click()
        page.get_by_role("dialog").get_by_text(said).first.wait_for()
        page.screenshot(path=pictures / f"validate-{said.split()[0]}.png")
        page.get_by_role("dialog").get_by_role("button").last.click()


def test_the_form_of_the_concept_inventory(lab):
    root, page, address, pictures = lab
    bank = inventory.read_bank(BANK)
    inventory.write_student_version(bank, root / "concepts")
    page.goto(f"{address}/lab/tree/concepts/concepts.ipynb?reset")
    idle(page)
    page.locator(".jp-Notebook .jp-CodeCell").first.click()
    page.keyboard.press("Shift+Enter")
    page.get_by_placeholder("4 to 12").fill("ab12")
    page.get_by_placeholder("4 to 12").press("Tab")
    page.get_by_text(bank.items[0].choices[1]).first.click()
    page.screenshot(path=pictures / "concepts.png")
    page.get_by_role("button", name="Save", exact=True).last.click()
    page.get_by_text("Saved 1 of").wait_for()
    page.screenshot(path=pictures / "concepts-saved.png")
    [sheet] = inventory.read_sheets(root / "concepts", bank)
    assert sheet.answers == {bank.items[0].id: "b"}
