from __future__ import annotations

from pathlib import Path

import pytest

from expertier.errors import ExpertierError
from reference_model.corpus import Domain, collect


def make_domain(root: Path, name: str = "notes") -> Domain:
    return Domain(name=name, roots=(root,), suffixes=(".txt",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(60):
        lines = "".join(f"line {line} of file {number}\n" for line in range(300))
        (tmp_path / f"{number}.txt").write_text(lines)
    return tmp_path


def test_no_text_is_on_both_sides_even_if_its_file_has_a_copy_in_another_domain(folder: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in folder.glob("*.txt"):
        (copies / f"copy-of-{path.name}").write_text(path.read_text())
    some = [make_domain(folder), Domain(name="copies", roots=(copies,), suffixes=(".txt",), clean=str.upper)]
    corpus = collect(domains=some)
    train = {text.lower() for texts in corpus.train.values() for text in texts}
    held_out = {text.lower() for texts in corpus.held_out.values() for text in texts}
    assert corpus.domains == ["copies", "notes"]
    assert train and held_out and not train & held_out


def test_collecting_twice_gives_the_same_text(folder: Path) -> None:
    one, two = (collect(domains=[make_domain(folder)]) for _ in range(2))
    assert one == two
    assert one.fingerprint() == two.fingerprint()


def test_the_cap_on_training_text_holds_up_to_one_file(folder: Path) -> None:
    corpus = collect(20_000, domains=[make_domain(folder)])
    longest = max(map(len, corpus.train["notes"]))
    assert 20_000 <= sum(map(len, corpus.train["notes"])) < 20_000 + longest


def test_prompts_are_held_out_and_long_enough(folder: Path) -> None:
    corpus = collect(domains=[make_domain(folder)])
    prompts = corpus.prompts(per_domain=5, shortest=3000, longest=6000)
    assert prompts
    assert len(prompts) <= 5
    for prompt in prompts:
        assert 3000 <= len(prompt["text"]) <= 6000
        assert any(prompt["text"] in text for text in corpus.held_out[prompt["domain"]])


def test_the_standard_library_alone_gives_several_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reference_model.corpus._other_domains", list)
    corpus = collect(60_000, max_held_out_bytes=60_000)
    assert len(corpus.domains) >= 6
    assert all(corpus.train[domain] and corpus.held_out[domain] for domain in corpus.domains)


def test_a_machine_without_any_text_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(ExpertierError, match="No text to train on"):
        collect(domains=[make_domain(tmp_path)])
