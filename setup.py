"""Builds csrc/ into var_fast._C; everything else about the package is in pyproject.toml.

The CUDA operators are built where nvcc is found and torch is a CUDA build; VAR_FAST_CUDA=1 asks for them with any torch
(the module imports without a driver too), VAR_FAST_CUDA=0 leaves them out.
"""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import find_packages, setup

try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
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


def torch_has_cuda():
    """Whether the environment's torch is a CUDA build, by its version.py: importing it would take seconds."""
    folder = torch_folder()
    if folder is None or not (folder / "version.py").exists():
        return False
    return re.search(r"^cuda\b[^=]*=\s*['\"]", (folder / "version.py").read_text(), re.M) is not None


def find_nvcc():
    """nvcc where the CUDA operators are to be built, else None."""
    wanted = os.environ.get("VAR_FAST_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"var_fast: VAR_FAST_CUDA is {wanted!r}, expected 0, 1 or nothing")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which(os.path.join(home, "bin", "nvcc")) or shutil.which("nvcc")
    if wanted == "1" and nvcc is None:
        sys.exit(f"var_fast: VAR_FAST_CUDA is 1, but nvcc is neither in {home}/bin nor on the PATH")
    return nvcc if wanted == "1" or torch_has_cuda() else None


def gpu_architectures(nvcc):
    """Options for those of our GPU generations that this nvcc knows, and PTX for GPUs to come."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    generations = [number for number in ("80", "90", "100") if f"compute_{number}" in known]
    exact = [number + "a" * (number == "90") for number in generations]  # 90a: H100's and H200's own
    options = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in exact]
    return [*options, f"-gencode=arch=compute_{generations[-1]},code=compute_{generations[-1]}"]


def cudart_folder(nvcc):
    """Where libcudart_static.a is: beside nvcc, by nvcc's own account (on the PATH it may be a mere script)."""
    done = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", done.stderr, re.M)
    root = Path(top[1]) if top else Path(nvcc).resolve().parents[1]
    for pattern in ("lib64", "lib", "targets/*/lib"):
        for folder in root.glob(pattern):
            if (folder / "libcudart_static.a").exists():
                return str(folder)
    sys.exit(f"var_fast: libcudart_static.a is not found under {root}; VAR_FAST_CUDA=0 builds for the CPU only")


class BuildExtension(build_ext):
    def add_cuda(self, nvcc):
        """Compile csrc/cuda, all files at a time, and link it in."""
        extension = self.extensions[0]
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        options = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", *gpu_architectures(nvcc)]
        sources = sorted(glob("csrc/cuda/*.cu"))
        objects = [str(folder / f"{Path(source).stem}.o") for source in sources]
        commands = [[nvcc, *options, "-c", source, "-o", to] for source, to in zip(sources, objects)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for command, done in zip(commands, pool.map(subprocess.run, commands)):
                if done.returncode != 0:
                    sys.exit(f"var_fast: nvcc failed (VAR_FAST_CUDA=0 builds for the CPU only): {' '.join(command)}")
        extension.extra_objects = [*extension.extra_objects, *objects]
        extension.define_macros = [*extension.define_macros, ("VAR_FAST_WITH_CUDA", None)]
        # static: no version of the CUDA runtime is needed, and without a driver the module still imports
        extension.extra_link_args += [f"-L{cudart_folder(nvcc)}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]

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
        nvcc = find_nvcc()
        if nvcc is not None:
            self.add_cuda(nvcc)
        # an older build may be newer than all files, but without the CUDA operators
        # and another torch needs another build
        record = Path(self.build_temp) / "built_with"
        built_with = f"{nvcc}\n{folder}\n{(folder / 'version.py').read_text()}"
        self.force = self.force or not record.exists() or record.read_text() != built_with
        super().build_extensions()
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(built_with)


check_torch()
ParallelCompile(default=0).install()  # one file a core
setup(
    packages=find_packages(include=["var_fast", "var_fast.*"]),  # var_fast/kernels is a link to kernels/
    ext_modules=[
        Pybind11Extension(
            "var_fast._C",
            sources=[*sorted(glob("csrc/*.cpp")), *sorted(glob("csrc/cpu/*.cpp"))],
            depends=sorted(glob("csrc/*.h") + glob("csrc/*/*.*")),
            cxx_std=17,
            # no note on passing wide vectors between functions (they are inlined);
            # no contraction to fused multiply-add: products round as they do in the PyTorch references
            extra_compile_args=[
                "-O3",
                "-g0",
                "-ffp-contract=off",
                "-Wall",
                "-Wextra",
                "-Wno-psabi",
                "-pthread",
                "-fopenmp",
            ],
            extra_link_args=["-pthread", "-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
