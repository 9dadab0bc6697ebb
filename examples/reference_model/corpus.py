"""Text found on an ordinary Linux machine, in several domains.

Routing is only worth caching if it depends on the text, so the model needs text of several kinds, and nothing may be
downloaded. Only the Python standard library is certain to be there. Everything else (C headers, Perl, JavaScript,
manual pages in four languages, Rust documentation, licences, package documentation) is used where it exists; where
little of it does, the standard library is cut into finer domains.

Files are split into training and held-out ones by a hash of their contents, so that a file is on the same side in
every domain and a copy of it as well.
"""

from __future__ import annotations

import ast
import dataclasses
import gzip
import hashlib
import html
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from expertier.errors import ExpertierError

# One file in this many is held out.
_HELD_OUT_SHARE = 6
# No single file dominates a domain, and very short ones teach nothing but their licence.
_LONGEST_TEXT, _SHORTEST_TEXT = 60_000, 600
# With fewer kinds of text beside Python, Python is cut into finer domains.
_ENOUGH_OTHERS = 6
# A domain with fewer files cannot be split into two sides.
_FEWEST_FILES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
    """One kind of text: where it lies and how to read it.

    Attributes
    ----------
    name : str
        Short name, e.g. ``man_de``.
    roots : tuple of Path
        Folders that are searched, in this order; those that do not exist are skipped.
    suffixes : tuple of str
        Endings of file names that count; an empty one matches every file.
    clean : callable
        Makes plain text of a file's contents.
    accept : callable
        Decides by the path below the root whether a file belongs to the domain.
    skip : tuple of str
        Names of folders that are not entered.
    """

    name: str
    roots: tuple[Path, ...]
    suffixes: tuple[str, ...]
    clean: Callable[[str], str] = lambda text: text
    accept: Callable[[str], bool] = lambda relative: True
    skip: tuple[str, ...] = ("__pycache__", ".git")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text by domain.

    Attributes
    ----------
    train : mapping of str to list of str
        Texts to train on, one per file.
    held_out : mapping of str to list of str
        Texts of other files, never used in training, neither of the model nor of the tokenizer.
    """

    train: Mapping[str, list[str]]
    held_out: Mapping[str, list[str]]

    @property
    def domains(self) -> list[str]:
        """Names of the domains, sorted."""
        return sorted(self.train)

    def fingerprint(self) -> str:
        """Return a short hash of the training text: the same on the same machine as long as its files stay."""
        digest = hashlib.sha256()
        for domain in self.domains:
            digest.update(domain.encode())
            for text in self.train[domain]:
                digest.update(hashlib.sha256(text.encode()).digest())
        return digest.hexdigest()[:12]

    def prompts(self, *, per_domain: int = 32, shortest: int = 3000, longest: int = 6000) -> list[dict[str, str]]:
        """Return held-out stretches of text for benchmarks, as ``{"domain": ..., "text": ...}``.

        Parameters
        ----------
        per_domain : int
            Most texts of one domain. A file gives a second one only after every file gave its first.
        shortest, longest : int
            Characters of a text; nothing shorter is used.
        """
        found = []
        for domain in sorted(self.held_out):
            stretches: list[tuple[int, int, str]] = []
            for number, text in enumerate(self.held_out[domain]):
                stretches += [(turn, number, part) for turn, part in enumerate(_stretches(text, shortest, longest))]
            found += [{"domain": domain, "text": part} for _, _, part in sorted(stretches)[:per_domain]]
        return found

    def write_prompts(self, path: Path) -> None:
        """Write :meth:`prompts` as JSON."""
        path.write_text(json.dumps(self.prompts(), ensure_ascii=False, indent=1), encoding="utf-8")


def _stretches(text: str, shortest: int, longest: int) -> Iterator[str]:
    """Cut a text into pieces at line ends, the middle first: files begin with licences."""
    pieces = []
    start = 0
    while len(text) - start >= shortest:
        stop = min(start + longest, len(text))
        if stop < len(text):
            newline = text.rfind("\n", start + shortest, stop)
            stop = newline + 1 if newline > 0 else stop
        pieces.append(text[start:stop])
        start = stop
    middle = len(pieces) // 2
    yield from pieces[middle:] + pieces[:middle]


def collect(
    max_bytes_per_domain: int = 2_000_000, *, max_held_out_bytes: int = 250_000, domains: list[Domain] | None = None
) -> Corpus:
    """Collect text, the same on every call as long as the machine's files stay.

    Parameters
    ----------
    max_bytes_per_domain : int
        Most characters of training text of one domain.
    max_held_out_bytes : int
        Most characters of held-out text of one domain.
    domains : list of Domain, optional
        What to look for; by default everything this machine may have.

    Raises
    ------
    ExpertierError
        Nothing was found, not even the standard library's source.
    """
    train: dict[str, list[str]] = {}
    held_out: dict[str, list[str]] = {}
    seen: set[bytes] = set()

    def gather(some: list[Domain]) -> None:
        for domain in some:
            learn, keep = _gather(domain, max_bytes_per_domain, max_held_out_bytes, seen)
            if learn and keep and len(learn) + len(keep) >= _FEWEST_FILES:
                train[domain.name], held_out[domain.name] = learn, keep

    if domains is not None:
        gather(domains)
    else:
        gather(_other_domains())
        gather(_python_domains(fine=len(train) < _ENOUGH_OTHERS))
    if not train:
        raise ExpertierError(
            "No text to train on was found, not even the source of Python's standard library.",
            "Use a Python that brings its library as .py files.",
        )
    return Corpus(train=train, held_out=held_out)


def _gather(domain: Domain, most: int, most_held_out: int, seen: set[bytes]) -> tuple[list[str], list[str]]:
    learn: list[str] = []
    keep: list[str] = []
    learned = kept = 0
    for path in _files(domain):
        if learned >= most and kept >= most_held_out:
            break
        try:
            raw = path.read_bytes()
            raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
            text = raw.decode("utf-8").replace("\r\n", "\n")
        except (OSError, EOFError, UnicodeDecodeError):
            continue  # unreadable, truncated, or not UTF-8: simply not text for us
        # By contents, so that a copy elsewhere is on the same side; per kind, because docstrings share files with code.
        digest = hashlib.sha256(raw).digest()
        mark = hashlib.sha256(domain.clean.__qualname__.encode() + digest).digest()
        text = domain.clean(text[: 4 * _LONGEST_TEXT])[:_LONGEST_TEXT]
        if mark in seen or len(text) < _SHORTEST_TEXT or "\0" in text or _is_minified(text):
            continue
        if digest[0] % _HELD_OUT_SHARE == 0:
            if kept < most_held_out:
                keep.append(text)
                kept += len(text)
                seen.add(mark)
        elif learned < most:
            learn.append(text)
            learned += len(text)
            seen.add(mark)
    return learn, keep


def _files(domain: Domain) -> list[Path]:
    """Return the domain's files in an order that is random but the same everywhere."""
    found: dict[str, Path] = {}
    for root in domain.roots:
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in domain.skip)
            for name in sorted(names):
                path = Path(folder, name)
                relative = path.relative_to(root).as_posix()
                if name.endswith(domain.suffixes) and domain.accept(relative) and not path.is_symlink():
                    found.setdefault(relative, path)
    return [found[name] for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())]


def _is_minified(text: str) -> bool:
    return len(text) > 200 * (text.count("\n") + 1)


def _plain_man(text: str) -> str:
    """Return a manual page without its comments and font changes."""
    lines = [
        line for line in text.splitlines() if not line.startswith(('.\\"', "'\\\"", ".so ", ".de", ".ds", ".if", ".ie"))
    ]
    text = re.sub(r"\\f(\[[^\]]*\]|\(..|.)", "", "\n".join(lines))
    return text.replace("\\-", "-").replace("\\(aq", "'").replace("\\&", "").replace("\\e", "\\")


def _plain_html(text: str) -> str:
    """Return what a page shows, without its navigation."""
    start = max(text.find("<main"), text.find("<section"), 0)
    text = re.sub(r"(?s)<(script|style|nav|head)\b.*?</\1>", "", text[start:])
    text = re.sub(r"(?i)</(p|div|h\d|li|pre|tr|section|ul)>|<br ?/?>", "\n", text)
    text = html.unescape(re.sub(r"(?s)<[^>]*>", "", text))
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()


def _docstrings(text: str) -> str:
    """Return the docstrings of a Python file."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if text)


def _below(*folders: str) -> Callable[[str], bool]:
    prefixes = tuple(f"{folder}/" for folder in folders)
    return lambda relative: relative.startswith(prefixes)


def _other_domains() -> list[Domain]:
    share = Path("/usr/share")
    packages = tuple(sorted({Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}))
    rust = [Path("/usr/share/doc/rust/html"), Path("/usr/share/doc/rust-doc/html")]
    rust += sorted(Path.home().glob(".rustup/toolchains/*/share/doc/rust/html"))
    manuals = [
        Domain(
            name=f"man_{language}",
            roots=tuple(share / "man" / code / f"man{section}" for code in codes for section in range(1, 9)),
            suffixes=(".gz",),
            clean=_plain_man,
        )
        for language, codes in {
            "en": ["."],
            "de": ["de"],
            "fr": ["fr"],
            "es": ["es"],
            "it": ["it"],
            "ru": ["ru"],
        }.items()
    ]
    return [
        Domain(name="c", roots=(Path("/usr/include"),), suffixes=(".h",)),
        Domain(
            name="perl",
            roots=(share / "perl", share / "perl5", *sorted(Path("/usr/lib").glob("*/perl*"))),
            suffixes=(".pm", ".pl"),
        ),
        Domain(
            name="javascript",
            roots=(Path("/usr/lib/node_modules"), share / "javascript", share / "nodejs", *packages),
            suffixes=(".js", ".mjs"),
        ),
        *manuals,
        # One crate's documentation is enough; the rest of the pages are search indexes and copies of the source.
        Domain(name="rustdoc", roots=tuple(path / "std" for path in rust[:3]), suffixes=(".html",), clean=_plain_html),
        Domain(name="licences", roots=(share / "doc",), suffixes=("/copyright", "copyright")),
        Domain(
            name="package_docs",
            roots=(share / "doc", *packages),
            suffixes=(".rst", ".md", ".txt", "README.gz", "NEWS.gz"),
            accept=lambda relative: "LICEN" not in relative.upper(),
        ),
    ]


def _python_domains(*, fine: bool) -> list[Domain]:
    def domain(name: str, accept: Callable[[str], bool], clean: Callable[[str], str] = lambda text: text) -> Domain:
        # What is installed beside the library differs from one environment to the next.
        skip = ("site-packages", "dist-packages", "__pycache__")
        root = Path(sysconfig.get_path("stdlib"))
        return Domain(name=name, roots=(root,), suffixes=(".py",), clean=clean, accept=accept, skip=skip)

    def is_test(relative: str) -> bool:
        return relative.startswith("test/") or "/test/" in relative or "/tests/" in relative

    def outside(*folders: str) -> Callable[[str], bool]:
        inside = _below("encodings", "pydoc_data", *folders)
        return lambda relative: not inside(relative) and not is_test(relative)

    docstrings = domain("python_docstrings", outside("lib2to3"), _docstrings)
    tests = domain("python_tests", is_test)
    if not fine:
        return [domain("python", outside()), docstrings, tests]
    groups = {
        "python_concurrency": ["asyncio", "concurrent", "multiprocessing"],
        "python_network": ["email", "http", "urllib", "html", "xml", "xmlrpc", "json", "wsgiref"],
        "python_desktop": ["tkinter", "idlelib", "turtledemo", "curses"],
        "python_tools": ["lib2to3", "distutils", "ensurepip", "venv", "importlib", "unittest", "logging"],
    }
    packages = [domain(name, _below(*folders)) for name, folders in groups.items()]
    taken = [folder for folders in groups.values() for folder in folders]
    return [
        domain("python", outside(*taken)),
        *packages,
        domain("python_tables", _below("encodings")),
        docstrings,
        tests,
    ]
