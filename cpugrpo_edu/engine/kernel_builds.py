"""How ``decode.c`` is compiled for processors other than this one.

It imports nothing, since ``setup.py`` reads it where nothing is installed yet.
"""

COMMON = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
"""No flag that lets the compiler assume that NaN cannot occur."""

X86 = ("-mprefer-vector-width=512",)

SHIPPED: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma", "f16c"),
        "avx2": ("avx2", "fma", "f16c"),
    },
    "aarch64": {"neon": ("asimd",)},
}
"""For each machine the libraries that a wheel brings, the fastest first, and what each needs: names
of instruction sets as /proc/cpuinfo has them."""


def options(machine: str, needs: tuple[str, ...]) -> list[str]:
    """The compiler's options for a processor with these instruction sets."""
    if machine != "x86_64":  # every aarch64 has what its library needs
        return [*COMMON]
    return [*COMMON, *X86, *(f"-m{name.replace('_', '')}" for name in needs)]
