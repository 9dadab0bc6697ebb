"""Every optional engine patch fits the release of llama-cpp-python that the project pins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATCHES = sorted((ROOT / "patches").glob("*.patch"))
each_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)


def touched_files(patch: Path) -> set[str]:
    """Paths inside llama.cpp that a patch changes."""
    return set(re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(encoding="utf-8"), flags=re.MULTILINE))


def apply(patch: Path, tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["patch", "-p1", "--forward", "--fuzz=0", *options, "-i", str(patch)]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def sdist() -> Path:
    """Source archive of the pinned release, fetched once into the cache directory."""
    script = ROOT / "examples" / "setup" / "build_llama.py"
    result = subprocess.run(
        [sys.executable, str(script), "--sdist-only"], capture_output=True, text=True, check=False, timeout=280
    )
    if result.returncode == 0:
        return Path(result.stdout.strip().splitlines()[-1])
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"the source of llama-cpp-python could not be fetched:\n{result.stderr}")
    pytest.skip(f"needs the source of llama-cpp-python, which could not be fetched: {result.stderr[-300:]}")


@pytest.fixture(scope="session")
def vendored(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those files of the vendored llama.cpp that patches touch."""
    wanted = set().union(*(touched_files(patch) for patch in PATCHES))
    root = tmp_path_factory.mktemp("llama.cpp")
    with tarfile.open(sdist) as tar:
        for member in tar:
            name = member.name.partition("/vendor/llama.cpp/")[2]
            if name in wanted and (stream := tar.extractfile(member)) is not None:
                target = root / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(stream.read())
                wanted.remove(name)
    assert not wanted, f"the vendored source has no {sorted(wanted)}"
    return root


@pytest.fixture
def tree(vendored: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(vendored, tmp_path / "llama.cpp"))


def test_there_are_patches_to_check() -> None:
    assert PATCHES


@each_patch
def test_a_patch_applies_alone_without_fuzz_or_offset(patch: Path, vendored: Path) -> None:
    result = apply(patch, vendored, "--dry-run")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "offset" not in result.stdout
    assert "fuzz" not in result.stdout


def test_all_patches_apply_one_after_the_other(tree: Path) -> None:
    for patch in PATCHES:
        result = apply(patch, tree)
        assert result.returncode == 0, f"{patch.name}: {result.stdout}{result.stderr}"


def test_a_patch_that_does_not_fit_is_noticed(tree: Path) -> None:
    patch = PATCHES[0]
    assert apply(patch, tree).returncode == 0
    assert apply(patch, tree).returncode != 0


@each_patch
def test_a_patch_names_the_pinned_release_and_is_described_in_the_readme(patch: Path) -> None:
    pinned = re.search(r"llama-cpp-python\[server\]==([\d.]+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert pinned is not None
    preamble = patch.read_text(encoding="utf-8").partition("diff --git")[0]
    assert f"llama-cpp-python {pinned.group(1)}" in preamble
    assert patch.name in (ROOT / "patches" / "README.md").read_text(encoding="utf-8")


@each_patch
def test_a_patch_stays_small(patch: Path) -> None:
    changed = re.findall(r"^[+-](?![+-]{2})", patch.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(changed) <= 40
