"""The book builds without a network, and its buttons lead where they say."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from docutils import nodes

ROOT = Path(__file__).resolve().parent.parent
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
DOCKERFILES = sorted(ROOT.glob("Dockerfile*"))
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


def small_book(folder, **environment):
    """The links to other sites on a page built with the book's own configuration."""
    (folder / "notebooks").mkdir()
    source = json.loads((ROOT / "notebooks" / "00_setup.ipynb").read_text())
    source["cells"] = [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# One page"}]
    (folder / "notebooks" / "00_setup.ipynb").write_text(json.dumps(source))
    (folder / "_toc.yml").write_text("format: jb-book\nroot: notebooks/00_setup\n")
    shutil.copy(ROOT / "_config.yml", folder)
    (folder / "book").mkdir()
    for name in ("_ext", "_static", "references.bib"):
        (folder / "book" / name).symlink_to(ROOT / "book" / name)
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", "-W", "-n"]
    done = subprocess.run(
        [*command, "--keep-going", str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    page = (folder / "_build" / "html" / "notebooks" / "00_setup.html").read_text()
    return [html.unescape(link) for link in re.findall(r'href="(https://[^"]*)"', page)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("repository", "on_binder", "on_colab"),
    [
        (
            "https://github.com/course/grpo",
            "/v2/gh/course/grpo/main",
            "/github/course/grpo/blob/main/notebooks/00_setup.ipynb",
        ),
        (
            "https://git.example.edu/course/grpo/",
            "/v2/git/https%3A%2F%2Fgit.example.edu%2Fcourse%2Fgrpo/main",
            None,  # Colab opens GitHub only
        ),
    ],
)
def test_launch_buttons_open_the_chapter_in_the_named_repository(
    tmp_path, repository, on_binder, on_colab
):
    hub = "https://hub.example.edu"
    links = small_book(tmp_path, BOOK_REPOSITORY=repository, BOOK_JUPYTERHUB=hub)
    lab = "lab/tree/notebooks/00_setup.ipynb"
    assert links.pop(0) == f"{CONFIG['launch_buttons']['binderhub_url']}{on_binder}?urlpath={lab}"

    pull = urlsplit(links.pop(0))  # the form of nbgitpuller
    assert (pull.netloc, pull.path) == ("hub.example.edu", "/hub/user-redirect/git-pull")
    assert parse_qs(pull.query) == {
        "repo": [repository.rstrip("/")],
        "branch": [CONFIG["repository"]["branch"]],
        "urlpath": ["lab/tree/grpo/notebooks/00_setup.ipynb"],
    }
    expected = [] if on_colab is None else [CONFIG["launch_buttons"]["colab_url"] + on_colab]
    assert links == expected


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_copies_what_is_there(path):
    """Building an image takes minutes; check at least what it copies."""
    lines = path.read_text().replace("\\\n", " ").splitlines()
    steps = [line.split() for line in lines if line and not line.startswith("#")]
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [
        source
        for word, *rest in steps
        if word == "COPY"
        for source in [part for part in rest if not part.startswith("--")][:-1]
    ]
    assert "pyproject.toml" in copied
    for source in copied:
        assert list(ROOT.glob(source)), f"{path.name} copies {source}, which does not exist"
        assert source not in ignored
    assert steps[0][0] == "FROM" and ":" in steps[0][1], "name the version of the base image"
    for word, *rest in steps:
        if word == "RUN":
            for name in re.findall(r"(?<=python )[\w/]+\.py", " ".join(rest)):
                assert any(Path(name).is_relative_to(source) for source in copied), name


def test_the_lab_in_a_container_does_not_run_as_root():
    lines = (ROOT / "Dockerfile.lab").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and users[-1] not in ("root", "0")


def test_only_drawing_is_folded():
    fold = load(ROOT / "book" / "_ext" / "fold_plots.py")
    drawing = "fig = new_figure(6, 3)\n" + "ax = fig.subplots()\nax.plot(x, y)\n" * 5
    assert fold.only_draws("import torch\n" + drawing)
    assert not fold.only_draws(drawing + "for step in range(9):\n" + "    train(step)\n" * 9)
    assert not fold.only_draws("show(fig, alt='short')")
    assert not fold.only_draws("%time this is no Python\n" * 9)


def test_first_terms_are_whole_words_of_the_glossary():
    first_terms = load(ROOT / "book" / "_ext" / "first_terms.py")
    entries = first_terms.terms((ROOT / "book" / "glossary.md").read_text())
    assert {"token", "KL divergence", "McNemar's test"} <= set(entries)
    assert set(entries) >= first_terms.EVERYDAY, "an exception for a word without an entry"
    found = first_terms.pattern(entries).findall("Policies, tokens, a micro-batch and broken_token")
    assert found == [("token", "s"), ("micro-batch", "")]
    assert first_terms.is_use("Token", "token") and not first_terms.is_use("lora", "LoRA")


def test_chapters_are_linked_by_number_but_not_those_of_other_books():
    chapters = load(ROOT / "book" / "_ext" / "chapters.py")
    assert chapters.number("notebooks/14_ewc") == 14
    assert chapters.number("book/results") is None
    for text, found in {
        "see chapter 3.": ["3"],
        "Chapters 3 to 6 use chapters 1, 2 and 4;": ["3 to 6", "1, 2 and 4"],
        "12 chapters of 3 pages, the chapter's 4 rows": [],
    }.items():
        assert chapters.NUMBERS.findall(text) == found
    page = nodes.document(None, None)
    page += nodes.section("", nodes.title("", "Further reading"), nodes.paragraph("", "chapter 2"))
    page += nodes.section("", nodes.title("", "Chapter 1"), nodes.paragraph("", "chapter 2"))
    ours = [chapters.Chapters.is_ours(None, text) for text in page.findall(nodes.Text)]
    assert ours == [False, False, False, True]


def test_bibliography_links_lead_to_well_formed_addresses():
    entries = (ROOT / "book" / "references.bib").read_text().split("\n@")
    for entry in entries:
        for name, value in re.findall(r"\b(eprint|doi|year)\s*=\s*\{([^}]*)\}", entry):
            form = {"eprint": r"\d{4}\.\d{4,5}", "doi": r"10\.\d{4,}/\S+", "year": r"\d{4}"}[name]
            assert re.fullmatch(form, value), f"{name} {value} in {entry[:60]}"
            if name == "eprint":  # yymm of the first version, which the paper cannot precede
                [year] = re.findall(r"year=\{(\d{4})\}", entry)
                assert 2000 + int(value[:2]) <= int(year), entry[:60]
                assert 1 <= int(value[2:4]) <= 12, entry[:60]


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
