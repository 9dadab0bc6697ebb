"""The benchmark of the device tier runs from end to end without a device, and would notice a wrong output."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from expertier.routing.recorder import TraceRecorder
from support.traces import header, skewed_routes

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "device_tier.py"


@pytest.fixture(scope="module")
def benchmark_script() -> ModuleType:
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("device_tier", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    shape = header(layers=3, experts=8, top_k=2)
    with TraceRecorder(tmp_path / "routes.trace", shape) as recorder:
        for request in range(6):
            for position, row in enumerate(skewed_routes(shape, 16, seed=request)):
                recorder.begin_step("decode", requests=np.array([request]), positions=np.array([position]))
                for place, layer in enumerate(shape.layers):
                    recorder.record(layer.layer, row[None, place])
                recorder.end_step()
    trace = ["--trace", str(tmp_path / "routes.trace"), "--out", str(tmp_path / "out")]
    return ["--device", "cpu", "--small", *trace, "--share", "0.5", "--batch", "1", "2"]


def rows(tmp_path: Path) -> dict[tuple[int, str], dict[str, Any]]:
    record = json.loads((tmp_path / "out" / "device-tier.json").read_text())
    assert record["link"]["sizes"]
    return {(row["batch"], row["label"]): row for row in record["arms"]}


def test_every_arm_gives_the_outputs_of_the_one_with_everything_resident(
    tmp_path: Path, benchmark_script: ModuleType, arguments: list[str]
) -> None:
    assert benchmark_script.main(arguments) == 0
    found = rows(tmp_path)
    assert {batch for batch, _ in found} == {1, 2}
    assert all(row["outputs_equal"] for row in found.values())
    demand, lfu = found[1, "on demand"], found[1, "lfu 50%"]
    assert demand["link_mib_per_token"] > lfu["link_mib_per_token"] > 0 == lfu["disk_mib_per_token"]
    assert found[1, "perfect 50%"]["ready_hit"] > lfu["ready_hit"]
    assert found[1, "ours 50%, host 25%"]["disk_mib_per_token"] > 0
    assert (tmp_path / "out" / "device-tier.png").stat().st_size > 1000


def test_an_arm_that_computes_on_other_bytes_is_found_out(
    tmp_path: Path, benchmark_script: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = benchmark_script.Tiered.__init__

    def spoilt(self: Any, setting: Any, arm: Any, *others: Any) -> None:
        stock(self, setting, arm, *others)
        if arm.name == "lru":
            self._weights = self._weights[0].roll(1, 0), self._weights[1]

    monkeypatch.setattr(benchmark_script.Tiered, "__init__", spoilt)
    assert benchmark_script.main([*arguments, "--batch", "1", "--host-share"]) == 1
    assert [label for (_, label), row in rows(tmp_path).items() if not row["outputs_equal"]] == ["lru 50%"]
