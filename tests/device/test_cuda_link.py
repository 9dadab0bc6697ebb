"""The link to a CUDA device over streams that run as late, and in as awkward an order, as CUDA allows; not on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from device.test_device_tier import SHAPES, SIZE, check_budgets, check_contents, compute, device_tier
from expertier.device import CudaLink
from expertier.errors import BudgetError
from support.fake_engine import until
from support.slow_cuda import SlowTorch
from support.slow_device import SlowDevice

pytest.importorskip("torch")


def link(torch: SlowTorch, device: str = "cuda") -> CudaLink:
    """Make a link to what stands in for torch; whatever else is imported meanwhile must find the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        return CudaLink(device)


@pytest.mark.parametrize("seed", range(6))
def test_streams_and_events_order_copies_and_kernels_as_the_tier_needs(tmp_path: Path, seed: int) -> None:
    slow, wrong, dice = SlowDevice(seed), [], np.random.default_rng(seed)  # type: ignore[var-annotated]
    torch = SlowTorch(slow)
    host = 1 + 3 * seed
    with device_tier(link(torch), tmp_path, device=7, host=host, policy=("lfu", "lru")[seed % 2]) as (tier, _):
        assert tier.stats().pinned and torch.registered
        for _ in range(80):
            tier.manager.begin_step()
            layer = int(dice.integers(len(SHAPES)))
            experts = dice.choice(8, 2, replace=False).tolist()
            tier.manager.observe(layer, [experts])
            compute(tier, slow, layer, experts, wrong)
            tier.manager.prefetch(int(dice.integers(len(SHAPES))), dice.choice(8, 2, replace=False).tolist(), limit=2)
            for _ in range(int(dice.integers(6))):
                slow.step()
            tier.manager.end_step()
            check_budgets(tier, host)
        until(lambda: tier.manager.idle)
        slow.drain()
        check_contents(tier)
        assert tier.stats().demotions > 0
    assert not wrong
    assert not torch.registered  # what was locked was given back


def test_a_device_without_room_is_told_with_what_is_free(tmp_path: Path) -> None:
    with (
        pytest.raises(BudgetError, match=r"cuda:0 has no room for .* \(.* are free\)"),
        device_tier(link(SlowTorch(SlowDevice(0), room=SIZE)), tmp_path, device=7, host=2),
    ):
        pass


def test_host_memory_that_cannot_be_locked_is_told_with_the_limit_to_raise(tmp_path: Path) -> None:
    with (
        pytest.raises(BudgetError, match=r"cudaHostRegister failed with code 2.*ulimit -l"),
        device_tier(link(SlowTorch(SlowDevice(0), refused=2)), tmp_path, device=7, host=2),
    ):
        pass


def test_what_the_link_uses_of_torch_has_these_names() -> None:
    import torch

    for names, owner in (
        ("is_available device_count current_device get_device_name mem_get_info synchronize", torch.cuda),
        ("Stream Event stream current_stream device cudart OutOfMemoryError", torch.cuda),
        ("wait_event synchronize", torch.cuda.Stream),
        ("record query synchronize", torch.cuda.Event),
    ):
        assert [name for name in names.split() if not hasattr(owner, name)] == []
