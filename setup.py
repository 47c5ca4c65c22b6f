"""Puts the chapters and records into the wheel, and the compiled ``decode.c`` if asked for.

If CPUGRPO_SHIP_KERNEL is not 1, the wheel is pure Python. The libraries are no Python modules:
``engine/c_kernel.py`` loads them where there is no C compiler. Everything else about the package
is in pyproject.toml.
"""

import os
import platform
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ENGINE = "cpugrpo_edu/engine"
LEARNER_FILES = runpy.run_path("cpugrpo_edu/course/learner_files.py")["learner_files"]


class BuildWithChapters(build_py):
    """Copies the learners' files to ``cpugrpo_edu/_lab``, where ``cpugrpo lab`` looks for them.

    An editable installation needs no copy: it has the checkout.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        lab = Path(self.build_lib, "cpugrpo_edu", "_lab")
        shutil.rmtree(lab, ignore_errors=True)  # of an earlier build
        for name in LEARNER_FILES(Path()):
            (lab / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(name, lab / name)

    def get_source_files(self) -> list[str]:  # what a source distribution holds
        return [*super().get_source_files(), *LEARNER_FILES(Path())]


def kernels() -> list[Extension]:
    if os.environ.get("CPUGRPO_SHIP_KERNEL") != "1" or sys.platform != "linux":
        return []
    builds, machine = runpy.run_path(f"{ENGINE}/kernel_builds.py"), platform.machine()
    return [
        Extension(
            f"cpugrpo_edu.engine._decode_{name}",
            [f"{ENGINE}/decode.c"],
            extra_compile_args=[*builds["options"](machine, needs), "-Wno-psabi"],
            extra_link_args=["-fopenmp"],
            libraries=["m"],
        )
        for name, needs in builds["SHIPPED"].get(machine, {}).items()
    ]


setup(ext_modules=kernels(), cmdclass={"build_py": BuildWithChapters})
