"""The compiled kernel: the same products as torch, or none at all and the reason."""

from __future__ import annotations

import platform
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cpugrpo_edu.engine import c_kernel, kernel_builds
from cpugrpo_edu.engine import doctor as D
from cpugrpo_edu.engine.int8_matrix import BlockInt8Linear, Int8Matrix, usable
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models import load as L
from cpugrpo_edu.record.machine import processor_flags
from cpugrpo_edu.run import prepare as P
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.sample import Sampling, draw

needs_compiler = pytest.mark.skipif(not c_kernel.available(), reason=c_kernel.library()[1])


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """As on a machine where nothing was compiled yet, and nothing came with the package."""
    monkeypatch.setattr(c_kernel, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(c_kernel, "SHIPPED", tmp_path / "shipped")
    c_kernel._load.cache_clear()
    yield tmp_path
    c_kernel._load.cache_clear()


@needs_compiler
def test_it_is_compiled_once(anew, monkeypatch):
    assert c_kernel.available()
    [library] = anew.iterdir()
    assert library.name.startswith("decode-") and library.suffix == ".so"
    c_kernel._load.cache_clear()
    real = c_kernel.subprocess.run

    def run(command, **more):
        assert "-shared" not in command, "compiled again"
        return real(command, **more)

    monkeypatch.setattr(c_kernel, "subprocess", SimpleNamespace(run=run))
    assert c_kernel.available()


def test_without_a_compiler_torch_does_it(anew, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    functions, why = c_kernel.library()
    assert functions is None and "C compiler" in why
    assert usable("compiled") == usable("auto") == "packed"
    layer = BlockInt8Linear(torch.randn(8, 16), kernel="compiled")
    assert layer.kernel == "packed" and layer(torch.randn(2, 16)).shape == (2, 8)
    assert not any(anew.iterdir())


def test_elsewhere_than_on_linux_torch_does_it(anew, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert not c_kernel.available()


def test_a_compiler_that_fails_is_quoted(anew, monkeypatch):
    bad = anew / "bad.c"
    bad.write_text("this is no C")
    monkeypatch.setattr(c_kernel, "SOURCE", bad)
    if sys.platform == "linux" and c_kernel.shutil.which("cc"):
        assert "fails" in c_kernel.library()[1]
    assert not c_kernel.available()


class Compiler:
    """Counts compilations, and waits in each until it may go on."""

    def __init__(self, monkeypatch):
        self.compiled, self.real, self.may_end = 0, subprocess.run, threading.Event()
        monkeypatch.setattr(c_kernel, "subprocess", SimpleNamespace(run=self.run))

    def run(self, command, **more):
        if "-shared" in command:
            self.compiled += 1
            assert self.may_end.wait(60)
        return self.real(command, **more)


@needs_compiler
def test_callers_wait_for_one_compilation(anew, monkeypatch):
    compiler, found = Compiler(monkeypatch), []
    c_kernel.compile_ahead()
    others = [
        threading.Thread(target=lambda: found.append(c_kernel.library()[0])) for _ in range(3)
    ]
    for other in others:
        other.start()
    time.sleep(0.1)
    assert not found
    compiler.may_end.set()
    for other in others:
        other.join(60)
    assert compiler.compiled == 1 and len(set(found)) == 1 and None not in found


@needs_compiler
@pytest.mark.parametrize(("kernel", "compiled"), [("auto", 1), ("packed", 0)])
def test_it_is_compiled_while_a_model_loads(anew, monkeypatch, kernel, compiled):
    """The compiler may end only once the weights are being read."""
    compiler = Compiler(monkeypatch)
    load = L.load_frozen

    def load_frozen(*arguments):
        for _ in range(600 * compiled):
            if compiler.compiled:
                break
            time.sleep(0.1)
        assert compiler.compiled == compiled
        compiler.may_end.set()
        return load(*arguments)

    monkeypatch.setattr(L, "load_frozen", load_frozen)
    L.load_policy("bundled", dtype="int8", kernel=kernel, lora_rank=2)
    assert compiler.compiled == compiled


@pytest.mark.parametrize(
    ("settings", "starts"),
    [({}, 1), ({"int8_rollouts": False}, 0), ({"kernel": "packed"}, 0)],
)
def test_a_run_compiles_ahead_if_it_samples_in_int8(monkeypatch, settings, starts):
    calls = []
    monkeypatch.setattr(c_kernel, "compile_ahead", lambda: calls.append("compile"))
    monkeypatch.setattr(P, "load_policy", lambda *_, **__: calls.append("load"))
    monkeypatch.setattr(P, "check_policy", lambda _: sys.exit())
    state = SimpleNamespace(stages=[])
    session = SimpleNamespace(config=RunConfig(lora_rank=4, **settings), state=state)
    session.memory_limit = None
    with pytest.raises(SystemExit):
        P.load(session)
    assert calls == ["compile"] * starts + ["load"]


def build(name: str, folder: Path) -> Path:
    """A library of a wheel, as setup.py compiles it."""
    needs = kernel_builds.SHIPPED[platform.machine()][name]
    folder.mkdir(exist_ok=True)
    library = folder / f"_decode_{name}.cpython-311-x86_64-linux-gnu.so"
    options = [*kernel_builds.options(platform.machine(), needs), "-Wno-psabi"]
    command = ["cc", *options, "-shared", "-fPIC", "-o", str(library), str(c_kernel.SOURCE), "-lm"]
    subprocess.run(command, check=True)
    return library


BUILDS = list(kernel_builds.SHIPPED.get(platform.machine(), {}))


@needs_compiler
@pytest.mark.parametrize("name", BUILDS)
def test_without_a_compiler_the_library_of_the_wheel_does_it(anew, monkeypatch, name):
    if not processor_flags().issuperset(kernel_builds.SHIPPED[platform.machine()][name]):
        pytest.skip(f"this processor does not run {name}")
    build(name, c_kernel.SHIPPED)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert usable("auto") == "compiled"
    torch.manual_seed(0)
    w, x = torch.randn(130, 72), torch.randn(5, 72)
    matrix = Int8Matrix(w)
    exact = x.double() @ Int8Matrix(w, "packed").dequantized().double().t()
    assert ((c_kernel.times(matrix, x) - exact).norm() / exact.norm()).item() < 1e-4
    found = D.check_kernel()
    assert found.ok == "ok" and found.detail.startswith(f"brought by the package: _decode_{name}.")


@needs_compiler
@pytest.mark.skipif(len(BUILDS) < 2, reason="one library for every processor of this kind")
def test_the_fastest_library_that_the_processor_can_run(anew, monkeypatch):
    monkeypatch.setattr(c_kernel, "processor_flags", lambda: {"avx2", "fma", "f16c", "avx512f"})
    monkeypatch.setenv("CC", "no-such-compiler")
    avx512 = build("avx512", c_kernel.SHIPPED)
    functions, why = c_kernel.library()
    assert functions is None and "C compiler" in why and "for this processor" in why
    found = D.check_kernel()
    assert found.ok == "warn" and why in found.detail and "gcc" in found.fix
    avx2 = c_kernel.SHIPPED / "_decode_avx2.cpython-311-x86_64-linux-gnu.so"
    avx2.touch()
    assert c_kernel.shipped_library() == avx2
    every = set().union(*kernel_builds.SHIPPED[platform.machine()].values())
    monkeypatch.setattr(c_kernel, "processor_flags", lambda: every)
    assert c_kernel.shipped_library() == avx512


@needs_compiler
def test_what_this_machine_compiles_comes_first(anew):
    build(BUILDS[-1], c_kernel.SHIPPED)
    found = D.check_kernel()
    assert found.ok == "ok" and found.detail.startswith("compiled here: decode-")


@pytest.mark.skipif(sys.platform != "linux", reason="only wheels for Linux bring libraries")
@pytest.mark.parametrize("ship", ["", "1"])
def test_a_wheel_brings_libraries_only_where_that_is_asked_for(monkeypatch, ship):
    root = Path(__file__).parent.parent
    monkeypatch.chdir(root)
    monkeypatch.setenv("CPUGRPO_SHIP_KERNEL", ship)
    made = []
    monkeypatch.setattr("setuptools.setup", lambda ext_modules, **more: made.extend(ext_modules))
    runpy.run_path("setup.py")
    names = [extension.name.rpartition(".")[2] for extension in made]
    assert names == ([f"_decode_{name}" for name in BUILDS] if ship else [])
    assert all("-march=native" not in extension.extra_compile_args for extension in made)


def test_weights_in_large_pages_lie_apart_and_go_with_their_last_use():
    shapes = [torch.Size(shape) for shape in [(3, 5), (1000, 70_000), (7,)]]
    places = [c_kernel.in_large_pages(shape) for shape in shapes]
    for i, place in enumerate(places):
        assert place.shape == shapes[i] and place.data_ptr() % 64 == 0
        place.fill_(i)
    assert all((place == i).all() for i, place in enumerate(places))
    pages = c_kernel._arena[0]
    assert pages() is not None
    del place, places
    assert pages() is None


@needs_compiler
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_draw_is_that_of_the_readable_sampler(temperature):
    """The same tokens for the same random numbers, and the log-probs of what was drawn."""
    torch.manual_seed(0)
    logits = torch.randn(400, 5000) * 3
    logits[:, 7] = -torch.inf  # a token that is never drawn
    sampling = Sampling(1, temperature)
    found = [
        function(logits, sampling, torch.Generator().manual_seed(1))
        for function in (draw, c_kernel.draw)
    ]
    same = found[0][0] == found[1][0]
    assert same.float().mean() > 0.99  # where rounding decides, the next one
    torch.testing.assert_close(found[0][1][same], found[1][1][same], rtol=0, atol=1e-5)


@needs_compiler
@needs_compiler
@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, 0.0), Sampling(1, 1.0, 0.9)])
@pytest.mark.parametrize("function", [draw, c_kernel.draw])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_of_a_diverged_model_are_refused(function, sampling, bad):
    logits = torch.randn(4, 3000)
    logits[2, 1234] = bad
    with pytest.raises(UserError, match="lower the learning rate"):
        function(logits, sampling, torch.Generator())


def test_draws_have_the_probabilities_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0]).repeat(20_000, 1)
    token, log_prob = c_kernel.draw(logits, Sampling(1), torch.Generator().manual_seed(3))
    p = logits[0].softmax(0)
    share = torch.bincount(token, minlength=5) / len(token)
    assert ((share - p).abs() <= 5 * (p * (1 - p) / len(token)).sqrt()).all()
    torch.testing.assert_close(log_prob, p.log()[token], rtol=0, atol=1e-5)
    greedy = Sampling(1, temperature=0.0)
    assert (c_kernel.draw(logits, greedy, torch.Generator())[0] == 3).all()
