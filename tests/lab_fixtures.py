"""A JupyterLab of the test's own, and a browser that opens it as a learner would."""

from __future__ import annotations

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

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)

needs_browser = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium found; CHROMIUM names it where it is"
)


def until(condition, seconds=120, said=lambda: "waited in vain"):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.02)


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


@contextmanager
def jupyter_lab(work, state):
    """A server in the folder `work` on a free port; its settings and log are in `state`.

    Yields its address. Its kernel is this Python.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = state / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JUPYTER_CONFIG_DIR": str(state / "config"),
        "JUPYTER_DATA_DIR": str(state / "data"),
        "JUPYTERLAB_SETTINGS_DIR": str(state / "settings"),
        "IPYTHONDIR": str(state / "ipython"),
    }
    options = [f"--port={port}", "--no-browser", "--ip=127.0.0.1", "--allow-root"]
    options += ["--IdentityProvider.token="]
    log = state / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=work,
            env=environment,
            stdout=output,
            stderr=output,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            until(lambda: answers(f"{address}/api/status"), said=lambda: log.read_text()[-2000:])
            yield address
        finally:
            server.terminate()
            server.wait(30)


@contextmanager
def lab_page(work, state):
    """A page of the browser and the address of a server in the folder `work`."""
    from playwright.sync_api import sync_playwright

    with jupyter_lab(work, state) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.set_default_timeout(120_000)
            yield page, address
        finally:
            browser.close()


def idle(page):
    """Wait for the kernel of the notebook that is open."""
    page.get_by_text(re.compile(r"Python 3.* \| Idle")).wait_for()
