"""Where the packages live in the tree, and the C++ extension; everything else is in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

ROOTS = {"aloud": "runtime", "aloud.kernels": "kernels", "aloud.benchmarks": "benchmarks"}

packages = list(ROOTS)
for name, folder in ROOTS.items():
    packages += [f"{name}.{package}" for package in find_packages(folder)]

sampler = Pybind11Extension(
    "aloud._sampler",
    sorted(str(path) for path in Path("csrc").glob("*.cpp")),
    depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
    cxx_std=17,
    # The draw is defined in IEEE float32: contraction or fast-math would make tokens depend on the compiler.
    extra_compile_args=["-O3", "-ffp-contract=off"],
)

setup(
    package_dir=ROOTS,
    packages=packages,
    package_data={"aloud": ["py.typed", "_sampler.pyi"], "aloud.server": ["page.html"]},
    ext_modules=[sampler],
    cmdclass={"build_ext": build_ext},
)
