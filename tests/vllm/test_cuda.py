"""What a CUDA device needs of vLLM, as far as it can be told without one: nothing here has run on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expertier.errors import ExpertierError, UnsupportedOptionError
from expertier_vllm.options import VllmOptions
from support.tiny_hf import HfSpec
from support.vllm_process import engine, run

vllm = pytest.importorskip("vllm")

ATTENTION = ["vllm::unified_attention_with_output"]


def configuration(graphs: str = "FULL_AND_PIECEWISE", **compilation: Any) -> Any:
    """A complete configuration of a server on a CUDA device, as far as it is looked at."""
    from vllm.config import CompilationMode, CUDAGraphMode

    return SimpleNamespace(
        model_config=SimpleNamespace(is_submodel_config=False),
        additional_config={"expertier": {"budget": "8GiB"}},
        parallel_config=SimpleNamespace(worker_cls="vllm.v1.worker.gpu_worker.Worker"),
        scheduler_config=SimpleNamespace(scheduler_cls=None, async_scheduling=True),
        compilation_config=SimpleNamespace(
            **{
                "cudagraph_mode": CUDAGraphMode[graphs],
                "mode": CompilationMode.VLLM_COMPILE,
                "splitting_ops": list(ATTENTION),
                "use_inductor_graph_partition": False,
            }
            | compilation
        ),
        instance_id="none",
    )


@pytest.fixture
def take_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Return what happens to a configuration on a CUDA device."""
    from expertier_vllm.compat import v032
    from expertier_vllm.refusals import ServerFacts

    monkeypatch.setattr(v032, "read_facts", lambda _: ServerFacts(platform="cuda", model="some/model", experts=8))
    monkeypatch.setattr(v032, "publish", lambda _: None)
    yield v032.take_over


# ---- the start


def test_a_cuda_device_gets_a_worker_of_its_own_and_graphs_that_end_at_the_experts(
    take_over: Callable[[Any], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import CUDAGraphMode

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    config = configuration()
    with caplog.at_level(logging.INFO, "vllm.expertier"):
        take_over(config)
        take_over(config)  # vLLM completes a configuration more than once
    compilation = config.compilation_config
    assert config.parallel_config.worker_cls == "expertier_vllm.compat.v032.cuda_worker.ExpertierCudaWorker"
    assert compilation.cudagraph_mode == CUDAGraphMode.PIECEWISE
    assert compilation.splitting_ops == [*ATTENTION, "expertier::moe", "expertier::moe_shared"]
    assert config.scheduler_config.async_scheduling is False
    for said in ("PIECEWISE", "asynchronous scheduling is off", "never been run on a GPU"):
        assert said in caplog.text


def test_the_worker_of_a_cuda_device_is_vllms_with_its_own_way_of_sizing_the_kv_cache() -> None:
    from vllm.v1.worker.gpu_worker import Worker

    from expertier_vllm.compat.v032.cuda_worker import ExpertierCudaWorker

    assert issubclass(ExpertierCudaWorker, Worker)
    # Slots are there when stock measures what the model takes: --gpu-memory-utilization keeps its meaning.
    assert ExpertierCudaWorker.determine_available_memory is Worker.determine_available_memory


@pytest.mark.parametrize("mode", ["NONE", "PIECEWISE"])
def test_graphs_that_capture_no_whole_step_stay_as_they_are(take_over: Callable[[Any], None], mode: str) -> None:
    config = configuration(mode)
    take_over(config)
    assert config.compilation_config.cudagraph_mode.name == mode


def test_without_vllms_own_compilation_nothing_is_split(take_over: Callable[[Any], None]) -> None:
    from vllm.config import CompilationMode

    config = configuration("NONE", mode=CompilationMode.NONE)
    take_over(config)
    assert config.compilation_config.splitting_ops == ATTENTION


@pytest.mark.parametrize(
    ("mode", "compilation", "words"),
    [
        ("FULL", {}, "whole steps .cudagraph_mode FULL.*PIECEWISE"),
        ("FULL_DECODE_ONLY", {}, "whole steps .cudagraph_mode FULL_DECODE_ONLY"),
        ("PIECEWISE", {"use_inductor_graph_partition": True}, "use_inductor_graph_partition"),
    ],
)
def test_graphs_that_would_capture_the_experts_are_refused_with_the_way_out(
    take_over: Callable[[Any], None], mode: str, compilation: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedOptionError, match=words):
        take_over(configuration(mode, **compilation))


def test_breakable_graphs_are_refused_by_name(
    take_over: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(UnsupportedOptionError, match="VLLM_USE_BREAKABLE_CUDAGRAPH=1"):
        take_over(configuration())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "A budget of 'auto' is not possible"),
        ({"budget": "50%", "virtual_bias": 0.1}, "virtual_bias is not possible with experts in slots"),
        ({"budget": "50%", "governor": "on"}, "governor is not possible"),
        ({"budget": "50%", "trace": "routes.trace"}, "trace is not possible"),
    ],
)
def test_what_slots_exclude_is_refused_on_a_device_without_host_budget_too(
    take_over: Callable[[Any], None], given: dict[str, Any], words: str
) -> None:
    assert VllmOptions.from_additional_config({"expertier": given}) is not None  # on the CPU it is possible
    config = configuration()
    config.additional_config = {"expertier": given}
    with pytest.raises(ExpertierError, match=words):
        take_over(config)


# ---- the operators


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module with the operators; every layer doubles what it is given, and shared experts triple it."""
    import torch

    from expertier_vllm.compat.v032 import opaque

    class Layer:
        shared = False

        def _forward_impl(self, hidden: torch.Tensor, *_: Any) -> Any:
            return (3 * hidden, 2 * hidden) if Layer.shared else 2 * hidden

    monkeypatch.setattr(opaque.moe_runner, "get_layer_from_name", lambda _: Layer())
    return SimpleNamespace(module=opaque, layer=Layer)


def arguments() -> tuple[Any, ...]:
    import torch
    from vllm.utils.torch_utils import _encode_layer_name

    return torch.randn(5, 8), torch.randn(5, 4), torch.randn(5, 8), None, _encode_layer_name("model.layers.0.mlp")


@pytest.mark.parametrize("shared", [False, True])
def test_the_operators_keep_their_promises_to_the_compiler(operators: Any, shared: bool) -> None:
    import torch

    operators.layer.shared = shared
    operator = torch.ops.expertier.moe_shared if shared else torch.ops.expertier.moe
    outputs = tuple(torch.empty(5, 8) for _ in range(1 + shared))
    torch.library.opcheck(operator, (*arguments(), *outputs), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("shared", [False, True])
def test_vllm_splits_a_graph_at_the_experts_whose_output_the_piece_before_allocates(
    operators: Any, shared: bool
) -> None:
    import torch
    from vllm.compilation.backends import split_graph

    from expertier_vllm.compat.v032.graphs import OPERATORS

    operators.layer.shared = shared
    hidden, logits, other, _, name = arguments()
    found: list[Any] = []

    def layer(hidden: torch.Tensor, logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if shared:
            first, second = operators.module._into_two(hidden * 2, logits, other, None, name, 0)
            return torch.add(first, second)
        routed: torch.Tensor = operators.module._into_one(hidden * 2, logits, None, None, name, 0)
        return routed + 1

    def keep(graph: Any, inputs: Any) -> Any:
        found.extend((graph, inputs))
        return graph.forward

    expected = layer(hidden, logits, other)
    compiled = torch.compile(layer, backend=keep, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(hidden, logits, other), expected)
    split, pieces = split_graph(found[0], list(OPERATORS))
    assert [piece.is_splitting_graph for piece in pieces] == [False, True, False]
    calls = [[str(node.target) for node in piece.graph.graph.nodes if node.op == "call_function"] for piece in pieces]
    assert any("empty_like" in call for call in calls[0])
    assert len(calls[1]) == 1 and "expertier" in calls[1][0]
    known = {"L_hidden_": hidden, "L_logits_": logits, "L_other_": other}
    given = [known.get(node.target, name) for node in split.graph.nodes if node.op == "placeholder"]
    assert torch.equal(split(*given)[0], expected)


# ---- the kernel


def on_slots(name: str, config: Any, experts: int) -> tuple[Any, Any, list[Any]]:
    """A kernel of a name, its stage in a layer of so many experts, and the list of tiles that it computes with."""
    import torch
    from vllm.model_executor.layers.fused_moe import get_config

    from expertier_vllm.compat.v032 import triton

    seen: list[Any] = []

    def apply(self: Any, **_: Any) -> str:
        seen.append(get_config())
        return "done"

    kernel = type(name, (), {"quant_config": config, "block_shape": config.block_shape, "apply": apply})()
    layer = torch.nn.Module()
    layer.managed = SimpleNamespace(experts=experts, tokens=None)
    layer.quant_method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=kernel))
    triton.install(torch.nn.ModuleList([layer, torch.nn.Linear(1, 1)]))
    return kernel, layer.managed, seen


def test_a_kernel_on_slots_divides_its_work_as_on_all_experts() -> None:
    import torch
    from vllm.model_executor.layers.fused_moe import get_config
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

    kernel, _, seen = on_slots("TritonExperts", FusedMoEQuantConfig.make(), 256)
    tokens, slots = torch.empty(2048, 32), 8
    w1, w2 = torch.empty(slots, 128, 32), torch.empty(slots, 32, 64)
    given = {"topk_ids": torch.zeros(2048, 4, dtype=torch.int32)}
    assert kernel.apply(hidden_states=tokens, w1=w1, w2=w2, **given) == "done"
    all_experts = try_get_optimal_moe_config((256, 128, 32), (256, 32, 64), 4, None, 2048)
    assert seen == [all_experts]
    assert all_experts != try_get_optimal_moe_config(w1.shape, w2.shape, 4, None, 2048)  # or this would show nothing
    assert get_config() is None


@pytest.mark.parametrize("name", ["TritonExperts", "TritonWNA16Experts"])
def test_a_kernel_that_gets_a_step_in_groups_divides_its_work_as_on_the_whole_step(name: str) -> None:
    import torch
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig, int4_w4a16_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_wna16_block_config, try_get_optimal_moe_config

    int4 = name == "TritonWNA16Experts"
    scale = torch.ones(8, 128, 1)
    config = (
        int4_w4a16_moe_quant_config(w1_scale=scale, w2_scale=scale, w1_zp=None, w2_zp=None, block_shape=[0, 32])
        if int4
        else FusedMoEQuantConfig.make()
    )
    kernel, stage, seen = on_slots(name, config, 8)
    w1, w2 = torch.empty(8, 128, 32), torch.empty(8, 64, 32)

    def compute(tokens: int) -> dict[str, int]:
        kernel.apply(
            hidden_states=torch.empty(tokens, 64, dtype=torch.bfloat16),
            w1=w1,
            w2=w2,
            topk_ids=torch.zeros(tokens, 4, dtype=torch.int32),
        )
        tiles: dict[str, int] = seen[-1]
        if int4:  # what the kernel's launch adds, by its own number of tokens
            more = dict.fromkeys(("size_k", "size_n", "num_experts", "group_size", "block_size_m"), 32)
            asked = {"num_valid_tokens": 4 * tokens, "real_top_k": 4, "use_moe_wna16_cuda": False}
            return tiles | get_moe_wna16_block_config(config=tiles, **asked, **more)
        return tiles

    whole, alone = compute(2048), compute(1)
    stage.tokens = 2048
    assert compute(1) == whole != alone
    stock = config.config_name(torch.bfloat16), 2048, config.block_shape
    assert whole.items() >= try_get_optimal_moe_config(w1.shape, w2.shape, 4, *stock).items()


# ---- in the CPU build, with the operators of a device


def answers(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [(5 * row + 3 * place) % 250 for place in range(length)]}
        for row, length in enumerate((3, 40, 17))
    ]
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling, use_tqdm=False)]


def as_on_a_device(model: str) -> dict[str, Any]:
    """Tokens of stock with its operators around whole layers, as it has them on a device, and of ours with ours."""
    import torch
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    from expertier_vllm.compat.v032.graphs import OPERATORS

    MoERunner._select_forward = lambda self: (
        torch.ops.vllm.moe_forward if self._shared_experts is None else torch.ops.vllm.moe_forward_shared
    )
    with engine(model, enforce_eager=False) as llm:
        stock = answers(llm)
    with engine(model, "50%", enforce_eager=False, compilation_config={"splitting_ops": list(OPERATORS)}) as llm:
        ours = answers(llm)
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        runners = [module for module in worker.get_model().modules() if isinstance(module, MoERunner)]
        entries = {runner._forward_entry.__name__ for runner in runners}
    return {"stock": stock, "ours": ours, "entries": sorted(entries)}


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_with_the_operators_of_a_device_tokens_are_stocks(checkpoint: Callable[[HfSpec], Path]) -> None:
    outcome = run(as_on_a_device, str(checkpoint(HfSpec(family="qwen2_moe", layers=2))))
    assert outcome["ours"] == outcome["stock"]
    assert outcome["entries"] == ["_into_two"]  # this family has shared experts
    assert len({tuple(tokens) for tokens in outcome["stock"]}) == 3


def padded(model: str) -> dict[str, Any]:
    """Counters and tokens in slots, with as many rows of padding as captured graphs may have, and without."""
    import torch
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    stock = MoERunner._forward_impl
    noise = torch.Generator().manual_seed(3)

    def with_padding(self: Any, hidden: torch.Tensor, logits: torch.Tensor, *rest: Any) -> Any:
        rows = len(hidden)
        more = [torch.randn(5, part.shape[1], generator=noise).to(part.dtype) for part in (hidden, logits)]
        return stock(self, torch.cat((hidden, more[0])), torch.cat((logits, more[1])), *rest)[:rows]

    found = {}
    for name, forward in (("without", stock), ("with", with_padding)):
        MoERunner._forward_impl = forward
        with engine(model, "25%", expertier={"host_budget": "64MiB", "lookahead": "off"}) as llm:
            tokens = answers(llm)
            stats = llm.collective_rpc("expertier_stats")[0]
            counted = {
                phase: [stats[phase][name] for name in ("requests", "tokens")] for phase in ("decode", "prefill")
            }
            found[name] = {"tokens": tokens, "counted": counted}
    return found


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_padding_loads_nothing_and_changes_nothing(checkpoint: Callable[[HfSpec], Path]) -> None:
    outcome = run(padded, str(checkpoint(HfSpec(layers=2))))
    assert outcome["with"] == outcome["without"]
