"""vLLM's own offloaders as arms of a comparison: within the device memory of ours, and only where a device is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertier.catalog import read_catalog
from expertier.catalog.types import Catalog
from expertier.cli.engines import get_adapter
from expertier.comparison.arms import Ability, Limit, plan_arms
from expertier.errors import UnsupportedOptionError
from expertier_vllm import offloaders
from expertier_vllm.offloaders import no_device, offloading_variants, prefetch_groups
from support.tiny_hf import HfSpec, write_hf

ABLE = Ability(confinement="", readahead="", readahead_kb=None, memory_left=64 << 30)
NO_LIMIT = Limit(text="none", limit_bytes=None)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return read_catalog(write_hf(tmp_path / "model", HfSpec(layers=8)))


@given(layers=st.integers(2, 96), share=st.floats(0.1, 0.95))
def test_layers_and_buffers_that_stay_on_the_device_are_within_the_share(layers: int, share: float) -> None:
    found = prefetch_groups(layers, share)
    if found is None:
        assert share * layers < max(2, layers / 16 + 2)  # only where hardly a layer may stay
        return
    size, absent = found["offload_group_size"], found["offload_num_in_group"]
    moved = sum(layer % size >= size - absent for layer in range(layers))
    assert 0 < moved <= layers
    assert layers - moved + found["offload_prefetch_step"] <= share * layers


def test_with_room_for_half_of_the_layers_and_a_buffer_every_other_one_stays() -> None:
    assert prefetch_groups(48, 25 / 48) == {
        "offload_group_size": 2,
        "offload_num_in_group": 1,
        "offload_prefetch_step": 1,
        "offload_params": ["experts"],
    }


def test_uva_leaves_the_budgets_share_on_the_device(catalog: Catalog) -> None:
    [uva, _] = offloading_variants(catalog, ["25%"])
    assert uva.key == "stock-uva-25%"
    assert uva.settings["cpu_offload_gb"] * 2**30 == pytest.approx(0.75 * catalog.total_expert_bytes, rel=0.01)


def test_vllm_takes_the_settings(catalog: Catalog) -> None:
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs

    for variant in offloading_variants(catalog, ["50%", "25%"]):
        arguments = EngineArgs(model="unused", **variant.settings)
        assert {**vars(arguments), **variant.settings} == vars(arguments)


def test_without_a_device_the_arms_are_left_out_and_asked_for_refused(catalog: Catalog) -> None:
    if not no_device():
        pytest.skip("this machine has a CUDA device")
    adapter = get_adapter("vllm")
    arms = plan_arms(adapter, catalog, [NO_LIMIT], {"budget": "50%"}, ability=ABLE)
    assert [arm.key for arm in arms if not arm.ours] == ["stock"]
    with pytest.raises(UnsupportedOptionError, match="stock-uva-50% cannot be run here: this is vLLM's CPU build"):
        plan_arms(adapter, catalog, [NO_LIMIT], {"budget": "50%"}, ability=ABLE, only=["stock-uva-50%"])


def test_with_a_device_every_budget_has_both_offloaders_beside_it(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloaders, "no_device", lambda: "")
    arms = plan_arms(get_adapter("vllm"), catalog, [NO_LIMIT], {"budget": "50%"}, ability=ABLE)
    stock = {arm.key: arm.settings for arm in arms if not arm.ours}
    assert list(stock) == ["stock", "stock-uva-50%", "stock-prefetch-50%", "stock-uva-25%", "stock-prefetch-25%"]
    assert stock["stock"] == {}
    assert all(arm.runs == () and arm.status != "not run" for arm in arms)
    limited = plan_arms(
        get_adapter("vllm"), catalog, [Limit(text="8GiB", limit_bytes=8 << 30)], {"budget": "50%"}, ability=ABLE
    )
    assert [arm.key for arm in limited if not arm.ours] == ["stock"]
