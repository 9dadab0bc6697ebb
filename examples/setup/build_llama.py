"""Build llama-cpp-python once per machine and keep the wheel.

PyPI carries llama-cpp-python as source only, and compiling llama.cpp takes minutes. This script builds the release that
``pyproject.toml`` pins, shows how far the compiler is, and keeps the wheel in the cache directory, keyed by everything
that decides whether it may be reused. It prints the path of the wheel on its last line. It runs before anything is
installed, hence on the standard library alone.

    python examples/setup/build_llama.py              # the stock engine
    python examples/setup/build_llama.py --patches patches   # the same with every optional patch applied
    python examples/setup/build_llama.py --sdist-only # only fetch the source archive
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CMAKE_ARGS = (
    "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF "
    "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF"
)
NINJA_STEP = re.compile(r"^\s*\[(\d+)/(\d+)\]")
MAKE_STEP = re.compile(r"^\s*\[\s*(\d+)%\]")


class SetupError(Exception):
    """The engine cannot be built here; the message says why and what to do."""


def cache_dir() -> Path:
    """Directory for things that are expensive to make (the same rule as ``expertier.paths.cache_dir``)."""
    if own := os.environ.get("EXPERTIER_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "expertier"


def pinned_version() -> str:
    """Release of llama-cpp-python that ``pyproject.toml`` pins."""
    match = re.search(r"llama-cpp-python\[server\]==([\w.]+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if match is None:
        raise SetupError("pyproject.toml pins no llama-cpp-python release.")
    return match.group(1)


def cpu_flags() -> str:
    """Instruction sets of this CPU: GGML_NATIVE code runs only where all of them exist."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    flags = next((line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))), "")
    return " ".join(sorted(flags.split()))


def wheel_key(version: str, patches: list[Path]) -> str:
    """Name of the cache folder: equal only when the wheel may be reused."""
    parts = [version, cmake_args(), platform.machine(), cpu_flags(), " ".join(platform.libc_ver())]
    digest = hashlib.sha256("\0".join(parts).encode())
    for patch in patches:
        digest.update(patch.read_bytes())
    return f"{version}-{'patched-' if patches else ''}{digest.hexdigest()[:12]}"


def cmake_args() -> str:
    """Return the CMake options of the build; ``CMAKE_ARGS`` of the environment comes last and so wins."""
    return f"{CMAKE_ARGS} {os.environ.get('CMAKE_ARGS', '')}".strip()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, so that two ``make`` do not build the same wheel at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class Progress:
    """One line that follows the compiler: redrawn on a terminal, printed now and then elsewhere."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._start = time.monotonic()
        self._last = -100.0
        self._phase = "preparing"

    def feed(self, line: str) -> None:
        """Take one line of build output."""
        if step := NINJA_STEP.match(line):
            done, total = int(step.group(1)), int(step.group(2))
            self._show(f"compiling {done}/{total}", done / total)
        elif step := MAKE_STEP.match(line):
            self._show(f"compiling {step.group(1)} %", int(step.group(1)) / 100)
        else:
            self._show(self._phase, 0.0)

    def _show(self, phase: str, fraction: float) -> None:
        self._phase = phase
        elapsed = time.monotonic() - self._start
        if elapsed - self._last < (0.2 if self._tty else 30.0):
            return
        self._last = elapsed
        text = f"llama.cpp: {phase}, {elapsed:.0f} s"
        if self._tty:
            filled = round(fraction * 30)
            print(f"\r\x1b[2K[{'#' * filled}{'.' * (30 - filled)}] {text}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def finish(self, what: str) -> None:
        """Replace the line by a last one."""
        print(f"{chr(13) + chr(27) + '[2K' if self._tty else ''}{what}", file=sys.stderr, flush=True)


def run_logged(command: list[str], *, log: Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    """Run `command` with its output in `log` and a progress line on stderr.

    Raises
    ------
    SetupError
        When the command fails; the end of its output is part of the message.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    with (
        log.open("w", encoding="utf-8") as out,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=env,
            cwd=cwd,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            out.write(line)
            progress.feed(line)
    if process.returncode:
        progress.finish("llama.cpp: failed")
        tail = "\n".join(line[:300] for line in log.read_text(encoding="utf-8").splitlines()[-40:])
        raise SetupError(f"{tail}\n\n`{' '.join(command)}` failed (exit {process.returncode}); all output is in {log}")


def require_compiler() -> None:
    """Refuse early, with the remedy, when no C++ compiler is at hand."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if not any(name and shutil.which(name) for name in names):
        raise SetupError(
            "No C++ compiler was found. Install one (for example the packages gcc and g++, or clang) or set CC and CXX."
        )


def fetch_sdist(version: str) -> Path:
    """Download the source archive into the cache and return its path."""
    folder = cache_dir() / "sdist"
    archive = folder / f"llama_cpp_python-{version}.tar.gz"
    with locked(cache_dir() / "locks" / "sdist.lock"):
        if archive.is_file():
            return archive
        print(f"fetching the source of llama-cpp-python {version} (once, about 75 MB)", file=sys.stderr, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            run_logged(
                [
                    *(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"),
                    *("--disable-pip-version-check", "--dest", temporary, f"llama-cpp-python=={version}"),
                ],
                log=cache_dir() / "logs" / "sdist.log",
            )
            found = next(Path(temporary).glob("*.tar.gz"), None)
            if found is None:
                raise SetupError(f"pip downloaded no source archive of llama-cpp-python {version}.")
            found.replace(archive)
    return archive


def unpack(archive: Path, into: Path) -> Path:
    """Unpack a source archive and return its top folder."""
    with tarfile.open(archive) as tar:
        tar.extractall(into, filter="data") if hasattr(tarfile, "data_filter") else tar.extractall(into)
    return next(path for path in into.iterdir() if path.is_dir())


def apply_patches(patches: list[Path], engine_root: Path) -> None:
    """Apply `patches` in order to an unpacked llama.cpp, or raise on the first that does not fit."""
    for patch in patches:
        print(f"applying {patch.name}", file=sys.stderr, flush=True)
        command = ["patch", "-p1", "--forward", "--fuzz=0", "-i", str(patch.resolve())]
        result = subprocess.run(command, cwd=engine_root, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SetupError(f"{patch.name} does not apply to this release:\n{result.stdout}{result.stderr}")


def build_wheel(version: str, patches: list[Path]) -> Path:
    """Return the wheel for this machine, building it when the cache has none."""
    key = wheel_key(version, patches)
    folder = cache_dir() / ("wheels-patched" if patches else "wheels") / key
    with locked(cache_dir() / "locks" / f"{key}.lock"):
        wheel = next(folder.glob("llama_cpp_python-*.whl"), None)
        if wheel is not None:
            return wheel
        require_compiler()
        source = fetch_sdist(version)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(len(os.sched_getaffinity(0)))
        print(
            f"building llama-cpp-python {version} with {jobs} jobs: about five minutes on two cores, once per machine",
            file=sys.stderr,
            flush=True,
        )
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="build-") as temporary:
            if patches:
                source = unpack(source, Path(temporary) / "src")
                apply_patches(patches, source / "vendor" / "llama.cpp")
            made = Path(temporary) / "wheel"
            started = time.monotonic()
            run_logged(
                [
                    *(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-cache-dir"),
                    *("--disable-pip-version-check", "--wheel-dir", str(made), str(source)),
                ],
                log=cache_dir() / "logs" / f"{key}.log",
                env={**os.environ, "CMAKE_ARGS": cmake_args(), "CMAKE_BUILD_PARALLEL_LEVEL": jobs},
            )
            print(f"built in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            # A folder appears whole or not at all: an interrupted build leaves no wheel that looks finished.
            made.replace(folder)
        return next(folder.glob("llama_cpp_python-*.whl"))


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Build llama-cpp-python once per machine and keep the wheel.")
    parser.add_argument("--patches", type=Path, help="folder of *.patch files to apply to llama.cpp before building")
    parser.add_argument("--sdist-only", action="store_true", help="only fetch the source archive and print its path")
    options = parser.parse_args()
    try:
        version = pinned_version()
        if options.sdist_only:
            print(fetch_sdist(version))
            return 0
        patches = sorted(options.patches.glob("*.patch")) if options.patches else []
        if options.patches and not patches:
            raise SetupError(f"No *.patch file in {options.patches}.")
        print(build_wheel(version, patches))
    except SetupError as error:
        print(f"{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
