"""vLLM 0.32: the worker of the CPU build. Imported only where ``ParallelConfig.worker_cls`` names it."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.v1.worker.cpu_worker import CPUWorker

from expertier.planning.memory import process_memory, reset_peak
from expertier_vllm.compat.v032.worker import ManagedWorker


class ExpertierWorker(ManagedWorker, CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker with a bounded set of experts."""

    def determine_available_memory(self) -> int:
        """Leave room for the experts that are not resident yet; an explicit size of the KV cache is left alone."""
        available = int(super().determine_available_memory())
        if self.cache_config.kv_cache_memory_bytes is None:
            available -= self.expertier.budget.reserved
        return available

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        with self._before_serving():
            if self.expertier.budget.automatic:
                self.expertier.budget.make_room()
            before = process_memory().untouched
            super().initialize_from_config(kv_cache_config)
            promised = max(0, process_memory().untouched - before)
            if self.expertier.budget.automatic:
                self.expertier.budget.prepare_warm_up(promised)
                promised += self._step_memory()
        self._serve(promised)

    def _step_memory(self) -> int:
        """Bytes that the longest possible step takes beyond what is resident now.

        Upstream: ``GPUModelRunner.profile_run``, a step of ``max_num_batched_tokens`` and one of sampling, whose output
        is thrown away. The CPU worker runs it only where it compiles.
        """
        reset_peak()
        held = self.expertier.manager.stats().resident_bytes
        with set_current_vllm_config(self.vllm_config), torch.inference_mode():
            self.model_runner.profile_run()
        memory = process_memory()
        grown = self.expertier.manager.stats().resident_bytes - held
        return max(0, memory.peak - memory.resident - max(0, grown))
