"""Experts in slots over host memory, as a device needs them: stock's tokens, the processor in the device's place."""

from __future__ import annotations

from typing import Any

import pytest

from expertier.errors import ExpertierError
from expertier_vllm.options import VllmOptions
from support.tiny_hf import HfSpec, write_hf
from support.vllm_arms import Arm, Outcome, run_arms

SPEC = HfSpec()
EXPERT = 3 * 2 * SPEC.hidden * SPEC.intermediate
BUFFERS = 10 << 20  # what two I/O threads read through
HOST = BUFFERS + 12 * EXPERT
ONE_TOKEN = SPEC.layers * SPEC.top_k * EXPERT

engine = pytest.mark.engine
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Stock and slots of several sizes."""
    pytest.importorskip("vllm")
    model = str(write_hf(tmp_path_factory.mktemp("models") / "tiny", SPEC))
    compiled, half = {"enforce_eager": False}, {"budget": "50%", "host_budget": "64MiB"}
    return run_arms(
        [
            Arm(name="stock", model=model),
            Arm(name="25%, disk below", model=model, expertier={"budget": "25%", "host_budget": HOST}),
            Arm(name="50%", model=model, expertier=half),
            Arm(name="100%", model=model, expertier=half | {"budget": "100%"}),
            Arm(name="one token", model=model, expertier={"budget": ONE_TOKEN, "host_budget": BUFFERS}),
            Arm(name="stock, compiled", model=model, engine=compiled),
            Arm(name="50%, compiled", model=model, expertier=half, engine=compiled),
            Arm(name="too small", model=model, expertier={"budget": ONE_TOKEN - 1, "host_budget": BUFFERS}),
        ]
    )


@engine
@slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "arm",
    [
        "50%",
        "100%",  # no layer stops for its router
        "25%, disk below",
        "one token",
        "50%, compiled",
    ],
)
def test_greedy_tokens_are_those_of_stock(outcomes: dict[str, Outcome], arm: str) -> None:
    stock, ours = outcomes["stock, compiled" if "compiled" in arm else "stock"], outcomes[arm]
    assert not stock.error and not ours.error
    assert ours.tokens == stock.tokens
    assert ours.stats is not None
    tier = ours.stats["tier"]
    assert ours.stats["peak_resident_bytes"] <= ours.stats["budget_bytes"] == tier["device_bytes"]
    assert tier["link_bytes"] > 0
    assert "in slots over" in ours.stats["mode"] and "lossless" in ours.stats["mode"]


@engine
@slow
def test_the_host_tier_spares_the_disk(outcomes: dict[str, Outcome]) -> None:
    for name, most in (("50%", 1 << 30), ("25%, disk below", HOST)):
        stats = outcomes[name].stats
        assert stats is not None and stats["tier"]["host_loads"] > 0
        assert stats["tier"]["host_bytes"] <= most
    roomy = outcomes["50%"].stats
    assert roomy is not None and roomy["tier"]["disk_loads"] <= SPEC.layers * SPEC.experts


@engine
@slow
def test_a_budget_below_one_tokens_experts_in_every_layer_is_refused_at_start(outcomes: dict[str, Outcome]) -> None:
    assert "slots for each layer" in outcomes["too small"].error


@pytest.mark.parametrize(
    ("left", "workers", "wanted"),
    [(64 << 30, 1, "all"), (64 << 30, 2, "all"), (12 << 30, 1, 6 << 30), (12 << 30, 3, 2 << 30)],
)
def test_a_devices_host_tier_has_room_for_all_experts_or_half_of_what_is_left(
    monkeypatch: pytest.MonkeyPatch, left: int, workers: int, wanted: str | int
) -> None:
    pytest.importorskip("torch")
    from expertier.planning.memory import MemoryLimit
    from expertier_vllm import slots

    monkeypatch.setattr(slots, "memory_left", lambda: MemoryLimit(source="a test", limit=left, left=left))
    found = slots.usual_host_bytes(8 << 30, workers)
    assert found == wanted if wanted != "all" else 8 << 30 < found < 9 << 30


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"host_budget": "1GiB"}, "A budget of 'auto' is not possible"),
        ({"budget": "50%", "host_budget": "auto"}, "A budget of 'auto' is not possible"),
        ({"budget": "50%", "host_budget": "much"}, "not an amount of memory"),
        ({"budget": "50%", "host_budget": "1GiB", "virtual_bias": 0.1}, "virtual_bias is not possible"),
        ({"budget": "50%", "host_budget": "1GiB", "governor": "on"}, "governor is not possible"),
        ({"budget": "50%", "host_budget": "1GiB", "trace": "routes.trace"}, "trace is not possible"),
    ],
)
def test_what_does_not_go_together_with_slots_is_refused_by_name(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ExpertierError, match=words):
        VllmOptions.from_additional_config({"expertier": given})
