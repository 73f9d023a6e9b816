"""Makes sure of a virtual environment with a torch to build against: python .ci/venv.py FOLDER [TORCH_VERSION]

A torch that this Python already has is used, not fetched again: then the environment sees all packages of this Python.
Naming a version installs that version.
"""

import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

TESTED_TORCH = "2.13.0"
HAS_TORCH = """
from importlib.metadata import version
raise SystemExit(tuple(map(int, version("torch").split(".")[:2])) < (2, 11))
"""


def has_torch(python):
    """Whether a Python has a torch that is new enough."""
    return subprocess.run([python, "-c", HAS_TORCH], stderr=subprocess.DEVNULL, check=False).returncode == 0


def create(folder, share):
    """Creates the environment; `share` lets it see the packages of this Python."""
    flags = ["--system-site-packages"] if share else []
    if share and find_spec("pip"):
        flags.append("--without-pip")  # with pip would come a setuptools that may be older than the shared one
    subprocess.run([sys.executable, "-m", "venv", *flags, folder], check=True)
    if share and sys.prefix != sys.base_prefix:  # this Python is an environment itself, which venv looks through
        packages = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": folder}))
        packages.joinpath("shared.pth").write_text(
            "".join(f"import site; site.addsitedir({sysconfig.get_path(kind)!r})\n" for kind in ("purelib", "platlib"))
        )


def main(folder, wanted=None):
    if sys.version_info < (3, 10):  # noqa: UP036 - this file is what finds out
        sys.exit(
            f"fastrnn needs Python 3.10 or newer, and {sys.executable} is {sys.version.split()[0]}. "
            "Name another one, for example: make setup PYTHON=python3.12"
        )
    python = Path(folder, "bin", "python")
    if not python.exists():
        create(folder, share=has_torch(sys.executable))
    if wanted or not has_torch(python):
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
        subprocess.run([*pip, f"torch=={wanted or TESTED_TORCH}"], check=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(f"This failed: {' '.join(map(str, error.cmd))}")
