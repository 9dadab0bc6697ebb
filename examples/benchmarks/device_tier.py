"""Experts on a device, over host memory, over the disk: what moving them costs and what hides it.

    python examples/benchmarks/device_tier.py --device cuda --out device-tier-cuda     # some minutes
    python examples/benchmarks/device_tier.py --device cpu --small --out /tmp/device-tier   # seconds

Needs torch and numpy, matplotlib for the picture. First the link alone: copies of several sizes from pinned and from
pageable memory, both directions at once, and copies beside a computation. Then a mixture of experts of the given size
decodes along recorded routes (`routes.trace`, of the reference model on texts of several domains; any trace of
`expertier profile` will do), in turns:

all resident      plain tensors, no tier
tier, 100 %       the same through the tier: what its hooks and the round trip for the routes cost
on demand         slots for one layer's working set; everything is copied when it is needed
lru, lfu          slots for a share of the experts
ours              lfu, and the next layer's likely experts are copied meanwhile (counted on other requests of the trace)
perfect           the same with what the next layer will really need: the bound of such prefetching

With a host share below 1 the rest of the experts is on the disk only. Weights are made up; every arm must give the
outputs of the first, bit by bit.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from torch.nn import functional

from expertier.catalog.types import ExpertPart, LayerExperts
from expertier.device import CudaLink, DeviceLink, DeviceTier, ThreadLink
from expertier.manager import ManagerConfig
from expertier.routing.table import LayerTable, count_layers
from expertier.routing.trace import TraceHeader, read_trace
from expertier.routing.windows import read_windows
from expertier.storage import DEMAND, PAGE, StorageFile

TRACE = Path(__file__).parent / "device-tier" / "routes.trace"
MIB = 1 << 20
LIKELY = 0.5  # chance from which the next layer's experts are copied ahead


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to keep experts; shares are of all experts."""

    name: str
    device: float | None = None  # None: plain tensors; 0: one layer's working set
    host: float = 1.0
    policy: str = "lfu"
    prefetch: str = "no"

    @property
    def label(self) -> str:
        """For tables."""
        tiers = "" if not self.device or self.device >= 1 else f" {self.device:.0%}"
        return f"{self.name}{tiers}" + ("" if self.host >= 1 else f", host {self.host:.0%}")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is computed."""

    device: torch.device
    dtype: torch.dtype
    hidden: int
    inner: int
    layers: tuple[LayerExperts, ...]
    file: Path


# ---- the model


def write_experts(path: Path, header: TraceHeader, hidden: int, inner: int, dtype: torch.dtype) -> list[LayerExperts]:
    """Write made-up experts, each part of each on pages of its own: pieces of one block of noise."""
    shapes = [(2 * inner, hidden), (hidden, inner)]
    sizes = [rows * columns * dtype.itemsize for rows, columns in shapes]
    noise = torch.randn(max(sizes) // dtype.itemsize + (1 << 20), generator=torch.Generator().manual_seed(0))
    scale = {0: hidden**-0.5, 1: inner**-0.5}
    blocks = [(noise * scale[part]).to(dtype).view(torch.uint8).numpy() for part in (0, 1)]
    layers, number = [], 0
    with path.open("wb") as file:
        for layer in header.layers:
            parts = []
            for index, size in enumerate(sizes):
                padded = -(-size // PAGE) * PAGE
                part = ExpertPart(
                    name=f"{layer.layer}.{index}",
                    layer=layer.layer,
                    role="down" if index else "gate_up",
                    file=path,
                    offset=file.tell(),
                    expert_bytes=size,
                    experts=layer.experts,
                    type_name=str(dtype),
                    shape=(*shapes[index][::-1], layer.experts),
                    padded_bytes=padded,
                )
                parts.append(part)
                for expert in range(layer.experts):
                    start = 64 * ((number + expert) * 1031 % 8192)
                    file.write(blocks[index][start : start + size].tobytes().ljust(padded, b"\0"))
            number += layer.experts
            layers.append(LayerExperts(layer=layer.layer, experts=layer.experts, top_k=layer.top_k, parts=tuple(parts)))
    return layers


def read_expert(part: ExpertPart, expert: int) -> np.ndarray[Any, Any]:
    return np.fromfile(part.file, np.uint8, part.expert_bytes, offset=part.offset + expert * part.stride)


class Routes:
    """Steps of a batch: working sets, and which rows each expert computes."""

    def __init__(self, table: np.ndarray[Any, Any], device: torch.device) -> None:
        self.table = table  # (steps, layers, batch, top_k)
        self.on_device = torch.from_numpy(table).to(device)
        self.work = [[self._work(table[step, layer], device) for layer in range(table.shape[1])]
                     for step in range(len(table))]  # fmt: skip

    @staticmethod
    def _work(routes: np.ndarray[Any, Any], device: torch.device) -> list[tuple[int, Any, Any]]:
        found = []
        for expert in np.unique(routes).tolist():
            rows, places = np.nonzero(routes == expert)
            found.append((expert, torch.as_tensor(rows, device=device), torch.as_tensor(places, device=device)))
        return found

    def largest_set(self) -> int:
        return max(len(work) for step in self.work for work in step)


def compute(
    x: torch.Tensor, work: Sequence[tuple[int, Any, Any]], top_k: int, weights: Sequence[torch.Tensor], slots: Any
) -> torch.Tensor:
    """One layer: its experts on their tokens, summed in the router's order, added and normed."""
    out = torch.empty(len(x), top_k, x.shape[1], dtype=x.dtype, device=x.device)
    for expert, rows, places in work:
        slot = int(slots[expert])
        gate, up = functional.linear(x[rows], weights[0][slot]).chunk(2, -1)
        out[rows, places] = functional.linear(functional.silu(gate) * up, weights[1][slot])
    return functional.rms_norm(x + out.sum(1) / top_k, (x.shape[1],))


# ---- arms


class AllResident:
    """Plain tensors."""

    def __init__(self, setting: Setting) -> None:
        self._weights = []
        for layer in setting.layers:
            parts = []
            for part in layer.parts:
                rows = np.stack([read_expert(part, expert) for expert in range(layer.experts)])
                parts.append(torch.from_numpy(rows).to(setting.device).view(setting.dtype))
            self._weights.append(
                [
                    parts[0].view(layer.experts, 2 * setting.inner, setting.hidden),
                    parts[1].view(layer.experts, setting.hidden, setting.inner),
                ]
            )
        self._slots = range(max(layer.experts for layer in setting.layers))

    def step(self, x: torch.Tensor, routes: Routes, step: int) -> torch.Tensor:
        for layer, work in enumerate(routes.work[step]):
            x = compute(x, work, routes.table.shape[3], self._weights[layer], self._slots)
        return x

    def counters(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._weights.clear()


class Tiered:
    """Experts in a device tier."""

    def __init__(self, setting: Setting, arm: Arm, link: DeviceLink, least: int, table: LayerTable | None) -> None:
        layers = setting.layers
        expert_bytes, total = layers[0].expert_bytes, sum(layer.experts for layer in layers)
        padded = sum(part.stride for part in layers[0].parts)
        assert arm.device is not None
        slots = max(least, round(arm.device * total))
        self._file = StorageFile(setting.file)
        config = ManagerConfig(policy=arm.policy)
        buffers = 2 * config.io_threads * (config.chunk_bytes + config.chunk_bytes // 4)
        self.tier = DeviceTier(
            layers,
            {setting.file: self._file},
            link,
            device_bytes=slots * expert_bytes,
            host_bytes=-(-buffers // PAGE) * PAGE + round(arm.host * total) * padded,
            config=config,
        )
        slabs = [torch.as_tensor(memory).view(setting.dtype) for memory in self.tier.pool.memory(layers[0].layer)]
        self._weights = [
            slabs[0].view(-1, 2 * setting.inner, setting.hidden),
            slabs[1].view(-1, setting.hidden, setting.inner),
        ]
        self._layers = [layer.layer for layer in layers]
        self._arm = arm
        self._table = table
        self._before = self._counts()

    def fill_host(self) -> None:
        """Bring everything through once, so that what fits is on the host."""
        for layer in self._layers:
            for expert in range(len(self.tier.pool.slots(layer))):
                self.tier.acquire(layer, [[expert]]).release()

    def step(self, x: torch.Tensor, routes: Routes, step: int) -> torch.Tensor:
        manager = self.tier.manager
        manager.begin_step(len(x))
        earlier: list[np.ndarray[Any, Any]] = []
        for place, layer in enumerate(self._layers):
            chosen = routes.on_device[step, place].cpu().numpy()  # who loads experts must know which
            manager.observe(layer, chosen)
            with self.tier.acquire(layer, chosen) as working_set:
                earlier.append(chosen)
                if place + 1 < len(self._layers) and self._arm.prefetch != "no":
                    self._prefetch(place + 1, earlier, routes.table[step, place + 1])
                x = compute(x, routes.work[step][place], chosen.shape[1], self._weights, working_set.slots)
        manager.end_step()
        return x

    def _prefetch(self, place: int, earlier: Sequence[np.ndarray[Any, Any]], truth: np.ndarray[Any, Any]) -> None:
        layer = self._layers[place]
        if self._arm.prefetch == "perfect":
            wanted = np.unique(truth)
            self.tier.manager.prefetch(layer, wanted, limit=len(wanted))
            return
        assert self._table is not None
        linear = self._table.linear[place]
        experts = linear.shape[1]
        miss = np.ones(experts)
        for row in range(len(truth)):
            chance = linear[-1] + linear[earlier[-1][row]].sum(0)
            if place >= 2:
                chance = chance + linear[experts + earlier[-2][row]].sum(0)
            miss *= 1 - np.clip(chance, 0, 1)
        likely = np.argsort(miss)[: int((1 - miss >= LIKELY).sum())]
        self.tier.manager.prefetch(layer, likely, 1 - miss[likely], limit=4 * len(truth))

    def _counts(self) -> dict[str, Any]:
        stats, moved = self.tier.manager.stats(), self.tier.stats()
        return {
            "ready_hits": stats.decode.ready_hits,
            "late": stats.decode.late,
            "misses": stats.decode.misses,
            "stall_seconds": stats.decode.stall_seconds,
            "prefetches": stats.prefetches,
            "prefetches_used": stats.prefetches_used,
            **{name: value for name, value in asdict(moved).items() if name.endswith(("loads", "demotions"))},
            **{name: getattr(moved, name) for name in ("disk_bytes", "link_bytes", "demoted_bytes")},
        }

    def counters(self) -> dict[str, Any]:
        """What happened since the last call, and what is held."""
        now = self._counts()
        change = {name: value - self._before[name] for name, value in now.items()}
        self._before = now
        held = asdict(self.tier.stats())
        kept = ("device_bytes", "host_bytes", "pinned", "resident_bytes", "host_resident_bytes", "double_bytes")
        return {**change, **{name: held[name] for name in kept}}

    def close(self) -> None:
        self.tier.close()
        self._file.close()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(arm: Any, setting: Setting, routes: Routes) -> tuple[list[float], str]:
    """Decode along the routes; seconds of every step, and a digest of all outputs."""
    outputs, seconds = [], []
    start = torch.randn(routes.table.shape[2], setting.hidden, generator=torch.Generator().manual_seed(1))
    x = start.to(setting.device, setting.dtype)
    for step in range(len(routes.table)):
        synchronise(setting.device)
        started = time.perf_counter()
        y = arm.step(x, routes, step)
        synchronise(setting.device)
        seconds.append(time.perf_counter() - started)
        outputs.append(y)
    digest = hashlib.blake2b(torch.stack(outputs).view(torch.uint8).cpu().numpy().tobytes(), digest_size=16)
    return seconds, digest.hexdigest()


# ---- the link alone


def measure_link(link: DeviceLink, setting: Setting, sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Copies alone, both ways at once, and beside a computation."""
    largest = max(sizes)
    device, pinned = link.allocate(largest), link.allocate_host(largest)
    back, pinned_back = link.allocate(largest), link.allocate_host(largest)
    pageable = np.ones(largest, np.uint8)
    pinned[:] = pinned_back[:] = 1

    def seconds(action: Callable[[], None]) -> float:
        action()
        times = []
        for _ in range(repeats):
            synchronise(setting.device)
            started = time.perf_counter()
            action()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def copies(source: Any, size: int, count: int) -> Callable[[], None]:
        return lambda: [link.copy(device[:size], source[:size], DEMAND) for _ in range(count)][-1].wait()

    rows = []
    for size in sizes:
        count = max(1, min(16, 64 * MIB // size))
        rows.append(
            {
                "bytes": size,
                "pinned_bytes_per_second": count * size / seconds(copies(pinned, size, count)),
                "pageable_bytes_per_second": count * size / seconds(copies(pageable, size, count)),
            }
        )

    def both_ways() -> None:
        up = link.copy(device, pinned, DEMAND)
        link.copy(pinned_back, back, 2).wait()
        up.wait()

    duplex = 2 * largest / seconds(both_ways)
    matrix = torch.randn(setting.hidden, setting.hidden, device=setting.device).to(setting.dtype)

    def multiply(times: int) -> None:
        y = matrix
        for _ in range(times):
            y = functional.linear(y, matrix)
        synchronise(setting.device)

    alone_copy = seconds(copies(pinned, largest, 4))
    times = max(1, int(alone_copy / seconds(lambda: multiply(1))))
    alone_compute = seconds(lambda: multiply(times))

    def together() -> None:
        last = [link.copy(device, pinned, DEMAND) for _ in range(4)][-1]
        multiply(times)
        last.wait()

    both = seconds(together)
    hidden = (alone_copy + alone_compute - both) / min(alone_copy, alone_compute)
    return {
        "sizes": rows,
        "both_ways_bytes_per_second": duplex,
        "copy_seconds": alone_copy,
        "compute_seconds": alone_compute,
        "together_seconds": both,
        "hidden_share": hidden,
    }


# ---- everything


def arms_of(shares: Sequence[float], host_shares: Sequence[float]) -> list[Arm]:
    arms = [Arm(name="all resident"), Arm(name="tier, 100 %", device=1.0), Arm(name="on demand", device=0.0)]
    for share in shares:
        arms += [
            Arm(name="lru", device=share, policy="lru"),
            Arm(name="lfu", device=share),
            Arm(name="ours", device=share, prefetch="table"),
            Arm(name="perfect", device=share, prefetch="perfect"),
        ]
        for host in host_shares:
            arms += [
                Arm(name="lru", device=share, host=host, policy="lru"),
                Arm(name="ours", device=share, host=host, prefetch="table"),
            ]
    return arms


def read_routes(path: Path, steps: int, batch: int) -> tuple[np.ndarray[Any, Any], LayerTable]:
    """Routes of `batch` requests side by side, (steps, layers, batch, top_k), and a table counted on other requests."""
    windows, _ = read_windows([read_trace(path)], width=64)
    numbers = np.unique(windows.request)
    learned = numbers[: max(1, len(numbers) // 3)]
    measured = numbers[len(learned) :]
    table = count_layers(windows.take(np.flatnonzero(np.isin(windows.request, learned))))
    texts = []
    for number in measured.tolist():
        routes = windows.routes[windows.request == number].astype(np.int64)
        flat = routes.reshape(-1, *routes.shape[2:])
        texts.append(flat[(flat >= 0).all((1, 2))])
    if batch == 1:
        return np.concatenate(texts)[:steps, :, None], table
    usable = min(len(text) for text in texts[:batch])
    if len(texts) < batch:
        raise SystemExit(f"The trace has {len(texts)} requests to measure, not {batch}.")
    return np.stack([text[: min(steps, usable)] for text in texts[:batch]], 2), table


def measure(options: argparse.Namespace, setting: Setting, make_link: Callable[[], DeviceLink]) -> list[dict[str, Any]]:
    """Run all arms in turns, repeat by repeat; no repeat begins after the minutes given."""
    began = time.monotonic()
    found: dict[tuple[int, Arm], list[dict[str, Any]]] = {}
    for repeat in range(options.repeats):
        if repeat and time.monotonic() - began > 60 * options.minutes:
            break
        for batch in options.batch:
            for arm, result in measure_arms(options, setting, make_link, batch):
                print(f"repeat {repeat + 1}, batch {batch}: {arm.label}", file=sys.stderr, flush=True)
                found.setdefault((batch, arm), []).append(result)
    rows = []
    for (batch, arm), repeats in found.items():
        reference = next(results for (other, _), results in found.items() if other == batch)
        rows.append(summary(arm, batch, repeats, reference))
    return rows


def measure_arms(
    options: argparse.Namespace, setting: Setting, make_link: Callable[[], DeviceLink], batch: int
) -> Iterator[tuple[Arm, dict[str, Any]]]:
    """Run every arm once."""
    total = sum(layer.experts for layer in setting.layers)
    table, counted = read_routes(options.trace, options.steps + options.warm_up, batch)
    warm, timed = Routes(table[: options.warm_up], setting.device), Routes(table[options.warm_up :], setting.device)
    least = max(warm.largest_set(), timed.largest_set())
    for arm in arms_of(options.share, options.host_share):
        if arm.device and arm.device * total < least:
            continue
        plain = arm.device is None
        runner: Any = AllResident(setting) if plain else Tiered(setting, arm, make_link(), least, counted)
        try:
            if not plain and arm.host >= 1:
                runner.fill_host()
            run(runner, setting, warm)
            runner.counters()
            seconds, digest = run(runner, setting, timed)
            yield arm, {"seconds": seconds, "digest": digest, **runner.counters()}
        finally:
            runner.close()


def summary(arm: Arm, batch: int, repeats: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    totals = [sum(each["seconds"]) for each in repeats]
    ratios = [sum(first["seconds"]) / mine for first, mine in zip(reference, totals, strict=True)]
    tokens = len(repeats[0]["seconds"]) * batch
    last = {name: value for name, value in repeats[-1].items() if name not in ("seconds", "digest")}
    used = last.get("ready_hits", 0) + last.get("late", 0) + last.get("misses", 0)
    return {
        **asdict(arm),
        "label": arm.label,
        "batch": batch,
        "tokens_per_second": [tokens / total for total in totals],
        "against_all_resident": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "step_ms_p50": 1e3 * statistics.median(repeats[-1]["seconds"]),
        "ready_hit": last["ready_hits"] / used if used else 1.0,
        "stall_ms_per_token": 1e3 * last.get("stall_seconds", 0.0) / tokens,
        "link_mib_per_token": last.get("link_bytes", 0) / MIB / tokens,
        "disk_mib_per_token": last.get("disk_bytes", 0) / MIB / tokens,
        "outputs_equal": all(each["digest"] == reference[0]["digest"] for each in repeats),
        "counters": last,
    }


def table_of(record: dict[str, Any]) -> str:
    columns = ("batch", "arm", "tok/s", "of all resident, min..max", "ready hits", "stall ms/token", "link MiB/token",
               "disk MiB/token", "outputs")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in record["arms"]:
        ratio = row["against_all_resident"]
        lines.append(
            f"| {row['batch']} | {row['label']} | {statistics.median(row['tokens_per_second']):.1f} "
            f"| {ratio['median']:.2f}, {ratio['min']:.2f}..{ratio['max']:.2f} | {100 * row['ready_hit']:.1f} % "
            f"| {row['stall_ms_per_token']:.2f} | {row['link_mib_per_token']:.1f} | {row['disk_mib_per_token']:.1f} "
            f"| {'equal' if row['outputs_equal'] else 'DIFFERENT'} |"
        )
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = list(dict.fromkeys(row["batch"] for row in record["arms"]))
    figure, axes = pyplot.subplots(
        1, len(batches) + 1, figsize=(5.2 * (len(batches) + 1), 4.6), layout="constrained", squeeze=False
    )
    for place, batch in enumerate(batches):
        rows = [row for row in record["arms"] if row["batch"] == batch][::-1]
        heights = [row["against_all_resident"]["median"] for row in rows]
        colours = ["#0f8b8d" if row["name"] == "ours" else "#98a6b3" for row in rows]
        axes[0][place].barh([row["label"] for row in rows], heights, color=colours)
        axes[0][place].set_title(f"Decode, batch {batch}: share of all resident", loc="left")
    sizes = record["link"]["sizes"]
    for name in ("pinned", "pageable"):
        axes[0][-1].plot(
            [row["bytes"] / MIB for row in sizes],
            [row[f"{name}_bytes_per_second"] / 1e9 for row in sizes],
            "o-",
            label=name,
        )
    axes[0][-1].set_xscale("log")
    axes[0][-1].set_title("Copies to the device, GB/s by MiB", loc="left")
    axes[0][-1].legend(frameon=False)
    figure.suptitle(record["machine"]["device"], x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def machine(link: DeviceLink) -> dict[str, Any]:
    return {
        "device": link.name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": f"{platform.system()} {platform.release()}",
    }


@contextlib.contextmanager
def scratch(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768, help="An expert has three matrices of hidden x inner.")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--share", type=float, nargs="+", default=[0.25, 0.5], help="Of the experts, on the device.")
    parser.add_argument(
        "--host-share", type=float, nargs="*", default=[0.25], help="Of the experts, with a disk below."
    )
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--warm-up", type=int, default=48, help="Steps before those that are measured.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=7.0, help="After which no other repeat begins.")
    parser.add_argument("--small", action="store_true", help="Experts of some KiB and few steps: only to see it work.")
    parser.add_argument("--scratch", type=Path, help="Where the experts' file goes; a temporary folder.")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.small:
        options.hidden, options.inner, options.steps, options.warm_up, options.repeats = 64, 32, 16, 8, 1
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    cuda = device.type == "cuda"

    def make_link() -> DeviceLink:
        return CudaLink(device) if cuda else ThreadLink()

    header = read_trace(options.trace).header
    dtype = torch.bfloat16 if cuda else torch.float32
    sizes = [16 << 10, 64 << 10] if options.small else [64 << 10, 256 << 10, MIB, 4 * MIB, 16 * MIB, 64 * MIB]
    with scratch(options.scratch) as folder, torch.inference_mode():
        path = folder / "experts.bin"
        layers = write_experts(path, header, options.hidden, options.inner, dtype)
        setting = Setting(
            device=device, dtype=dtype, hidden=options.hidden, inner=options.inner, layers=tuple(layers), file=path
        )
        link = make_link()
        record: dict[str, Any] = {"machine": machine(link), "experts": sum(layer.experts for layer in layers)}
        record["expert_bytes"] = layers[0].expert_bytes
        record["link"] = measure_link(link, setting, sizes, 3 if options.small else 7)
        link.close()
        record["arms"] = measure(options, setting, make_link)
        path.unlink()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "device-tier.json").write_text(json.dumps(record, indent=1) + "\n")
    with contextlib.suppress(ImportError):
        draw(record, options.out / "device-tier.png")
    print(table_of(record))
    if not all(row["outputs_equal"] for row in record["arms"]):
        print("Outputs differ from those with everything resident.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
