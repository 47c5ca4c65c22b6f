"""`make wheel`: which Pythons are tried, what counts as skipped, and what as a failure."""

from __future__ import annotations

import sys
from pathlib import Path

import install
import pytest
import try_wheel

WHEEL = Path("dist/cpugrpo_edu-0-py3-none-any.whl")


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport sys\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def pyenv(tmp_path, monkeypatch):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def test_the_newest_python_of_a_version_is_taken(pyenv):
    for version in ("3.12.9", "3.12.13", "3.11.20"):
        program(pyenv / "versions" / version / "bin" / "python", "")
    assert try_wheel.find_python("3.12").parts[-3] == "3.12.13"
    named = program(pyenv / "bin" / "python3.13", "")
    assert try_wheel.find_python("3.13") == named
    with pytest.raises(try_wheel.Skipped, match="not installed"):
        try_wheel.find_python("3.10")


def test_without_a_cpu_build_of_torch_a_python_is_skipped(pyenv, tmp_path):
    text = f"sys.exit({install.NO_CPU_TORCH!r} + ' torch==0')"
    program(pyenv / "bin" / "python3.13", text)
    with pytest.raises(try_wheel.Skipped, match="torch==0"):
        try_wheel.install("3.13", WHEEL, tmp_path / "venv")


def test_an_installation_that_fails_is_a_failure(pyenv, tmp_path):
    program(pyenv / "bin" / "python3.13", "sys.exit('no such package')")
    with pytest.raises(try_wheel.Failed, match="installation"):
        try_wheel.install("3.13", WHEEL, tmp_path / "venv")


@pytest.mark.parametrize("broken", [None, "doctor", "run", "lab", "pytest"])
def test_each_step_of_a_learner_is_done_away_from_the_checkout(tmp_path, monkeypatch, broken):
    monkeypatch.setenv("PYTHONPATH", "the checkout")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    note = "import os\nopen('done', 'a').write(' '.join(sys.argv[1:3]) + os.linesep)\n"
    note += f"assert 'PYTHONPATH' not in os.environ\nsys.exit({broken!r} in sys.argv)"
    for name in ("cpugrpo", "python"):
        program(tmp_path / "bin" / name, note)
    if broken is None:
        try_wheel.check(tmp_path / "bin", scratch)
        done = (scratch / "done").read_text().splitlines()
        assert done == ["doctor", "run --steps", "lab mine", "-m pytest"]
    else:
        with pytest.raises(try_wheel.Failed, match=broken if broken != "pytest" else "chapter"):
            try_wheel.check(tmp_path / "bin", scratch)


@pytest.mark.parametrize(
    ("outcome", "options", "code"),
    [
        (None, [], 0),
        (try_wheel.Skipped("not installed here"), [], 0),
        (try_wheel.Skipped("not installed here"), ["--all"], 1),
        (try_wheel.Failed("cpugrpo run"), [], 1),
    ],
)
def test_a_failure_counts_and_with_all_a_skipped_python_too(
    tmp_path, monkeypatch, capsys, outcome, options, code
):
    wheel = tmp_path / WHEEL.name
    wheel.write_bytes(b"")

    def made(version, wheel, folder):
        if outcome and version == "3.12":
            raise outcome
        return folder

    monkeypatch.setattr(try_wheel, "install", made)
    monkeypatch.setattr(try_wheel, "check", lambda programs, scratch: None)
    monkeypatch.setattr(sys, "argv", ["try_wheel.py", str(wheel), *options])
    assert try_wheel.main() == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Python 3.11: good" and lines[3] == "Python 3.13: good"
    assert str(outcome or "good") in lines[2]


def test_a_wheel_is_installed_by_what_it_declares(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(install, "pip", lambda python, *arguments, **_: calls.append(arguments))
    monkeypatch.setattr(install, "create", lambda folder: Path("python"))
    monkeypatch.setattr(install, "install_torch", lambda python, torch: None)
    monkeypatch.setattr(install, "check_cpu_build", lambda python: None)
    arguments = ["install.py", "--venv", str(tmp_path), "--wheel", str(WHEEL)]
    monkeypatch.setattr(install.sys, "argv", arguments)
    install.main()
    (call,) = [call for call in calls if call[-1].endswith("[notebooks]")]
    assert call[-1] == f"{WHEEL.resolve()}[notebooks]"
    assert "--no-deps" not in call and call[call.index("--constraint") + 1] == str(install.LOCK)
    assert ("check",) in calls and not (tmp_path / "installed.txt").exists()
