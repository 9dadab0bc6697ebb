"""Budget "auto": experts get what a step does not need, and give it back when a longer prompt comes.

llama.cpp allocates its compute buffer for ``n_ubatch`` tokens. A prompt touches it in proportion to its length,
decoding one token hardly at all; the pages once touched stay resident for good. Reserving the whole buffer for ever
would cost a sixth of the experts at the sizes measured, so the governor shrinks the expert budget before a long step,
and after it gives the pages of the compute buffer back to the system and the room to the experts.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from expertier.budget import format_bytes
from expertier.catalog.types import Catalog
from expertier.errors import BudgetError
from expertier.manager import OffloadManager
from expertier.planning.memory import memory_left
from expertier.residency import pages
from expertier.residency.pages import PAGE
from expertier_llamacpp import ggml

_FIXED = 4 << 20
# ggml converts the input of a multiplication to the weights' companion type in a work buffer it keeps: at most two
# bytes a value (F16, BF16), a little over one for quantised weights. Upstream: ggml_graph_plan, MUL_MAT_ID.
_WORK_BYTES_PER_VALUE = 2.25


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory a step takes beside experts, weights and KV.

    Attributes
    ----------
    compute_per_token, work_per_token : float
        Bytes of llama.cpp's compute buffer (can be given back afterwards) and of its work buffer (cannot).
    n_ubatch : int
        Most tokens in one pass of the graph.
    """

    compute_per_token: float
    work_per_token: float
    n_ubatch: int

    @classmethod
    def of(cls, catalog: Catalog, *, promised: int, n_ubatch: int) -> StepMemory:
        """Derive it from the model and from what llama.cpp allocated but did not touch yet."""
        widest = max(
            layer.top_k * part.shape[0] for layer in catalog.layers for part in layer.parts if part.role == "down"
        )
        return cls(
            compute_per_token=promised / n_ubatch, work_per_token=widest * _WORK_BYTES_PER_VALUE, n_ubatch=n_ubatch
        )

    def compute(self, tokens: int) -> int:
        """Bytes of the compute buffer that a step of `tokens` tokens touches."""
        return _FIXED + int(min(tokens, self.n_ubatch) * self.compute_per_token)

    def work(self, tokens: int) -> int:
        """Bytes of the work buffer that a step of `tokens` tokens needs."""
        return int(min(tokens, self.n_ubatch) * self.work_per_token)


class BudgetGovernor:
    """Moves memory between llama.cpp's buffers and the experts.

    Parameters
    ----------
    manager : OffloadManager
        Whose budget is governed.
    step : StepMemory
        What steps need.
    margin : int
        Bytes never used.
    smallest, largest : int
        Bounds of the expert budget: one token's experts, and all of them.
    resting : int
        Tokens of a step that is so common (one of every sequence) that its memory is never taken back.

    Raises
    ------
    BudgetError
        When not even one token's experts fit.
    """

    def __init__(
        self,
        manager: OffloadManager,
        step: StepMemory,
        *,
        margin: int,
        smallest: int,
        largest: int,
        resting: int = 1,
    ) -> None:
        self._manager = manager
        self._step = step
        self._margin = margin
        self._smallest = smallest
        self._largest = largest
        self._resting = min(resting, step.n_ubatch)
        self._tokens = self._resting  # the longest step since memory was last given back
        self._worked = 1  # the longest step ever
        self._most = largest  # what others allow: see cap()
        self._deciding = threading.Lock()  # or a step that ends meanwhile would undo what cap() has just done
        self._total = self._measure()
        self._apply(self._resting)

    def _measure(self) -> int:
        """Bytes that experts and the compute buffer may share from now on."""
        return self._manager.stats().resident_bytes + memory_left().left - self._margin

    def _apply(self, tokens: int) -> None:
        work = self._step.work(max(tokens, self._worked)) - self._step.work(self._worked)
        budget = min(self._total - self._step.compute(tokens) - work, self._largest)
        if budget < self._smallest:
            raise BudgetError(
                f"{memory_left().source} leaves {format_bytes(max(0, budget))} for experts in a step of {tokens} "
                f"tokens, one token needs {format_bytes(self._smallest)}.",
                "Raise the memory limit, or lower n_ctx, n_batch and n_ubatch.",
            )
        self._fits = budget
        budget = max(self._smallest, min(budget, self._most))
        if budget != self._manager.budget:
            self._manager.resize(budget)

    def cap(self, most: int) -> None:
        """Use no more than so many bytes from now on, though there may be room for more; called from any thread.

        Raises
        ------
        BudgetError
            The running step may need more, or one token does; nothing is changed.
        """
        with self._deciding:
            self._manager.resize(min(most, self._fits))
            self._most = most

    def before(self, tokens: int) -> None:
        """Make room for a step of `tokens` tokens."""
        tokens = min(tokens, self._step.n_ubatch)
        if tokens > self._tokens:
            with self._deciding:  # no lease is held here, so whoever waits for one inside is not waiting for us
                self._apply(tokens)
            self._tokens = tokens

    def after(self, compute_node: int) -> None:
        """Take the memory of a long step back for experts.

        Parameters
        ----------
        compute_node : int
            Address of a tensor in the compute buffer, 0 when the step ran no MoE layer.
        """
        if self._tokens <= self._resting or not compute_node:
            return
        release_compute_buffer(compute_node)
        self._worked = max(self._worked, self._tokens)
        self._tokens = self._resting
        with self._deciding:
            # Others may have taken memory meanwhile: shrink as far as possible, the finished step stays good.
            self._total = max(self._measure(), self._smallest + self._step.compute(self._resting))
            self._apply(self._resting)


def release_compute_buffer(node: int) -> None:
    """Give the pages of the buffer that holds the tensor at `node` back to the system.

    Between two calls of ``llama_decode`` nothing in the compute buffer is alive: inputs are written at the start of
    every call and outputs have been copied out at its end (upstream: ``llama_context::process_ubatch`` and
    ``llama_context::decode``).
    """
    buffer = ggml.Tensor.from_address(node).buffer
    if not buffer:
        return
    start = ggml.base().ggml_backend_buffer_get_base(buffer)
    end = start + ggml.base().ggml_backend_buffer_get_size(buffer)
    first, last = -(-start // PAGE) * PAGE, end // PAGE * PAGE
    if first < last:
        pages.discard(first, last - first)
