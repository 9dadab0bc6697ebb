"""One table of options: who wins, and what is refused in which words."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from expertier.config import ENV_PREFIX, OffloadOptions
from expertier.config_file import write_config
from expertier.errors import ConfigFileError, UnsupportedOptionError


@pytest.fixture(autouse=True)
def no_options_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in fields(OffloadOptions):
        monkeypatch.delenv(ENV_PREFIX + option.name.upper(), raising=False)


def test_without_anything_given_the_defaults_hold() -> None:
    assert OffloadOptions.from_mapping() == OffloadOptions.from_mapping({}) == OffloadOptions()
    assert OffloadOptions().budget == "auto"


def test_what_is_given_wins_over_the_environment_and_that_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTIER_BUDGET", "3GiB")
    monkeypatch.setenv("EXPERTIER_POLICY", "lru")
    options = OffloadOptions.from_mapping({"policy": "edge"})
    assert (options.budget, options.policy, options.io_threads) == ("3GiB", "edge", 2)


def test_none_counts_as_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTIER_IO_THREADS", "7")
    assert OffloadOptions.from_mapping({"io_threads": None, "half_life": None}).io_threads == 7


def test_every_option_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "budget": "25%",
        "policy": "lfru",
        "half_life": "12.5",
        "lookahead": "off",
        "predictor": "a folder",
        "profile": "run.json",
        "repack": "on",
        "io_mode": "buffered",
        "io_threads": "4",
        "margin": "1GiB",
        "governor": "on",
        "sidecar_dir": "somewhere",
        "trace": "a file",
        "trace_tokens": "on",
        "trace_hidden": "16",
        "quality_budget": "1%",
        "virtual_bias": "0",
        "virtual_protect": "1",
        "virtual_prefill": "on",
        "virtual_hard": "on",
    }
    assert set(texts) == {option.name for option in fields(OffloadOptions)} - {"config"}
    for name, text in texts.items():
        monkeypatch.setenv(ENV_PREFIX + name.upper(), text)
    options = OffloadOptions.from_mapping()
    converted = {"half_life": 12.5, "io_threads": 4, "trace_hidden": 16, "virtual_bias": 0.0, "virtual_protect": 1}
    assert {name: getattr(options, name) for name in texts} == texts | converted


def test_numbers_and_switches_are_converted() -> None:
    options = OffloadOptions.from_mapping(
        {"io_threads": "3", "half_life": 8, "lookahead": True, "repack": False, "budget": 10**9}
    )
    assert (options.io_threads, options.half_life) == (3, 8.0)
    assert (options.lookahead, options.repack) == ("on", "off")
    assert options.budget == 10**9


def test_a_path_may_be_one_and_false_turns_off_what_can_be(tmp_path: Path) -> None:
    options = OffloadOptions.from_mapping({"trace": tmp_path / "a", "predictor": False, "profile": False})
    assert options.trace == str(tmp_path / "a")
    assert (options.predictor, options.profile) == ("off", "off")


@pytest.mark.parametrize("given", [{"trace_tokens": "on"}, {"trace_hidden": 4}])
def test_what_says_how_a_trace_is_recorded_needs_a_trace(given: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedOptionError, match="do nothing without trace"):
        OffloadOptions.from_mapping(given).check_trace()
    traced = OffloadOptions.from_mapping({**given, "trace": "a file"})
    traced.check_trace()
    assert traced.untraced() == OffloadOptions()


def test_every_option_has_a_help_text() -> None:
    assert all(option.metadata["help"].endswith(".") for option in fields(OffloadOptions))


def test_options_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        OffloadOptions().budget = "1GiB"  # type: ignore[misc]


def test_an_unknown_option_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(
        UnsupportedOptionError, match=r"no option 'buget'.*Options are: budget, config, governor, half_life"
    ):
        OffloadOptions.from_mapping({"buget": "1GiB"})
    with pytest.raises(UnsupportedOptionError, match="no option 'bits'"):
        OffloadOptions.from_mapping({"bits": None})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "fifo"}, "policy='fifo' is not possible. Choose from: auto, lfu, lru, lfru, edge, predictive."),
        ({"policy": True}, "policy='on' is not possible."),
        ({"lookahead": "yes"}, "Choose from: auto, on, off."),
        ({"io_mode": ["direct"]}, "is not possible"),
        ({"io_threads": "two"}, "io_threads='two' is not a number."),
        ({"io_threads": 0}, "io_threads=0 is not above zero."),
        ({"io_threads": -1}, "io_threads=-1 is not above zero."),
        ({"io_threads": 1.5}, "io_threads=1.5 is not a whole number."),
        ({"io_threads": True}, "io_threads=True is not a whole number."),
        ({"io_threads": float("inf")}, "io_threads=inf is not a number."),
        ({"half_life": 0}, "half_life=0 is not above zero."),
        ({"half_life": "-4"}, "half_life='-4' is not above zero."),
        ({"half_life": float("nan")}, "half_life=nan is not above zero."),
        ({"half_life": "inf"}, "half_life='inf' is not above zero."),
        ({"half_life": [16]}, "half_life=[16] is not a number."),
        ({"virtual_bias": -0.1}, "virtual_bias=-0.1 is not above zero, nor zero."),
        ({"virtual_bias": "inf"}, "virtual_bias='inf' is not above zero, nor zero."),
        ({"virtual_protect": 0}, "virtual_protect=0 is not above zero."),
        ({"io_threads": 100_000}, "io_threads=100000 is too much. Give at most 256."),
        ({"predictor": True}, "predictor=True is neither a name nor a path."),
        ({"profile": 5}, "profile=5 is neither a name nor a path."),
        ({"trace": ""}, "trace='' is neither a name nor a path."),
        ({"sidecar_dir": False}, "sidecar_dir=False is neither a name nor a path."),
        ({"config": 5}, "config=5 is neither a name nor a path."),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedOptionError) as caught:
        OffloadOptions.from_mapping(given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("EXPERTIER_POLICY", "mru", "EXPERTIER_POLICY='mru' is not possible."),
        ("EXPERTIER_IO_THREADS", "", "EXPERTIER_IO_THREADS='' is not a number."),
        ("EXPERTIER_HALF_LIFE", "0", "EXPERTIER_HALF_LIFE='0' is not above zero."),
    ],
)
def test_what_is_wrong_in_the_environment_is_named_by_its_variable(
    variable: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(UnsupportedOptionError, match=variable) as caught:
        OffloadOptions.from_mapping()
    assert message in str(caught.value)


def test_a_bad_environment_does_not_matter_where_something_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTIER_POLICY", "mru")
    assert OffloadOptions.from_mapping({"policy": "lru"}).policy == "lru"
    with pytest.raises(UnsupportedOptionError, match=r"^policy='x'"):
        OffloadOptions.from_mapping({"policy": "x"})


def test_a_file_of_options_comes_after_the_environment_and_before_the_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "options.json"
    write_config(path, {"budget": "1GiB", "policy": "edge", "io_threads": 3, "half_life": None}, {"model": "m"})
    monkeypatch.setenv("EXPERTIER_CONFIG", str(path))
    monkeypatch.setenv("EXPERTIER_POLICY", "lru")
    options = OffloadOptions.from_mapping({"budget": "2GiB"})
    assert (options.budget, options.policy, options.io_threads, options.half_life) == ("2GiB", "lru", 3, None)
    monkeypatch.delenv("EXPERTIER_CONFIG")
    assert OffloadOptions.from_mapping({"config": str(path)}).budget == "1GiB"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "holds no options"),
        ('{"budget": "1GiB"}', "holds no options"),
        ('{"options": {}, "budget": "1GiB"}', "unknown key 'budget'"),
        ('{"options": {}, "schema": "later"}', "'later'"),
        ('{"options": {"bugdet": 1}}', "'bugdet', which is no option"),
        ('{"options": {"config": "x"}}', "'config', which is no option"),
    ],
)
def test_a_bad_file_of_options_is_refused_by_name(tmp_path: Path, text: str | None, named: str) -> None:
    path = tmp_path / "options.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigFileError, match=named) as caught:
        OffloadOptions.from_mapping({"config": str(path)})
    assert caught.value.remedy


def test_a_bad_value_in_a_file_is_named_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"options": {"io_threads": "many"}}))
    with pytest.raises(UnsupportedOptionError, match=r"io_threads in .*options\.json='many' is not a number"):
        OffloadOptions.from_mapping({"config": str(path)})
