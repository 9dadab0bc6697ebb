"""Three tiers under one policy: whatever the device does when, kernels see whole experts, and both budgets hold."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from expertier.catalog.pack import PackKey, build_pack
from expertier.device import CudaLink, DeviceTier, ThreadLink, TierStats
from expertier.errors import BudgetError, ExpertLoadError, UnsupportedEngineError, UnsupportedModelError
from expertier.manager import ManagerConfig
from expertier.storage import PAGE, StorageFile
from support.fake_engine import LayerShape, ScriptedFile, uniform, until, words
from support.slow_device import SlowDevice, write_packed

PARTS = (3 * PAGE + 24, 2 * PAGE)
SIZE = sum(PARTS)
HOST_SLOT = 6 * PAGE
CHUNK = 2 * PAGE
BUFFERS = 4 * 3 * PAGE  # of two I/O threads
SHAPES = uniform(3, 8, 2, PARTS)


@contextlib.contextmanager
def device_tier(
    link: Any,
    directory: Path,
    *,
    shapes: dict[int, LayerShape] = SHAPES,
    device: int,
    host: int,
    **options: Any,
) -> Iterator[tuple[DeviceTier, ScriptedFile]]:
    """Yield a tier with so many slots on the device and on the host."""
    path = directory / "experts"
    layers = write_packed(path, shapes)
    file = ScriptedFile(path)
    per_layer = options.pop("per_layer", False)
    config = ManagerConfig(**{"io_threads": 2, "chunk_bytes": CHUNK, **options})
    try:
        tier = DeviceTier(
            layers,
            {path: file},
            link,
            device_bytes=device * SIZE,
            host_bytes=BUFFERS + host * HOST_SLOT,
            config=config,
            per_layer=per_layer,
        )
        try:
            yield tier, file
        finally:
            file.let_all()
            tier.close()
    finally:
        file.close()


def on_device(tier: DeviceTier, layer: int, expert: int, slot: int) -> bool:
    """Whether a slot holds exactly this expert now."""
    return all(
        bytes(memory[slot * size : (slot + 1) * size]) == words(layer, expert, stage, size).tobytes()
        for stage, (size, memory) in enumerate(zip(PARTS, tier.pool.memory(layer), strict=True))
    )


def compute(tier: DeviceTier, link: SlowDevice, layer: int, experts: Sequence[int], wrong: list[str]) -> None:
    """Launch a kernel that looks at its experts when it begins and again when it ends, whenever that is."""
    with tier.acquire(layer, [experts]) as working_set:
        slots = working_set.slots[list(experts)]
        assert (slots >= 0).all()

        def look() -> None:
            for expert, slot in zip(experts, slots.tolist(), strict=True):
                if not on_device(tier, layer, expert, slot):
                    wrong.append(f"layer {layer} computed on something else than expert {expert}")

        link.launch(look)
        link.launch(look)


EXPERTS = st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True)
ACTIONS = st.one_of(
    st.tuples(st.just("compute"), st.integers(0, 2), EXPERTS),
    st.tuples(st.just("prefetch"), st.integers(0, 2), EXPERTS),
    st.tuples(st.just("run"), st.integers(1, 9), st.just([])),
    st.tuples(st.just("resize"), st.integers(4, 12), st.just([])),
    st.tuples(st.just("swap"), st.integers(1, 3), st.just([])),
    st.tuples(st.just("end"), st.just(0), st.just([])),
)


@settings(max_examples=60, deadline=None)
@given(
    actions=st.lists(ACTIONS, min_size=5, max_size=40),
    seed=st.integers(0, 1 << 30),
    host=st.integers(0, 26),
    policy=st.sampled_from(["lru", "lfu", "predictive"]),
    per_layer=st.booleans(),
    threads=st.integers(1, 2),
)
def test_no_kernel_ever_sees_another_expert_whatever_the_device_does_when(
    actions: list[tuple[str, int, list[int]]], seed: int, host: int, policy: str, per_layer: bool, threads: int
) -> None:
    link = SlowDevice(seed)
    wrong: list[str] = []
    options = {"policy": policy, "per_layer": per_layer, "io_threads": threads}
    with (
        tempfile.TemporaryDirectory() as directory,
        device_tier(link, Path(directory), device=12, host=host, **options) as (tier, _),
    ):
        tier.manager.begin_step()
        for action, number, experts in actions:
            if action == "compute":
                tier.manager.observe(number, [experts])
                compute(tier, link, number, experts, wrong)
            elif action == "prefetch":
                tier.manager.prefetch(number, experts, limit=4)
            elif action == "swap":
                tier.manager.swap(number)
            elif action == "run":
                for _ in range(number):
                    link.step()
            elif action == "resize":
                with contextlib.suppress(BudgetError):  # below what the running step may need
                    tier.resize(number * SIZE)
            else:
                tier.manager.end_step()
                tier.manager.begin_step()
            check_budgets(tier, host)
        tier.manager.end_step()
        until(lambda: tier.manager.idle)
        link.drain()
        check_contents(tier)
    assert not wrong
    assert link.closed


@pytest.mark.parametrize("seed", range(8))
def test_experts_that_move_between_all_three_tiers_stay_themselves(tmp_path: Path, seed: int) -> None:
    """Few slots on both sides and long runs: slots on the host are written while copies out of them are still due."""
    link, wrong, dice = SlowDevice(seed), [], np.random.default_rng(seed)
    with device_tier(link, tmp_path, device=5, host=1 + seed % 4, policy=("lfu", "lru")[seed % 2]) as (tier, _):
        for _ in range(150):
            tier.manager.begin_step()
            layer = int(dice.integers(2))
            experts = dice.permutation(4)[:2].tolist()
            tier.manager.observe(layer, [experts])
            compute(tier, link, layer, experts, wrong)
            for other in range(2):  # what has just left the device comes back at once, in another lane
                back = [each for each in range(4) if tier.pool.host.holds(8 * other + each)]
                tier.manager.prefetch(other, back, limit=2)
            tier.manager.swap(2, worth=dice.random(tier.manager.stats().total_experts))
            tier.manager.end_step()
            for _ in range(int(dice.integers(4))):
                link.step()
        until(lambda: tier.manager.idle)
        link.drain()
        check_contents(tier)
        assert tier.stats().demotions > 10
    assert not wrong


def check_budgets(tier: DeviceTier, host: int) -> None:
    stats = tier.stats()
    assert stats.device_bytes <= 12 * SIZE
    assert stats.host_bytes <= BUFFERS + host * HOST_SLOT
    assert stats.resident_bytes <= stats.device_bytes
    assert stats.double_bytes <= stats.host_resident_bytes <= stats.host_bytes


def check_contents(tier: DeviceTier) -> None:
    """What is said to be on the device and on the host is there, byte by byte, and nothing twice in one tier."""
    host = tier.pool.host
    for layer, shape in SHAPES.items():
        slots = tier.pool.slots(layer)
        taken = slots[slots >= 0]
        assert len(set(taken.tolist())) == len(taken)
        for expert in range(shape.experts):
            assert slots[expert] < 0 or on_device(tier, layer, expert, int(slots[expert]))
            index = 8 * layer + expert
            if host.holds(index):
                slot, start = int(host.slot_of[index]), 0
                for stage, size in enumerate(PARTS):
                    found = host.bytes_at(slot, start, start + size)
                    assert found.tobytes() == words(layer, expert, stage, size).tobytes()
                    start += -(-size // PAGE) * PAGE
    given_up = {load.host for load in tier.pool._loads.values()}  # until their slots on the device are used again
    assert set(np.flatnonzero(host.claimed).tolist()) <= given_up


def run_texts(tier: DeviceTier, steps: int, seed: int = 0) -> NDArray[np.int64]:
    """Decode with skewed routes; returns how often each expert was used."""
    dice = np.random.default_rng(seed)
    chances = np.array([8.0, 7, 6, 5, 4, 3, 2, 1])
    uses = np.zeros((3, 8), np.int64)
    for _ in range(steps):
        tier.manager.begin_step()
        for layer in SHAPES:
            experts = dice.choice(8, 2, replace=False, p=chances / chances.sum())
            uses[layer, experts] += 1
            tier.manager.observe(layer, [experts])
            with tier.acquire(layer, [experts]) as working_set:
                assert all(on_device(tier, layer, int(each), int(working_set.slots[each])) for each in experts)
        tier.manager.end_step()
    return uses


def stats_after(directory: Path, steps: int, **options: Any) -> TierStats:
    with device_tier(ThreadLink(), directory, **options) as (tier, _):
        run_texts(tier, steps)
        return tier.stats()


def test_the_disk_is_read_once_when_the_host_holds_everything(tmp_path: Path) -> None:
    stats = stats_after(tmp_path, 60, device=8, host=24)
    assert stats.disk_loads <= 24 < stats.host_loads
    assert stats.demotions == 0  # every expert on the device has a copy already
    assert stats.link_bytes == (stats.disk_loads + stats.host_loads) * SIZE


def test_without_host_slots_every_load_comes_from_the_disk_through_the_buffers(tmp_path: Path) -> None:
    stats = stats_after(tmp_path, 20, device=8, host=0)
    assert stats.host_bytes == BUFFERS
    assert stats.disk_loads > 24
    assert (stats.host_loads, stats.demotions, stats.host_resident_bytes) == (0, 0, 0)


def test_device_and_host_together_hold_more_than_either(tmp_path: Path) -> None:
    """What leaves the device goes to the host, and copies of what is on the device are the first to leave that."""
    stats = stats_after(tmp_path, 150, device=10, host=10)
    larger = stats_after(tmp_path, 150, device=20, host=0)
    smaller = stats_after(tmp_path, 150, device=10, host=0)
    assert stats.demotions > 0
    # Twenty slots in two tiers read about as often as twenty on the device, far from as often as ten.
    assert stats.disk_loads - larger.disk_loads < (smaller.disk_loads - larger.disk_loads) / 4
    assert stats.demoted_bytes == stats.demotions * SIZE


def test_doubles_are_counted_on_both_sides(tmp_path: Path) -> None:
    with device_tier(ThreadLink(), tmp_path, device=8, host=24) as (tier, _):
        run_texts(tier, 10)
        stats = tier.stats()
        resident = stats.resident_bytes // SIZE
        assert stats.double_bytes == resident * HOST_SLOT  # all of them, because the host still has room
        assert tier.manager.stats().resident_bytes == stats.resident_bytes
        assert not stats.pinned


def test_a_demand_load_overtakes_a_prefetch(tmp_path: Path) -> None:
    with device_tier(ThreadLink(), tmp_path, device=12, host=0, io_threads=1) as (tier, file):
        tier.manager.begin_step()
        file.hold()
        assert tier.manager.prefetch(2, [0, 1, 2, 3], limit=4) == 4
        file.await_held(1)
        lease = tier.manager.acquire(0, [[5, 6]], wait=False)
        begun = len(file.reads)
        file.let_all()
        lease.wait()
        first = tier.pool._layers[0].parts[0].offset
        last = tier.pool._layers[1].parts[0].offset
        demand = [index for index, (offset, _) in enumerate(file.reads) if first <= offset < last]
        assert demand == list(range(begun, begun + len(demand)))
        lease.release()


def test_a_read_that_fails_is_the_steps_error_and_heals(tmp_path: Path) -> None:
    with device_tier(ThreadLink(), tmp_path, device=8, host=4) as (tier, file):
        tier.manager.begin_step()
        part = tier.pool._layers[1].parts[1]
        file.fail(part.offset + 3 * part.stride, 8, times=1)
        with pytest.raises(ExpertLoadError, match="Expert 3 of layer 1"):
            tier.acquire(1, [[2, 3]])
        with tier.acquire(1, [[2, 3]]) as working_set:
            assert on_device(tier, 1, 3, int(working_set.slots[3]))
        assert tier.stats().disk_loads == 2


@pytest.mark.parametrize("host", [0, 24])
def test_a_damaged_sidecar_is_noticed_though_no_expert_is_ever_whole_on_the_host(tmp_path: Path, host: int) -> None:
    layers = write_packed(tmp_path / "experts", SHAPES)
    parts = [part for layer in layers for part in layer.parts]
    content = [
        words(part.layer, expert, stage, part.expert_bytes).tobytes()
        for layer in layers
        for stage, part in enumerate(layer.parts)
        for expert in range(part.experts)
    ]
    pack = build_pack(
        tmp_path / "pack.expertier",
        key=PackKey(model="m", content="c", layout="l", library="v"),
        parts=parts,
        produce=lambda: (memoryview(each) for each in content),
        announce=lambda path, size: contextlib.nullcontext(lambda done: None),
    )
    with pack.path.open("r+b") as raw:
        part = pack.parts["1.0"]
        raw.seek(part.offset + 4 * part.stride + 2 * PAGE + 17)
        raw.write(b"\x55")
    file = StorageFile(pack.path)
    tier = DeviceTier(
        pack.layers(layers),
        {pack.path: file},
        ThreadLink(),
        device_bytes=8 * SIZE,
        host_bytes=BUFFERS + host * HOST_SLOT,
        config=ManagerConfig(chunk_bytes=CHUNK),
        check_for=pack.check_in_pieces,
    )
    try:
        with tier.acquire(1, [[3, 5]]) as working_set:
            assert on_device(tier, 1, 5, int(working_set.slots[5]))
        with pytest.raises(ExpertLoadError, match="wrong checksum"):
            tier.acquire(1, [[4]])
        assert not tier.pool.host.holds(8 + 4)
    finally:
        tier.close()
        file.close()


@pytest.mark.parametrize(
    ("device", "host", "options", "error", "words_of_it"),
    [
        (1, 4, {}, BudgetError, "cannot hold the experts one token needs"),
        (4, 4, {"per_layer": True}, BudgetError, "leaves 1 slots for each layer, a token needs 2"),
        (8, -1, {}, BudgetError, "no room for the buffers"),
        (8, 1 << 40, {}, BudgetError, "exceeds what .* has left"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_by_name(
    tmp_path: Path, device: int, host: int, options: dict[str, Any], error: type[Exception], words_of_it: str
) -> None:
    link = ThreadLink()
    with (
        pytest.raises(error, match=words_of_it),
        device_tier(link, tmp_path, device=device, host=host, **options),
    ):
        pass
    assert not any(thread.is_alive() for thread in link._threads)


def test_experts_of_several_sizes_need_slots_of_their_own(tmp_path: Path) -> None:
    shapes = {0: LayerShape(experts=4, top_k=1), 1: LayerShape(experts=4, top_k=1, parts=(PAGE, 2 * PAGE))}
    with (
        pytest.raises(UnsupportedModelError, match="different sizes"),
        device_tier(ThreadLink(), tmp_path, shapes=shapes, device=8, host=0),
    ):
        pass
    with device_tier(ThreadLink(), tmp_path, shapes=shapes, device=2, host=0, per_layer=True) as (tier, _):
        for layer in shapes:
            for expert in range(4):
                tier.acquire(layer, [[expert]]).release()


def test_more_slots_than_were_allocated_cannot_be_had_while_running(tmp_path: Path) -> None:
    with device_tier(ThreadLink(), tmp_path, device=8, host=0) as (tier, _):
        tier.resize(4 * SIZE)
        with pytest.raises(BudgetError, match="start again with the larger budget"):
            tier.resize(9 * SIZE)
        assert tier.manager.budget == 4 * SIZE


def test_a_machine_without_cuda_is_told_so() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UnsupportedEngineError, match="torch sees no device"):
        CudaLink()
