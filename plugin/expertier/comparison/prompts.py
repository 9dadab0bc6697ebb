"""Real text of several kinds to measure with: random tokens would route uniformly and say nothing about caching."""

from __future__ import annotations

import json
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from expertier.errors import ExpertierError
from expertier.paths import cache_dir

_FILE = "prompts.json"
_LONGEST = 1 << 16  # characters of a text that are looked at
# Text that comes with every interpreter, of different kinds as far as that goes.
_STANDARD = (
    ("python", "argparse.py"),
    ("python_numbers", "statistics.py"),
    ("python_text", "textwrap.py"),
    ("python_net", "http/client.py"),
    ("python_docs", "difflib.py"),
    ("licence", "LICENSE.txt"),
)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text and what kind of text it is."""

    domain: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What one comparison feeds.

    Attributes
    ----------
    source : str
        Where the texts come from.
    decode : tuple of Text
        One per decode prompt, as many domains as possible.
    long : Text
        The long prompt.
    """

    source: str
    decode: tuple[Text, ...]
    long: Text


def load_texts(given: Sequence[Path], model: Path, *, decode: int, characters: int) -> Texts:
    """Choose texts.

    Parameters
    ----------
    given : sequence of Path
        Files the user named: ``.json`` with a list of strings or of objects with ``domain`` and ``text``, anything else
        as plain text. If empty: ``prompts.json`` beside the model (or in its directory), else the one of
        the reference model in the cache directory, else sources of the Python standard library.
    model : Path
        The model.
    decode : int
        How many decode prompts are wanted.
    characters : int
        Least length; shorter texts of one domain are joined.

    Raises
    ------
    ExpertierError
        A file cannot be read, is of another form, or there is no text at all.
    """
    source, texts = find_texts(given, model)
    by_domain: dict[str, list[str]] = {}
    for text in texts:
        by_domain.setdefault(text.domain, []).append(text.text)
    joined = [text for domain, parts in by_domain.items() for text in _long_enough(domain, parts, characters)]
    if not joined:
        raise ExpertierError(f"There is no text in {source}.", "Name files with some pages of text.")
    ranked = interleaved(joined)
    chosen = tuple(ranked[index % len(ranked)] for index in range(decode + 1))
    return Texts(source=source, decode=chosen[:decode], long=chosen[decode])


def find_texts(given: Sequence[Path], model: Path) -> tuple[str, list[Text]]:
    """Tell where texts come from and read them; see :func:`load_texts`."""
    if given:
        return ", ".join(path.name for path in given), [text for path in given for text in read_texts(path)]
    folders = (model, model.parent, cache_dir() / "reference")
    found = [folder / _FILE for folder in folders if (folder / _FILE).is_file()]
    if found:
        return found[0].name, read_texts(found[0])
    return "sources of the Python standard library", _standard_library()


def interleaved(texts: Sequence[Text]) -> list[Text]:
    """One text of every domain first, then the second ones: whoever stops early has seen all kinds."""
    return [text for _, text in sorted(numbered_by_domain(texts), key=lambda pair: pair[0])]


def numbered_by_domain(texts: Sequence[Text]) -> Iterator[tuple[int, Text]]:
    """Yield every text with how many of its domain came before it."""
    seen: Counter[str] = Counter()
    for text in texts:
        yield seen[text.domain], text
        seen[text.domain] += 1


def read_texts(path: Path) -> list[Text]:
    """Read a file of texts; see :func:`load_texts` for its form.

    Raises
    ------
    ExpertierError
        It cannot be read, or is of another form.
    """
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix != ".json":
            return [Text(domain=path.stem, text=content)]
        data = json.loads(content)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExpertierError(f"Cannot read prompts from {path}: {reason}.") from error
    texts = []
    for item in data if isinstance(data, list) else [data]:
        if isinstance(item, str):
            texts.append(Text(domain=path.stem, text=item))
        elif isinstance(item, dict) and isinstance(item.get("text"), str):
            texts.append(Text(domain=str(item.get("domain", path.stem)), text=item["text"]))
        else:
            raise ExpertierError(
                f"{path} is not a list of texts: it contains {item!r:.60}.",
                'Write ["text", ...] or [{"domain": "news", "text": "..."}, ...].',
            )
    return texts


def _standard_library() -> list[Text]:
    library = Path(sysconfig.get_path("stdlib"))
    return [
        Text(domain=domain, text=(library / name).read_text(encoding="utf-8", errors="replace"))
        for domain, name in _STANDARD
        if (library / name).is_file()
    ]


def _long_enough(domain: str, parts: Sequence[str], characters: int) -> list[Text]:
    texts, current = [], ""
    for part in parts:
        current += part[:_LONGEST] + "\n"
        if len(current) >= characters:
            texts.append(Text(domain=domain, text=current))
            current = ""
    if not texts and current.strip():
        texts.append(Text(domain=domain, text=current))
    return texts
