"""The book builds without a network, and its buttons lead where they say."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
WIDGET = "application/vnd.jupyter.widget-view+json"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_addresses_from_the_environment_are_checked(monkeypatch):
    site_links = load(ROOT / "book" / "_ext" / "site_links.py")
    monkeypatch.setenv("BOOK_REPOSITORY", "https://git.example.edu/course/grpo")
    assert site_links.address("BOOK_REPOSITORY") == "https://git.example.edu/course/grpo"
    monkeypatch.setenv("BOOK_REPOSITORY", "course/grpo")
    with pytest.raises(SystemExit, match="course/grpo"):
        site_links.address("BOOK_REPOSITORY")


def test_mathematics_is_served_from_here_with_its_licence():
    path = ROOT / "book" / "_static" / CONFIG["sphinx"]["config"]["mathjax_path"]
    assert path.exists()
    assert (path.parent / "LICENSE").exists()


def test_no_chapter_needs_widget_scripts_from_elsewhere():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        notebook = json.loads(path.read_text())
        assert "widgets" not in notebook["metadata"], path.name
        outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
        assert not any(WIDGET in output.get("data", {}) for output in outputs), path.name


@pytest.mark.slow
def test_book_builds_without_a_network(tmp_path):
    alone = ["unshare", "-rn"]
    allowed = shutil.which("unshare") and not subprocess.run([*alone, "true"]).returncode
    if not allowed:
        pytest.skip("this system allows no network namespace (unshare -rn)")
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", "-W", "-n"]
    command += ["--keep-going", "--path-output", str(tmp_path), str(ROOT)]
    done = subprocess.run([*alone, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "_build" / "html" / "notebooks" / "03_grpo_from_zero.html").exists()
