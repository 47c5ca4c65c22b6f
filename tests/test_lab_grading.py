"""The instructor's and the student's side of nbgrader in JupyterLab, used by a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import grading_fixtures as small
import nbformat
import pytest

pytest.importorskip("playwright.sync_api")
pytest.importorskip("jupyterlab")
pytest.importorskip("nbgrader", reason="grading needs the extra cpugrpo-edu[grading]")

from playwright.sync_api import sync_playwright

from cpugrpo_edu import inventory
from cpugrpo_edu.grading import course as grading

ROOT = Path(__file__).resolve().parent.parent
BANK = ROOT / "notebooks" / "instructor" / "concept_inventory.json"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium found; CHROMIUM names it"),
]

SOLVED = {"why": "It lowers the variance and leaves the mean."}


@contextmanager
def jupyter_lab(course, folder):
    """A server of its own on a free port, started in the course folder; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kernel = folder / "data" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": command, "display_name": "Python 3", "language": "python"})
    )
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    options = [f"--port={port}", "--no-browser", "--ip=127.0.0.1", "--allow-root"]
    options += ["--IdentityProvider.token=", "--LabApp.news_url=None"]
    address = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=course,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + 120
            while not answers(f"{address}/api/status"):
                assert time.monotonic() < deadline, (folder / "server.log").read_text()[-2000:]
                time.sleep(0.2)
            yield address
        finally:
            server.terminate()
            server.wait(30)


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A course with a released assignment, open in a browser: its folder, page, screenshots."""
    root = tmp_path / "course"
    grading.new_course(root)
    grading.Course(root).release("small", small.write_master(tmp_path / "master"))
    pictures = Path(os.environ.get("SCREENSHOTS", tmp_path))
    with jupyter_lab(root, tmp_path) as address, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(f"{address}/lab")
        page.get_by_role("menuitem", name="Nbgrader").wait_for()
        yield root, page, address, pictures
        browser.close()


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
        page.get_by_text(re.compile(r"Python 3.* \| Idle")).wait_for()
        page.get_by_role("button", name="Validate").click()
        page.get_by_role("dialog").get_by_text(said).first.wait_for()
        page.screenshot(path=pictures / f"validate-{said.split()[0]}.png")
        page.get_by_role("dialog").get_by_role("button").last.click()


def test_the_form_of_the_concept_inventory(lab):
    root, page, address, pictures = lab
    bank = inventory.read_bank(BANK)
    inventory.write_student_version(bank, root / "concepts")
    page.goto(f"{address}/lab/tree/concepts/concepts.ipynb?reset")
    page.get_by_text(re.compile(r"Python 3.* \| Idle")).wait_for()
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
