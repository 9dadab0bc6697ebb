"""vLLM's Triton kernels on slots: the bits of the same kernels on all experts.

Triton needs a device, its interpreter does not; but where Triton is installed, the CPU build of vLLM is another one. So
it is looked for in a directory of its own: ``pip install --no-deps --target DIR triton``, and ``EXPERTIER_TRITON=DIR``.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from support.vllm_process import run

TRITON = "EXPERTIER_TRITON"
SCHEMES = (
    "bf16",
    "bf16, biases",
    "fp8, blocks",
    "fp8, one scale for a matrix and for inputs",
    "fp8, scales by channel and token",
    "int8, scales by channel and token",
    "int4",
    "int4, zero points",
)
EXPERTS, SLOTS, TOKENS, TOP_K, INPUTS, OUTPUTS = 12, 7, 9, 3, 256, 128
KERNELS = ("write_zeros_to_output", "fused_moe_kernel_gptq_awq", "fused_moe_kernel")
GROUPS = ([0, 3, 8], [1], [2, 4, 5, 6, 7])

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(TRITON not in os.environ, reason=f"{TRITON} names no directory with Triton"),
]


def interpreted(directory: str, scratch: str) -> dict[str, dict[str, bool]]:
    """For every scheme, whether slots give the bits of all experts: at once, token by token unsorted, and in groups."""
    import torch
    import vllm.model_executor.layers.fused_moe.fused_moe as upstream

    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        del sys.modules[name]  # the placeholder of the CPU build
    sys.path.insert(0, directory)
    import triton

    kernels = jitted(Path(upstream.__file__), Path(scratch))
    upstream.triton, upstream.tl = triton, triton.language
    upstream.fused_moe_kernel, upstream.fused_moe_kernel_gptq_awq = (
        kernels.fused_moe_kernel,
        kernels.fused_moe_kernel_gptq_awq,
    )
    draw = torch.Generator().manual_seed(1)
    there = torch.randperm(EXPERTS, generator=draw)[:SLOTS]
    place = torch.full((EXPERTS,), -1)
    place[there] = torch.randperm(SLOTS, generator=draw)
    ids = torch.stack([there[torch.randperm(SLOTS, generator=draw)[:TOP_K]] for _ in range(TOKENS)]).int()
    gates = torch.rand(TOKENS, TOP_K, generator=draw)

    def moved(rows: Any) -> Any:
        if rows is None:
            return None
        slots = torch.zeros((SLOTS, *rows.shape[1:]), dtype=rows.dtype)
        slots[place[there]] = rows[there]
        return slots

    outcome = {}
    for scheme in SCHEMES:
        case = operands(scheme, draw)
        on_slots = case | {name: moved(case[name]) for name in ("weights", "scales", "zeros", "bias")}
        slots = place[ids.long()].int()
        expected = multiply(upstream, case, ids, gates, EXPERTS)
        grouped = torch.empty_like(expected)
        for group in GROUPS:
            grouped[group] = multiply(upstream, on_slots, slots, gates, SLOTS, tokens=group)
        same = {
            "at once": multiply(upstream, on_slots, slots, gates, SLOTS),
            "in groups": grouped,
            "unsorted": multiply(upstream, on_slots, slots, gates, SLOTS, unsorted="int4" not in scheme),
        }
        outcome[scheme] = {name: torch.equal(found, expected) for name, found in same.items()}
        outcome[scheme]["lively"] = bool(expected.isfinite().all()) and len(expected.unique()) > 100
    return outcome


def jitted(source: Path, scratch: Path) -> Any:
    """Upstream's kernels, compiled by the Triton that is there; it reads their source from a file."""
    text = source.read_text()
    kernels = [
        f"@triton.jit\n{ast.get_source_segment(text, node)}\n"
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name in KERNELS
    ]
    assert len(kernels) == len(KERNELS)
    path = scratch / "kernels.py"
    path.write_text("\n\n".join(["import triton\nimport triton.language as tl\n", *kernels]))
    spec = importlib.util.spec_from_file_location("kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def operands(scheme: str, draw: Any) -> dict[str, Any]:
    """Inputs, weights of all experts and what belongs to both."""
    import torch

    def scales(*shape: int) -> Any:
        return torch.rand(shape, generator=draw) / 10 + 0.01

    def nibbles(*shape: int) -> Any:
        return torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)

    x = torch.randn(TOKENS, INPUTS, generator=draw)
    weights = torch.randn(EXPERTS, OUTPUTS, INPUTS, generator=draw)
    case: dict[str, Any] = {"flags": {}, "bias": None, "scales": None, "zeros": None, "input_scales": None}
    if scheme.startswith("bf16"):
        bias = torch.randn(EXPERTS, OUTPUTS, generator=draw).bfloat16() if "bias" in scheme else None
        return case | {"x": x.bfloat16(), "weights": weights.bfloat16(), "bias": bias}
    if scheme.startswith("int4"):
        zeros = nibbles(EXPERTS, OUTPUTS // 2, INPUTS // 64) if "zero" in scheme else None
        case |= {"flags": {"use_int4_w4a16": True, "block_shape": [0, 64]}, "zeros": zeros, "x": x.bfloat16()}
        packed = {"weights": nibbles(EXPERTS, OUTPUTS, INPUTS // 2)}
        return case | packed | {"scales": scales(EXPERTS, OUTPUTS, INPUTS // 64).bfloat16()}
    whole = scheme.startswith("int8")
    kind, size = (torch.int8, 40) if whole else (torch.float8_e4m3fn, 1)
    flag = {"use_int8_w8a8" if whole else "use_fp8_w8a8": True}
    case |= {"x": (x * size).to(kind), "weights": (weights * size).to(kind)}
    if "blocks" in scheme:
        shapes = {
            "scales": scales(EXPERTS, OUTPUTS // 128, INPUTS // 128),
            "input_scales": scales(TOKENS, INPUTS // 128),
        }
        return case | shapes | {"flags": flag | {"block_shape": [128, 128]}}
    if "matrix" in scheme:
        return case | {"flags": flag, "scales": scales(EXPERTS), "input_scales": torch.tensor(0.05)}
    by_row = {"scales": scales(EXPERTS, OUTPUTS, 1), "input_scales": scales(TOKENS, 1)}
    return case | by_row | {"flags": flag | {"per_channel_quant": True}}


def multiply(
    upstream: Any,
    case: dict[str, Any],
    ids: Any,
    gates: Any,
    experts: int,
    *,
    tokens: list[int] | None = None,
    unsorted: bool = False,
) -> Any:
    """One product of the kernel, of all tokens or of some."""
    import torch

    chosen = list(range(TOKENS)) if tokens is None else tokens
    scales = case["input_scales"]
    scales = scales[chosen] if scales is not None and scales.dim() == 2 else scales
    tiles = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1}
    ids, gates = ids[chosen], gates[chosen]
    if unsorted:
        order = None, ids.flatten(), torch.tensor([ids.numel() * tiles["BLOCK_SIZE_M"]], dtype=torch.int32)
    else:
        order = by_expert(ids, tiles["BLOCK_SIZE_M"], experts)
    output = torch.zeros(len(chosen), TOP_K, OUTPUTS, dtype=torch.bfloat16)
    flags = dict.fromkeys(("use_int8_w8a16", "use_int4_w4a16"), False) | {"block_shape": None} | case["flags"]
    shared = gates, *order, True, TOP_K
    kind = {"compute_type": upstream.tl.bfloat16}
    if flags["use_int4_w4a16"]:
        tiles |= {"BLOCK_SIZE_K": 32, "SPLIT_K": 1}
        inputs = case["x"][chosen], case["weights"], output, case["scales"], case["zeros"]
        upstream.invoke_fused_moe_wna16_triton_kernel(*inputs, *shared, tiles, **kind, **flags)
        return output
    flags = dict.fromkeys(("use_fp8_w8a8", "use_int8_w8a8", "per_channel_quant"), False) | flags
    inputs = case["x"][chosen], case["weights"], output, scales, case["scales"]
    upstream.invoke_fused_moe_triton_kernel(*inputs, *shared, tiles, **kind, **flags, B_bias=case["bias"])
    return output


def by_expert(ids: Any, block: int, experts: int) -> Any:
    """What ``moe_align_block_size`` gives, which is an operator of devices."""
    import torch

    flat, rows, owners = ids.flatten(), [], []
    for expert in range(experts):
        mine = (flat == expert).nonzero().flatten().tolist()
        mine += [flat.numel()] * (-len(mine) % block)
        rows += mine
        owners += [expert] * (len(mine) // block)
    return tuple(torch.tensor(values, dtype=torch.int32) for values in (rows, owners, [len(rows)]))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Any:
    scratch = str(tmp_path_factory.mktemp("kernels"))
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return run(interpreted, os.environ[TRITON], scratch, environment=environment)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_kernel_on_slots_gives_the_bits_of_the_kernel_on_all_experts(outcome: Any, scheme: str) -> None:
    assert outcome[scheme] == dict.fromkeys(("at once", "in groups", "unsorted", "lively"), True)
