"""The project's promises about itself: one source of pins, CPU only, small, portable, licensed."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import tomllib
from pathlib import Path

import install
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import cpugrpo_edu
from cpugrpo_edu.cli import app

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [
    Requirement(line)
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
]
PYTHONS = ["3.11", "3.12", "3.13"]
SYSTEMS = {
    "linux": ("posix", "Linux", "x86_64"),
    "darwin": ("posix", "Darwin", "arm64"),
    "win32": ("nt", "Windows", "AMD64"),
}


# What the environment gets; whoever wants the extra "benchmark" builds it from source.
INSTALLED = [PROJECT["optional-dependencies"][extra] for extra in install.EXTRAS.split(",")]
DECLARED = [Requirement(text) for texts in (PROJECT["dependencies"], *INSTALLED) for text in texts]


def files() -> list[Path]:
    """The files that are or would be committed, relative to the project."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, so what is committed is unknown")
    return sorted({Path(name) for name in done.stdout.split("\0") if (ROOT / name).is_file()})


def texts() -> dict[str, str]:
    """The text files by name; binary ones are left out."""
    found = {}
    for path in files():
        data = (ROOT / path).read_bytes()
        if b"\0" not in data:
            found[path.as_posix()] = data.decode("utf-8", errors="replace")
    return found


# --- one source of pins -------------------------------------------------------------------------


def environment(python: str, system: str) -> dict[str, str]:
    """The markers' variables for a Python version on a system."""
    os_name, platform_system, machine = SYSTEMS[system]
    return {
        "python_version": python,
        "python_full_version": f"{python}.13",
        "sys_platform": system,
        "os_name": os_name,
        "platform_system": platform_system,
        "platform_machine": machine,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }


def applies(requirement: Requirement, where: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(where)


def pinned(where: dict[str, str]) -> dict[str, str]:
    """Package name to version; fails on a pin that is not exact or not the only one."""
    versions: dict[str, str] = {}
    for pin in PINS:
        if not applies(pin, where):
            continue
        name = canonicalize_name(pin.name)
        (specifier,) = pin.specifier
        assert specifier.operator == "==", f"{pin} is not exact"
        assert name not in versions, f"{name} is pinned twice for {where}"
        versions[name] = specifier.version
    return versions


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_lock_pins_every_dependency_within_its_range(python, system):
    where = environment(python, system)
    versions = pinned(where)
    for requirement in DECLARED:
        if applies(requirement, where):
            version = versions.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement} is not locked; run `make lock`"
            assert version in requirement.specifier, f"{requirement} but the lock has {version}"


def test_every_supported_python_is_checked():
    supported = SpecifierSet(PROJECT["requires-python"])
    assert all(python in supported for python in PYTHONS)
    assert "3.10" not in supported


def test_conda_environment_agrees_with_the_lock():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert conda["name"] == PROJECT["name"]
    assert conda["channels"] == ["conda-forge", "nodefaults"]

    specs = [line.split("=") for line in conda["dependencies"] if isinstance(line, str)]
    (python,) = [spec[1] for spec in specs if spec[0] == "python"]
    assert python in SpecifierSet(PROJECT["requires-python"])
    versions = pinned(environment(python, "linux"))
    for name, *version in specs:
        if name not in ("python", "pip", "c-compiler"):
            assert version[0] == versions[name.replace("pytorch", "torch")], name

    assert ["pytorch", versions["torch"], "cpu*"] in specs and ["c-compiler"] in specs
    assert {"pip": ["-r requirements.lock", "-e ."]} in conda["dependencies"]


def test_a_release_has_a_compiled_wheel_for_every_python():
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    [settings] = [step["env"] for step in release["jobs"]["compiled"]["steps"] if "env" in step]
    wheels = [f"cp{python.replace('.', '')}-manylinux_*" for python in PYTHONS]
    assert settings["CIBW_BUILD"].split() == wheels
    assert settings["CIBW_ENVIRONMENT"] == "CPUGRPO_SHIP_KERNEL=1"
    assert "--exclude libgomp.so.1" in settings["CIBW_REPAIR_WHEEL_COMMAND"]


def test_lock_has_no_cuda_package():
    names = {canonicalize_name(pin.name) for pin in PINS}
    assert not {name for name in names if install.CUDA.match(name)}
    assert not any("cu1" in str(pin.specifier) for pin in PINS)


def test_the_installer_takes_the_pin_of_torch():
    assert install.pinned_torch() == f"torch=={pinned(environment('3.11', 'linux'))['torch']}"


# --- what is committed --------------------------------------------------------------------------

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".npz"}
HOSTS = [("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("npmjs", "com"),
         ("anaconda", "org"), ("anaconda", "com"), ("deb.debian", "org"), ("crates", "io"),
         ("golang", "org")]  # fmt: skip
REGISTRY = re.compile("|".join(re.escape(".".join(host)) for host in HOSTS))
DEVELOPER_PATH = re.compile(r"(?<![\w.~$}-])/(?:work/|root/|tmp/w/|opt/pypi|home/\w|Users/\w)")
TORCH_HOST = ".".join(("download", "pytorch", "org"))


def test_weights_are_small():
    sizes = {path: (ROOT / path).stat().st_size for path in files() if path.suffix in WEIGHTS}
    assert sum(sizes.values()) <= 16e6, sizes


@pytest.mark.parametrize("line", [f"see https://{'.'.join(host)}/x" for host in HOSTS])
def test_registry_hosts_are_recognised(line):
    assert REGISTRY.search(line)


@pytest.mark.parametrize("path", ["work/main", "root/x", "tmp/w/venv", "home/ann", "Users/ann"])
def test_developer_paths_are_recognised(path):
    assert DEVELOPER_PATH.search(f'File "/{path}/a.py"')
    assert not DEVELOPER_PATH.search(f"https://example.org/{path}/a.py")


def test_no_file_names_a_registry_or_a_developers_folder():
    found = {}
    for name, text in texts().items():
        for pattern in (REGISTRY, DEVELOPER_PATH):
            if match := pattern.search(text):
                found[name] = match.group()
    assert not found


def test_only_the_installer_names_the_torch_index():
    assert [name for name, text in texts().items() if TORCH_HOST in text] == ["tools/install.py"]


def test_marked_notebook_cells_have_the_output_they_are_compared_with():
    # nbval passes a marked cell without a stored output silently
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            tagged = "nbval-check-output" in cell["metadata"].get("tags", [])
            if tagged or "NBVAL_CHECK_OUTPUT" in source:
                assert cell["outputs"], f"{path.name}: {source}"


def test_notebooks_are_committed_executed_and_narrow():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        notebook = json.loads(path.read_text())
        assert "widgets" not in notebook["metadata"], f"{path.name}: clear the widgets' state"
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)], path.name
        for cell in cells:
            source = "".join(cell["source"])
            assert max(map(len, source.splitlines())) <= 76, f"{path.name}: {source}"
            for output in cell["outputs"]:
                assert output["output_type"] != "error", f"{path.name}: {source}"
                assert output.get("name") != "stderr", f"{path.name}: {output}"


# --- what is said -------------------------------------------------------------------------------


def test_licences_are_there():
    assert "MIT License" in (ROOT / "LICENSE-CODE").read_text()
    prose = (ROOT / "LICENSE-PROSE").read_text()
    assert "CC-BY-4.0" in prose and "creativecommons.org/licenses/by/4.0" in prose
    assert PROJECT["license"] == "MIT"
    assert PROJECT["license-files"] == ["LICENSE-CODE", "LICENSE-PROSE"]


def test_citation_and_changelog_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == cpugrpo_edu.__version__
    assert citation["authors"] == PROJECT["authors"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest.group(1) == cpugrpo_edu.__version__


def test_readme_has_the_place_for_results_once():
    assert README.count("<!-- results:begin -->") == README.count("<!-- results:end -->") == 1
    assert README.index("<!-- results:begin -->") < README.index("<!-- results:end -->")


README = (ROOT / "README.md").read_text()


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.S | re.M)


def test_readme_is_short():
    """Without what `make results` writes into it."""
    written = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", README, flags=re.S)
    assert len(written.split()) <= 700 and len(README.split()) <= 1200


def test_readme_leads_to_files_that_exist():
    links = re.findall(r"\]\(([^):]+)\)", README)
    assert "book/how_to_run.md" in links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_readme_and_guide_have_the_same_python():
    [lines] = python_blocks("README.md")
    assert len([line for line in lines.splitlines() if line]) == 6
    assert lines in python_blocks("book/how_to_run.md")


def test_the_guide_explains_every_extra_that_users_choose():
    guide = (ROOT / "book" / "how_to_run.md").read_text()
    table = guide.split("| Extra |")[1].split("\n\n")[0]
    explained = set(re.findall(r"^\| `([a-z-]+)` \|", table, re.M))
    assert explained == PROJECT["optional-dependencies"].keys() - {"book", "dev"}


def test_code_on_the_pages_fits_their_width():
    """About 80 characters; a longer line is cut off."""
    long = []
    for page in [*Path("book").glob("*.md"), *Path("book").glob("*/*.md")]:
        for block in re.findall(r"^```\w+\n(.*?)^```", page.read_text(), re.M | re.S):
            long += [f"{page}: {line}" for line in block.splitlines() if len(line) > 80]
    assert not long, "\n".join(long)


def test_python_in_readme_and_guide_imports_what_is_there():
    for name in ("README.md", "book/how_to_run.md"):
        for block in python_blocks(name):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names), block


def test_readme_shows_every_room_and_every_module_of_the_root():
    [tree] = re.findall(r"^cpugrpo_edu/\n(.*?)^notebooks/", README, re.S | re.M)
    shown = set(re.findall(r"\b[a-z_]+(?:/|\.py)", tree))
    root = ROOT / "cpugrpo_edu"
    rooms = {f"{path.parent.name}/" for path in root.glob("*/__init__.py")}
    assert shown == rooms | {path.name for path in root.glob("*.py")} - {"__init__.py"}


def test_documented_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set()
    for name, text in texts().items():
        if name.endswith(".md") or name == ".pre-commit-config.yaml":
            named |= set(re.findall(r"(?:^|`|entry: )make ([a-z-]+[a-z])", text, re.MULTILINE))
    assert {"run", "test"} <= named
    assert named <= targets, named - targets


def test_documented_commands_exist():
    commands = {command.callback.__name__ for command in app.registered_commands}
    commands |= {str(group.name) for group in app.registered_groups}
    table = (ROOT / "book" / "how_to_run.md").read_text()
    assert set(re.findall(r"^\| `cpugrpo ([a-z]+)`", table, re.MULTILINE)) == commands
    for name, text in texts().items():
        if name.endswith((".md", ".yml", ".ipynb")) or name == "Makefile":
            named = set(re.findall(r"(?:^|[`/\s])cpugrpo ([a-z]+)", text, re.MULTILINE))
            assert named <= commands, f"{name}: {named - commands}"
