"""vLLM 0.32: the worker of a CUDA device. Imported only where ``ParallelConfig.worker_cls`` names it."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from expertier_vllm.compat.v032 import triton
from expertier_vllm.compat.v032.worker import ManagedWorker


class ExpertierCudaWorker(ManagedWorker, Worker):  # type: ignore[misc]
    """vLLM's GPU worker with a bounded set of experts in slots on the device.

    Slots are allocated while the model loads. So ``determine_available_memory``, which is stock's, counts them with the
    other weights, and the KV cache gets what they leave of ``gpu_memory_utilization``.
    """

    def load_model(self, **arguments: Any) -> None:
        super().load_model(**arguments)
        triton.install(self.get_model())

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        with self._before_serving():
            super().initialize_from_config(kv_cache_config)
        self._serve(0)
