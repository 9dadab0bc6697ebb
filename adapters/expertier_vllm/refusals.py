"""What Expertier cannot do in vLLM, each with its name and the way out. Knows facts, not vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from expertier.errors import (
    ExpertierError,
    NotMoEError,
    UnsupportedEngineError,
    UnsupportedModelError,
    UnsupportedOptionError,
)

LOAD_FORMATS: Final = frozenset({"auto", "hf", "safetensors", "mistral"})
"""Load formats whose tensors are mapped from safetensors files: nothing is in memory before it is used."""

LOAD_STRATEGIES: Final = frozenset({None, "lazy"})


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """What decides whether Expertier can take over, read off vLLM's configuration.

    Attributes
    ----------
    platform : str
        ``cpu``, ``cuda``, ``rocm``, ...; ROCm calls its devices cuda, too, but not itself.
    model : str
        The model as it was named.
    experts : int
        Routed experts per layer; 0 for a dense model.
    load_format : str
        ``--load-format``.
    load_strategy : str or None
        ``--safetensors-load-strategy``.
    multithread_load : bool
        ``enable_multithread_load`` in ``--model-loader-extra-config``.
    data_parallel, context_parallel : int
        Sizes of vLLM's parallel groups of these kinds.
    tensor_parallel : int
        ``--tensor-parallel-size``.
    virtual : bool
        Whether resident experts may stand in for absent ones.
    expert_parallel, eplb, micro_batches, lora, speculative, sleep_mode, weight_offload, elastic : bool
        Features that are on.
    second_runner : bool
        Whether vLLM's model runner V2 is to run the model.
    """

    platform: str
    model: str
    experts: int
    load_format: str = "auto"
    load_strategy: str | None = None
    multithread_load: bool = False
    data_parallel: int = 1
    context_parallel: int = 1
    tensor_parallel: int = 1
    virtual: bool = False
    expert_parallel: bool = False
    eplb: bool = False
    micro_batches: bool = False
    lora: bool = False
    speculative: bool = False
    sleep_mode: bool = False
    weight_offload: bool = False
    elastic: bool = False
    second_runner: bool = False


def check_server(facts: ServerFacts) -> None:
    """Refuse what is known to be impossible before anything is loaded.

    Raises
    ------
    NotMoEError
        The model is dense.
    UnsupportedEngineError
        The platform has no backend of ours.
    UnsupportedOptionError
        An option of vLLM excludes Expertier.
    """
    for refused, error in _findings(facts):
        if refused:
            raise error


def _findings(facts: ServerFacts) -> list[tuple[bool, ExpertierError]]:
    plain = "Start without it, or without Expertier."
    option = UnsupportedOptionError
    return [
        (
            not facts.experts,
            NotMoEError(
                f"{facts.model} has no routed experts: there is nothing to offload.", "Start without Expertier."
            ),
        ),
        (
            facts.platform not in ("cpu", "cuda"),
            UnsupportedEngineError(
                f"Expertier does not manage experts on {facts.platform}, only on processors and CUDA devices.",
                "Start without Expertier; vLLM's own --cpu-offload-gb offloads whole layers.",
            ),
        ),
        (facts.eplb, option("--enable-eplb moves experts between ranks, and so does Expertier.", plain)),
        (
            facts.expert_parallel,
            option(
                "--enable-expert-parallel is not supported: Expertier manages every expert of a worker's shard.",
                "Use --tensor-parallel-size, or start without Expertier.",
            ),
        ),
        (
            facts.data_parallel > 1,
            option(
                "--data-parallel-size above 1 is not supported: its ranks would share one expert layer.",
                "Start several servers.",
            ),
        ),
        (facts.context_parallel > 1, option("Context parallelism is not supported.", plain)),
        (facts.micro_batches, option("--enable-dbo runs two batches through a layer at once.", plain)),
        (
            facts.virtual and facts.tensor_parallel > 1,
            option(
                f"Virtual experts are not possible with --tensor-parallel-size {facts.tensor_parallel}: experts come "
                "and go in each worker on its own, and each would choose others.",
                "Use one worker, or leave out virtual_bias and quality_budget.",
            ),
        ),
        (
            facts.second_runner,
            option(
                "vLLM's model runner V2 does not tell Expertier what a step computes.",
                "Set VLLM_USE_V2_MODEL_RUNNER=0.",
            ),
        ),
        (facts.elastic, option("Elastic expert parallelism is not supported.", plain)),
        (facts.lora, option("--enable-lora is not supported: its kernels need all experts at once.", plain)),
        (
            facts.speculative,
            option("Speculative decoding is not supported: drafts and verification are steps of another kind.", plain),
        ),
        (facts.sleep_mode, option("--enable-sleep-mode would save and restore memory that Expertier moves.", plain)),
        (
            facts.weight_offload,
            option(
                "vLLM's own weight offloading is on (--cpu-offload-gb, --offload-group-size).",
                "Leave it to Expertier, or start without Expertier.",
            ),
        ),
        (
            facts.load_format not in LOAD_FORMATS,
            option(
                f"--load-format {facts.load_format} brings experts into memory, or has none.",
                f"Use one of: {', '.join(sorted(LOAD_FORMATS))}, with safetensors files.",
            ),
        ),
        (
            facts.load_strategy not in LOAD_STRATEGIES,
            option(
                f"--safetensors-load-strategy {facts.load_strategy} reads all experts into memory.",
                "Leave it at lazy.",
            ),
        ),
        (
            facts.multithread_load,
            option("enable_multithread_load is not supported.", "Remove it from --model-loader-extra-config."),
        ),
    ]


def monolithic_backend(name: str) -> UnsupportedOptionError:
    """The kernels of a layer route by themselves: nobody learns which experts a step needs before they compute."""
    return UnsupportedOptionError(
        f"The MoE backend {name} is monolithic: it routes inside its kernel, so experts cannot be loaded in between.",
        "Choose a modular one with --moe-backend, or start without Expertier.",
    )


def whole_graphs(mode: str) -> UnsupportedOptionError:
    """CUDA graphs repeat whole steps: nobody is asked which experts a step needs."""
    return UnsupportedOptionError(
        f"CUDA graphs of whole steps (cudagraph_mode {mode}) cannot load experts while they are replayed.",
        "Use -cc.cudagraph_mode=PIECEWISE (and -cc.pass_config.fuse_attn_quant=false), or --enforce-eager.",
    )


def other_graphs(setting: str, remedy: str) -> UnsupportedOptionError:
    """CUDA graphs are split in a way that was not verified."""
    return UnsupportedOptionError(
        f"{setting} splits CUDA graphs in a way that was not verified with experts that come and go.",
        f"{remedy}, or use --enforce-eager.",
    )


def foreign_experts(owner: str) -> UnsupportedEngineError:
    """Another plugin registered its own class for the expert layer."""
    return UnsupportedEngineError(
        f"Another plugin has already replaced vLLM's RoutedExperts with {owner}.",
        "Name the plugins you want in VLLM_PLUGINS, and only one of the two.",
    )


def unmanaged_experts(kind: str, layers: int) -> UnsupportedModelError:
    """A model brought expert layers of its own."""
    return UnsupportedModelError(
        f"{layers} expert layers of this model are of the kind {kind}, which Expertier does not manage.",
        "Start without Expertier.",
    )


def unverified_quantisation(method: str) -> UnsupportedModelError:
    """Experts are quantised by a method that was not verified."""
    return UnsupportedModelError(
        f"Experts quantised with {method} are not supported in vLLM.",
        "Use a checkpoint in bf16, fp16, fp32, fp8 (blocks of 128), int8, int4 or MXFP4, or start without Expertier.",
    )


def unverified_kernel(kernel: str, on_device: str) -> UnsupportedModelError:
    """Experts are computed by a kernel of which it is not known where it looks for them."""
    reason = _KERNELS.get(kernel, "where that looks for them is not known")
    return UnsupportedModelError(
        f"vLLM computes these experts with {kernel}, and {reason}.",
        f"On CUDA {on_device}, or start without Expertier.",
    )


_MARLIN: Final = "that divides its sums by an expert's place among those of a step, so that it would round by slot"
_KERNELS: Final = {"MarlinExperts": _MARLIN, "BatchedMarlinExperts": _MARLIN}
"""What was read of kernels that are refused. Upstream: ``init_slice`` in moe/marlin_moe_wna16/marlin_template.h."""


def own_tensors(kernel: str, names: Sequence[str]) -> UnsupportedModelError:
    """A kernel copied or rearranged what belongs to experts when it was made."""
    return UnsupportedModelError(
        f"vLLM computes these experts with {kernel}, which keeps copies of its own ({', '.join(names)}) that would not "
        "change with the experts.",
        "Choose another kernel with --moe-backend (on CUDA triton), or start without Expertier.",
    )


def scale_of_a_call(kernel: str) -> UnsupportedModelError:
    """What a kernel makes of one token depends on which others it is given, padding among them."""
    return UnsupportedModelError(
        f"With {kernel} these experts share one scale among all tokens of a call, and in slots a call may have others.",
        "Use a checkpoint with scales of inputs that are static, by token or by block, or start without Expertier.",
    )


def not_on_storage(name: str) -> UnsupportedModelError:
    """A tensor that vLLM made in memory instead of mapping it from a file."""
    return UnsupportedModelError(
        f"The expert weights {name} are not in a safetensors file but were made in memory while loading.",
        "Convert the checkpoint to safetensors, or start without Expertier.",
    )


def unknown_router(kind: str) -> UnsupportedModelError:
    """A router whose weights cannot be had for experts that it did not choose itself."""
    return UnsupportedModelError(
        f"Virtual experts do not know this model's router ({kind}).",
        "Leave out the virtual_ options; known are softmax and sigmoid scores, grouped or not, also with a correction.",
    )
