"""Options under `expertier` in --additional-config."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from expertier.errors import BudgetError, ExpertierError, UnsupportedOptionError
from expertier.scheduling import Fairness
from expertier_vllm.options import VllmOptions

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("additional", [None, {}, {"other": {"budget": "1%"}}, object()])
def test_without_the_key_expertier_is_off(additional: object) -> None:
    assert VllmOptions.from_additional_config(additional) is None


def test_an_empty_object_turns_it_on_with_defaults() -> None:
    options = VllmOptions.from_additional_config({"expertier": {}})
    assert options is not None
    assert options.offload.budget == "auto"
    assert not options.budget_endpoint


def test_options_of_all_engines_and_of_vllm_stand_side_by_side() -> None:
    given = {"budget": "8GiB", "policy": "lru", "io_threads": 3, "budget_endpoint": True}
    options = VllmOptions.from_additional_config({"expertier": given})
    assert options is not None
    assert (options.offload.budget, options.offload.policy, options.offload.io_threads) == ("8GiB", "lru", 3)
    assert options.budget_endpoint


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("budgt", "budget"),
        ("Budget", "budget"),
        ("sidecar", "sidecar_dir"),
        ("threads", "io_threads"),
        ("endpoint", "budget_endpoint"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(written: str, meant: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=rf"no option '{written}'\. Did you mean '{meant}'\?"):
        VllmOptions.from_additional_config({"expertier": {written: 1}})


def test_a_key_like_nothing_known_is_refused_with_the_list() -> None:
    with pytest.raises(UnsupportedOptionError) as caught:
        VllmOptions.from_additional_config({"expertier": {"zzz": 1}})
    assert "Did you mean" not in str(caught.value)
    assert "budget, budget_endpoint, config, fairness_held, fairness_overtaken, fairness_seconds" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (True, UnsupportedOptionError),
        ("50%", UnsupportedOptionError),
        (["budget"], UnsupportedOptionError),
        ({"policy": "random"}, UnsupportedOptionError),
        ({"budget_endpoint": "yes"}, UnsupportedOptionError),
        ({"scheduler": "best"}, UnsupportedOptionError),
        ({"scheduler": ["greedy"]}, UnsupportedOptionError),
        ({"fairness_steps": -1}, UnsupportedOptionError),
        ({"repack": "off"}, UnsupportedOptionError),
        ({"budget": "8 bananas"}, BudgetError),
        ({"budget": "101%"}, BudgetError),
        ({"budget": 0}, BudgetError),
    ],
)
def test_values_that_cannot_be_are_refused(given: object, error: type[ExpertierError]) -> None:
    with pytest.raises(error):
        VllmOptions.from_additional_config({"expertier": given})


def test_how_far_regrouping_may_set_a_request_back_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTIER_FAIRNESS_SECONDS", "2.5")
    options = VllmOptions.from_additional_config({"expertier": {"scheduler": "greedy", "fairness_overtaken": 3}})
    assert options is not None
    assert options.fairness == Fairness(overtaken=3, seconds=2.5)


def test_the_environment_gives_defaults_and_does_not_turn_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTIER_BUDGET", "3GiB")
    assert VllmOptions.from_additional_config({}) is None
    options = VllmOptions.from_additional_config({"expertier": {"policy": "lru"}})
    assert options is not None
    assert options.offload.budget == "3GiB"


def test_the_plugin_can_be_registered_where_there_is_no_vllm() -> None:
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "adapters")!r}, {str(ROOT / "plugin")!r}]
sys.modules["vllm"] = None
import expertier_vllm
expertier_vllm.register()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=60)


def test_the_scheduler_is_vllms_own_unless_asked() -> None:
    plain = VllmOptions.from_additional_config({"expertier": {}})
    asked = VllmOptions.from_additional_config({"expertier": {"scheduler": "greedy"}})
    assert plain is not None and plain.scheduler is None
    assert asked is not None and asked.scheduler == "greedy"


def test_a_hard_mask_and_a_bias_are_lossy_and_bias_0_is_asked_for_too() -> None:
    for given, lossy in (({"virtual_hard": "on"}, True), ({"virtual_bias": 0}, True), ({}, False)):
        options = VllmOptions.from_additional_config({"expertier": given})
        assert options is not None and options.lossy == lossy


def test_a_hard_mask_is_not_possible_in_slots() -> None:
    with pytest.raises(UnsupportedOptionError, match="virtual_hard is not possible with experts in slots"):
        VllmOptions.from_additional_config(
            {"expertier": {"virtual_hard": "on", "budget": "1GiB", "host_budget": "1GiB"}}
        )
