from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertier.budget import format_bytes, parse_budget
from expertier.errors import BudgetError, ExpertierError
from expertier.paths import cache_dir

TOTAL = 10 * 2**30


@pytest.mark.parametrize(
    ("written", "amount"),
    [
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("500MB", 500 * 10**6),
        ("1.5 gib", 3 * 2**29),
        ("0.1TB", 10**11),
        ("2TiB", 2**41),
        ("64KiB", 65536),
        ("3kb", 3000),
        (" 12345 ", 12345),
        ("12345B", 12345),
        (12345, 12345),
        ("25%", TOTAL // 4),
        ("100 %", TOTAL),
        ("0.1%", TOTAL // 1000),
        ("auto", None),
        ("AUTO", None),
    ],
)
def test_amounts_are_read_the_way_people_write_them(written: str | int, amount: int | None) -> None:
    assert parse_budget(written, TOTAL) == amount


@pytest.mark.parametrize(
    "written",
    [
        "",
        " ",
        "much",
        "GiB",
        "8G",
        "8 GiB free",
        "1e9",
        "0x10",
        "1,5GiB",
        "1.GiB",
        ".5GiB",
        "٣GiB",
        "8GiBs",
        "nan",
        "inf",
        "9" * 5000,
        "1_000",
        "5%%",
        "% 5",
        True,
        None,
        8.5,
    ],
)
def test_nonsense_is_refused_with_an_example_of_sense(written: object) -> None:
    with pytest.raises(BudgetError, match=r"Write e\.g\. 8GiB"):
        parse_budget(written, TOTAL)  # type: ignore[arg-type]


@pytest.mark.parametrize("written", [0, -1, "0", "0GiB", "0%", "0.1B", "-5GiB", "-1", "- 25%"])
def test_nothing_and_less_than_nothing_are_refused(written: str | int) -> None:
    with pytest.raises(BudgetError, match=r"negative|not above zero"):
        parse_budget(written, TOTAL)


@pytest.mark.parametrize("written", ["101%", "100.01%"])
def test_more_than_everything_is_refused(written: str) -> None:
    with pytest.raises(BudgetError, match="more than all experts"):
        parse_budget(written, TOTAL)


@given(st.text(max_size=30))
def test_any_text_is_an_amount_or_a_refusal(written: str) -> None:
    try:
        amount = parse_budget(written, TOTAL)
    except BudgetError:
        return
    assert amount is None or amount > 0


@given(st.integers(1, 2**60))
def test_bytes_in_any_form_are_exact(amount: int) -> None:
    assert (
        parse_budget(amount, TOTAL) == parse_budget(str(amount), TOTAL) == parse_budget(f"{amount}B", TOTAL) == amount
    )


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536 * 2**20, "1.50 GiB"),
        (2**20 - 1, "1.00 MiB"),
        (-(2**30), "-1.00 GiB"),
        (5 * 2**40, "5.00 TiB"),
    ],
)
def test_amounts_are_shown_for_people(amount: int, shown: str) -> None:
    assert format_bytes(amount) == shown


@given(st.integers(1, 2**49))
def test_a_shown_amount_is_never_a_thousand_of_a_smaller_unit(amount: int) -> None:
    number, unit = format_bytes(amount).split()
    assert float(number) < 1024
    assert unit in {"B", "KiB", "MiB", "GiB", "TiB"}


def test_a_named_cache_directory_is_made_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTIER_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir() == tmp_path / "a" / "b"
    assert cache_dir().is_dir()


def test_without_a_name_the_cache_follows_xdg_then_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPERTIER_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "expertier"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / "home" / ".cache" / "expertier"


def test_a_cache_that_cannot_be_made_names_the_variable_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EXPERTIER_CACHE", str(tmp_path / "file" / "sub"))
    with pytest.raises(ExpertierError, match="Set EXPERTIER_CACHE"):
        cache_dir()


def test_a_cache_that_cannot_be_written_to_names_the_variable_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTIER_CACHE", str(tmp_path))
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ExpertierError, match=r"cannot be written to.*EXPERTIER_CACHE"):
        cache_dir()
