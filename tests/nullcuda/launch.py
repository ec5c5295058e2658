"""Run Python with a GPU that computes nothing: python launch.py script.py, or launch.py -m module.

It needs a CUDA build of PyTorch, gcc and nm. The library is built when it is first needed, into the
environment of the Python that runs this.
"""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("nullcuda.c")
LIBRARY = Path(sys.prefix) / "nullcuda.so"
CALLS = re.compile(r"(__cuda|cuda|cublas|cu)(?!File)[A-Z]\w+")  # runtime, cuBLAS, driver


def is_preloaded() -> bool:
    """Return whether this process has the library."""
    return str(LIBRARY) in os.environ.get("LD_PRELOAD", "").split(":")


def run(*command: object) -> str:
    """Run a tool; return what it prints, and end with its message if it fails."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit(f"{command[0]} is needed and not installed.")
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stderr}")
    return done.stdout


def symbols(path: Path, *options: str) -> set[str]:
    """Return the names of a file's symbols, without versions."""
    return {line.split("@")[0] for line in run("nm", "--just-symbols", *options, path).split("\n")}


def asked_by(torch: Path) -> set[str]:
    """Return the names of the calls that PyTorch's libraries link to."""
    libraries = [*torch.glob("lib/lib*cuda*.so"), *torch.glob("lib/lib*nvrtc*.so")]
    libraries.append(torch / "lib" / "libtorch_python.so")
    asked = set().union(*(symbols(lib, "--dynamic", "--undefined-only") for lib in libraries))
    return {name for name in asked if CALLS.fullmatch(name)}


def headers(packages: Path) -> list[Path]:
    """Return the folders of CUDA's headers among installed packages."""
    wanted = ("cuda_runtime_api.h", "crt/host_defines.h")
    found = [sorted(packages.glob(f"nvidia/**/{name}")) for name in wanted]
    found[1] = found[1] or sorted(packages.glob("triton/**/crt/host_defines.h"))
    if not all(found):
        sys.exit("A CUDA build of PyTorch is needed, with the packages that it requires.")
    return [found[0][0].parent, found[1][0].parents[1]]


def build(library: Path) -> None:
    """Compile the source; add a function that does nothing for each call that it leaves out."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("PyTorch is not installed.")
    torch = Path(spec.origin).parent
    include = [f"-I{folder}" for folder in headers(torch.parent)]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        written, rest, made = (Path(folder) / name for name in ("a.o", "rest.c", "nullcuda.so"))
        gcc = ("gcc", "-O1", "-g", "-fPIC", "-Wall")
        run(*gcc, *include, "-c", SOURCE, "-o", written)
        missing = sorted(asked_by(torch) - symbols(written, "--defined-only"))
        rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
        soname = "-Wl,-soname,libcuda.so.1"  # by which PyTorch looks for the driver
        run(*gcc, "-shared", soname, "-o", made, written, rest, "-ldl", "-lpthread")
        made.replace(library)


def main(arguments: list[str]) -> None:
    """Start again with the library; then run a module or a script."""
    if not is_preloaded():
        if not LIBRARY.exists() or LIBRARY.stat().st_mtime < SOURCE.stat().st_mtime:
            build(LIBRARY)
        environ = dict(os.environ)
        if "NULLCUDA_CACHING" not in environ:  # each tensor gets memory of its own, which is zero
            environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        environ["LD_PRELOAD"] = ":".join(filter(None, [str(LIBRARY), environ.get("LD_PRELOAD")]))
        os.execve(sys.executable, [sys.executable, __file__, *arguments], environ)
    import torch

    torch.backends.cudnn.enabled = False  # it would look for kernels that it can run
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
