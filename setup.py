"""Builds csrc/ into var_fast._C; everything else about the package is in pyproject.toml."""

import shutil
import site
import sys
import sysconfig
from glob import glob
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import find_packages, setup

try:
    from pybind11.setup_helpers import Pybind11Extension, build_ext
except ImportError:
    sys.exit("var_fast: pybind11 is not installed in this environment; run: pip install pybind11 and try again")


def environment_paths():
    """Where the environment that var_fast is installed into keeps its own packages.

    pip's build isolation takes them off sys.path, but runs the environment's own interpreter.
    """
    return [*sys.path, *(sysconfig.get_path(name) for name in ("purelib", "platlib"))]


def inherited_paths():
    """Where an environment may have packages from besides: the interpreter it was made with, and the user's folder."""
    bases = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    return [*(sysconfig.get_path(name, vars=bases) for name in ("purelib", "platlib")), site.getusersitepackages()]


def check_torch():
    """Stop before pip has downloaded anything if torch is missing.

    Where the environment has no pip of its own, it is a temporary one that another installer made for the build
    alone: then nothing is known about torch, and the build itself does not need it. The base interpreter's pip says
    nothing, every virtual environment has that behind it.
    """
    own = environment_paths()
    if PathFinder.find_spec("pip", own) and not PathFinder.find_spec("torch", own + inherited_paths()):
        sys.exit(
            "var_fast: torch is not installed in this environment; "
            "run: pip install torch==2.13.0 (on the CPU; else as pytorch.org says) and try again"
        )


def torch_folder():
    """Where torch's headers and libraries are, or None. Not imported: that takes seconds and needs numpy."""
    spec = PathFinder.find_spec("torch", environment_paths() + inherited_paths())
    return Path(spec.origin).parent if spec and spec.origin else None


class BuildExtension(build_ext):
    def build_extensions(self):
        folder = torch_folder()
        if folder is None or not (folder / "include" / "ATen").is_dir():
            sys.exit(
                "var_fast: the build needs torch's headers and finds no torch; "
                "run: pip install --no-build-isolation -e . in an environment that has torch"
            )
        for extension in self.extensions:
            # torch brings pybind11's headers too: all files have to see the same ones, so its own come first
            extension.include_dirs[:0] = [str(folder / "include"), str(folder / "include/torch/csrc/api/include")]
            extension.library_dirs.append(str(folder / "lib"))
            extension.libraries += ["c10", "torch_cpu", "torch_python"]
        compile_command = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        for program in (compile_command[0], self.compiler.compiler_cxx[0]):
            if shutil.which(program) is None:
                sys.exit(
                    f"var_fast: no C++ compiler found (looked for {program!r}); "
                    "run: apt-get install g++ (or set CC and CXX) and try again"
                )
        super().build_extensions()


check_torch()
setup(
    packages=find_packages(include=["var_fast", "var_fast.*"]),  # var_fast/kernels is a link to kernels/
    ext_modules=[
        Pybind11Extension(
            "var_fast._C",
            sources=[*sorted(glob("csrc/*.cpp")), *sorted(glob("csrc/cpu/*.cpp"))],
            depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h")),
            cxx_std=17,
            # no note on passing wide vectors between functions (they are inlined);
            # no contraction to fused multiply-add: products round as they do in the PyTorch references
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi", "-pthread", "-fopenmp"],
            extra_link_args=["-pthread", "-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
