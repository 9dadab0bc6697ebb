"""llama.cpp as the command line sees it. Importing this module imports no engine."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from expertier.catalog.gguf import read_layout
from expertier.catalog.types import Catalog
from expertier.cli.engines import EngineSettings, Finding, Session, StockVariant, Workloads
from expertier.comparison.schedulers import TrafficServer
from expertier.config import OffloadOptions
from expertier.errors import ExpertierError, RequestError, UnsupportedEngineError, UnsupportedOptionError
from expertier.residency import pages
from expertier.telemetry import Stats

if TYPE_CHECKING:
    from expertier_llamacpp.llama import Llama

DISTRIBUTION = "llama-cpp-python"
_CONTEXT = 4096

# Upstream: ggml_repack_get_optimal_repack_type (ggml/src/ggml-cpu/repack.cpp). On a given CPU some of them are not
# repacked after all; then both kinds of kernels are the same and a comparison runs one arm more than it had to.
_REPACKABLE = frozenset({"Q1_0", "Q2_K", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4"})


def can_repack(model: Path) -> bool:
    """Whether stock llama.cpp may hold any weight of the model in a repacked form."""
    return any(
        tensor.type_name in _REPACKABLE and len(tensor.shape) > 1
        for layout in read_layout(model)
        for tensor in layout.tensors
    )


class LlamaCppSession:
    """A loaded :class:`expertier_llamacpp.Llama`."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama

    def mode_line(self) -> str:
        return self._llama.mode_line()

    def generate(
        self, prompt: str, *, chat: bool, max_tokens: int, temperature: float, seed: int | None
    ) -> Iterator[str]:
        llama: Any = self._llama  # typed as if it could return both a stream and a whole answer
        options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stream": True}
        if chat and "tokenizer.chat_template" not in llama.metadata:
            raise UnsupportedOptionError(
                "This model has no chat template.", "Leave out --chat, or use a model tuned for chat."
            )
        used = len(llama.tokenize(prompt.encode(), special=chat))
        if not (used or chat):
            raise RequestError("The prompt is empty, and the model adds no token to begin with.", "Give some text.")
        if used >= llama.n_ctx():
            raise UnsupportedOptionError(
                f"The prompt has {used} tokens, the context {llama.n_ctx()}.", "Raise --n-ctx."
            )
        if chat:
            messages = [{"role": "user", "content": prompt}]
            for chunk in llama.create_chat_completion(messages, **options):
                yield chunk["choices"][0]["delta"].get("content") or ""
        else:
            for chunk in llama.create_completion(prompt, **options):
                yield chunk["choices"][0]["text"]

    def tokenize(self, text: str) -> list[int]:
        """Turn text into token ids, nothing added."""
        tokens: list[int] = self._llama.tokenize(text.encode(), add_bos=False)
        return tokens

    def read(self, tokens: Sequence[int], *, fresh: bool) -> None:
        """Compute one step over given tokens, whatever the model would have said; `fresh` forgets those before."""
        if fresh:
            self._llama.reset()  # type: ignore[no-untyped-call]
        self._llama.eval(tokens)

    def logits(self) -> NDArray[np.float32]:
        """Return logits after the last token read, shape ``(vocabulary,)``; valid until the next step."""
        from llama_cpp import llama_get_logits

        row: NDArray[np.float32] = np.ctypeslib.as_array(llama_get_logits(self._llama.ctx), (self._llama.n_vocab(),))
        return row

    def substituted(self) -> NDArray[np.float64]:
        """Gate mass that stand-ins took over all decoded tokens so far, shape ``(layers,)``."""
        virtual = self._llama.virtual
        return np.zeros(len(self._llama.catalog.layers)) if virtual is None else virtual.mass

    def resize(self, budget: int) -> None:
        """Change the memory budget; bytes as the model's file has them."""
        manager, catalog = self._llama.offload, self._llama.catalog
        # Slots are a little larger than what they hold: a share of one is the same share of the other.
        manager.resize(round(budget / catalog.total_expert_bytes * manager.stats().total_bytes))

    def set_virtual(self, bias: float, protect: int) -> None:
        """Change what residency is worth (0 is exact) and how many first experts are never replaced."""
        virtual = self._llama.virtual
        if virtual is None:
            raise UnsupportedOptionError(
                "The model was loaded without stand-ins.", "Give a virtual bias, which may be 0."
            )
        virtual.bias = bias
        virtual.settings = replace(virtual.settings, protect=protect)

    def follow(self, tokens: Sequence[int], *, prompt: int) -> Iterator[None]:
        """Compute given tokens: `prompt` of them at once, then one after the other; yields after every step."""
        self.read(tokens[:prompt], fresh=True)
        yield
        for token in tokens[prompt:]:
            self.read([token], fresh=False)
            yield

    def note(self, values: Mapping[str, Any]) -> None:
        """Leave measurements in the trace that is being recorded."""
        if self._llama.recorder is not None:
            self._llama.recorder.note(values)

    def stats(self) -> Stats:
        return self._llama.offload.stats()

    def close(self) -> None:
        self._llama.close()


class LlamaCppAdapter:
    """Fulfils :class:`expertier.cli.engines.Adapter`."""

    name = "llamacpp"
    engine = "llama.cpp"
    install = "Install it: pip install 'expertier[llamacpp]'."
    workloads = Workloads()

    def versions(self) -> dict[str, str]:
        try:
            return {DISTRIBUTION: importlib.metadata.version(DISTRIBUTION)}
        except importlib.metadata.PackageNotFoundError:
            return {}

    def findings(self, catalog: Catalog | None) -> Sequence[Finding]:
        try:
            from expertier_llamacpp import ggml

            ggml.self_check()
        except ExpertierError as error:
            return [Finding(topic=self.engine, status="problem", text=error.problem, remedy=error.remedy)]
        except (ImportError, OSError, RuntimeError) as error:
            return [
                Finding(
                    topic=self.engine,
                    status="problem",
                    text=f"{DISTRIBUTION} cannot be imported: {error}.",
                    remedy=f"Build it again: pip install --force-reinstall --no-cache-dir {DISTRIBUTION}.",
                )
            ]
        found = [
            Finding(topic=self.engine, status="ok", text="the structures of the library are those Expertier mirrors"),
            _page_moves(),
        ]
        if catalog is not None and catalog.format != "gguf":
            found.append(
                Finding(
                    topic=self.engine,
                    status="info",  # another engine may
                    text=f"llama.cpp does not load {catalog.format} files.",
                    remedy="Convert the model to GGUF.",
                )
            )
        return found

    def stock_variants(self, catalog: Catalog, *, limited: bool) -> Sequence[StockVariant]:
        plain = StockVariant(key="stock", label="stock", settings={"repack": False})
        if not can_repack(catalog.path):
            return [StockVariant(key="stock", label="stock", settings={})]
        if limited:
            repacked = StockVariant(key="stock-repack", label="stock, repacked weights", settings={"repack": True})
            return [plain, repacked]
        return [
            StockVariant(key="stock", label="stock", settings={"repack": True}),
            StockVariant(key="stock-plain", label="stock, plain kernels", settings={"repack": False}),
        ]

    def worker_command(self) -> Sequence[str]:
        return [sys.executable, "-m", "expertier_llamacpp.worker"]

    def open(self, model: Path, options: OffloadOptions, settings: EngineSettings) -> Session:
        try:
            from expertier_llamacpp.llama import Llama
        except (ImportError, OSError, RuntimeError) as error:
            raise UnsupportedEngineError(
                f"{DISTRIBUTION} cannot be imported: {error}.", "See what `expertier doctor` says."
            ) from error
        trained = read_layout(model)[0].metadata
        longest = trained.get(f"{trained.get('general.architecture')}.context_length")
        n_ctx = settings.n_ctx or min(_CONTEXT, longest if isinstance(longest, int) else _CONTEXT)
        own = {f"expert_{name}": value for name, value in asdict(options).items()}
        return LlamaCppSession(
            Llama(
                str(model),
                n_ctx=n_ctx,
                n_batch=max(512, settings.n_ubatch),
                n_ubatch=settings.n_ubatch,
                n_threads=settings.threads,
                n_threads_batch=settings.threads,
                verbose=False,
                **own,
            )
        )

    def open_traffic(
        self, model: Path, options: OffloadOptions, settings: EngineSettings, *, batch: int, context: int
    ) -> TrafficServer:
        from expertier_llamacpp.traffic import BatchTraffic

        return BatchTraffic(
            model, options, batch=batch, context=context, step_tokens=settings.n_ubatch, threads=settings.threads
        )


def _page_moves() -> Finding:
    """Try what moves an expert's memory from one window to another."""
    size = pages.HUGE_PAGE
    base = pages.reserve(2 * size)
    try:
        pages.back(base, size, huge=False)
        pages.view(base, 1)[0] = 7
        moved = pages.move(base, base + size, size) and pages.view(base + size, 1)[0] == 7
    finally:
        pages.unmap(base, 2 * size)
    if moved:
        return Finding(topic="memory moves", status="ok", text="mremap(MREMAP_DONTUNMAP) works: evictions cost no copy")
    return Finding(
        topic="memory moves",
        status="warning",
        text="mremap(MREMAP_DONTUNMAP) does not work here: every eviction gives pages back and faults new ones in.",
        remedy="Use Linux 5.7 or newer.",
    )


ADAPTER = LlamaCppAdapter()
