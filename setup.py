"""Compiles ``decode.c`` into the wheel if CPUGRPO_SHIP_KERNEL is 1; else the wheel is pure Python.

Everything else about the package is in pyproject.toml. The libraries are no Python modules:
``engine/c_kernel.py`` loads them where there is no C compiler.
"""

import os
import platform
import runpy
import sys

from setuptools import Extension, setup

ENGINE = "cpugrpo_edu/engine"


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


setup(ext_modules=kernels())
