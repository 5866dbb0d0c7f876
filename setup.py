"""Build: CMake compiles kernels/cpu into hpctrain._native; kernels/ ships as the package hpctrain.kernels.

`HPCTRAIN_NATIVE=0` leaves the compiled module out: the `reference` backend then does all computing. `HPCTRAIN_BUILD`
names the folder of CMake's build, which else is a temporary one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NATIVE = os.environ.get("HPCTRAIN_NATIVE", "1") != "0"
WITHOUT = "or install without compiled kernels (slow): HPCTRAIN_NATIVE=0 pip install ..."


class CMakeBuild(build_ext):
    """Runs CMake on CMakeLists.txt, the module going where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and compile; a missing tool ends the build with one line that names it."""
        require_toolchain()
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(os.environ.get("HPCTRAIN_BUILD") or self.build_temp).resolve()
        # The build requirements' own cmake and ninja: the first ones on PATH may be too old.
        import ninja

        cmake = [sys.executable, "-m", "cmake"]
        configure = [
            *("--fresh", "-S", ROOT, "-B", build, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR, 'ninja')}",
            *("-DCMAKE_BUILD_TYPE=Release", "-DHPCTRAIN_TESTS=OFF"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-DHPCTRAIN_MODULE_DIR={out}"),
        ]
        for arguments in (configure, ["--build", build]):
            if subprocess.run([*cmake, *arguments]).returncode:
                sys.exit(f"hpctrain: the build of the compiled kernels failed, see above; repair it, {WITHOUT}")

    def copy_extensions_to_source(self) -> None:
        """Of an editable install: a new file, as writing into the old one would crash programs that run it."""
        for old in ROOT.glob("hpctrain/_native.*.so"):
            old.unlink()
        super().copy_extensions_to_source()


def require_toolchain() -> None:
    """End the build where no C++ compiler or no Python header is found: CMake's own message fills a page."""
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        sys.exit(
            f"hpctrain: no C++ compiler found (looked for {', '.join(compilers)}). Install one, for example "
            f"`apt-get install g++`, or set CXX, {WITHOUT}"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        sys.exit(f"hpctrain: {header} is missing. Install it, for example `apt-get install python3-dev`, {WITHOUT}")


sources = [f"hpctrain.kernels.{name}" for name in find_namespace_packages("kernels", exclude=["__pycache__"])]

setup(
    packages=[*find_packages(include=["hpctrain", "hpctrain.*"]), "hpctrain.kernels", *sources],
    package_dir={"hpctrain.kernels": "kernels"},
    package_data={"": ["py.typed", "machines/*.json", "*.cpp", "*.h", "*.cu", "*.cuh"]},
    ext_modules=[Extension("hpctrain._native", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild},
)
