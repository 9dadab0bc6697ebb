"""vLLM 0.32: CUDA graphs that end before a layer's experts and go on behind them. Needs no device to be imported."""

from __future__ import annotations

import logging
from typing import Any, Final

from expertier_vllm import refusals

logger = logging.getLogger("vllm.expertier")

OPERATORS: Final = ("expertier::moe", "expertier::moe_shared")
"""What :mod:`expertier_vllm.compat.v032.opaque` registers in the worker, by the names that vLLM splits graphs at."""


def split_at_experts(config: Any) -> None:
    """Have nothing captured in which experts come and go.

    A CUDA graph repeats what was given to the device when it was captured, and asks nobody which experts a step needs.
    In ``PIECEWISE`` mode only what lies between splitting operators is captured, and ours become such.

    Upstream: ``CompilationConfig.splitting_ops`` and ``cudagraph_mode``, both complete when ``VllmConfig`` is. What
    vLLM chooses unless told otherwise, ``FULL_AND_PIECEWISE``, becomes ``PIECEWISE``; adding an operator of ours to
    ``vllm::moe_forward`` instead would not do, because that returns a new tensor and captured pieces read from fixed
    addresses.

    Raises
    ------
    UnsupportedOptionError
        Whole steps are to be captured, or graphs are to be split in another way.
    """
    from vllm import envs
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = config.compilation_config
    if envs.VLLM_USE_BREAKABLE_CUDAGRAPH:
        raise refusals.other_graphs("VLLM_USE_BREAKABLE_CUDAGRAPH=1", "Leave it out of the environment")
    if compilation.cudagraph_mode in (CUDAGraphMode.FULL, CUDAGraphMode.FULL_DECODE_ONLY):
        raise refusals.whole_graphs(compilation.cudagraph_mode.name)
    if compilation.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE:
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
        logger.info("expertier: CUDA graphs of whole steps are off (cudagraph_mode PIECEWISE): experts come and go")
    if compilation.mode != CompilationMode.VLLM_COMPILE:
        return  # then vLLM captures nothing but whole steps
    if compilation.use_inductor_graph_partition:
        raise refusals.other_graphs("use_inductor_graph_partition", "Leave it off")
    compilation.splitting_ops += [name for name in OPERATORS if name not in compilation.splitting_ops]
