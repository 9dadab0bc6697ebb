"""How much memory the experts of one worker may hold: while vLLM starts, once it serves, and when somebody turns it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Final

from expertier.budget import format_bytes, parse_budget
from expertier.config import OffloadOptions
from expertier.errors import BudgetError
from expertier.manager import OffloadManager
from expertier.planning.governor import GovernorSettings, PressureGovernor
from expertier.planning.memory import MemoryLimit, memory_left

MEETINGS: Final = 2
"""Times that the workers of a machine wait for one another before they serve."""


class WorkerBudget:
    """The budget of one worker.

    Parameters
    ----------
    options : OffloadOptions
        Budget, margin and governor as the user set them.
    smallest, largest : int
        Bytes that the experts of one token and all experts need.
    one_layer : int
        Bytes of a layer's experts: what warm-ups get while the KV cache waits for its memory, with budget "auto".
    always : int
        Bytes of what stays resident of all experts, their scales and biases; users count them, too.
    sharers : int
        Workers on this machine, which share its memory.
    on_host : bool
        Whether what the budget is of is the machine's memory, and not a device's, which was allocated at once.

    Attributes
    ----------
    largest, always : int
        As given.
    stepping : threading.Lock
        Held during a forward pass: the governor changes the budget between two of them, because how a pass is divided
        depends on it.

    Raises
    ------
    BudgetError
        The budget cannot hold what stays resident and the experts of one token.
    """

    def __init__(
        self,
        options: OffloadOptions,
        *,
        smallest: int,
        largest: int,
        one_layer: int,
        always: int = 0,
        sharers: int = 1,
        on_host: bool = True,
    ) -> None:
        self._options = options
        self._smallest = smallest
        self._one_layer = one_layer
        self._sharers = sharers
        self._on_host = on_host
        self._pressure: PressureGovernor | None = None
        self._resize: Callable[[int], None]
        self._manager: OffloadManager
        self.largest = largest
        self.always = always
        self._asked = self._without_resident(parse_budget(options.budget, largest + always))
        self.stepping = threading.Lock()

    @property
    def automatic(self) -> bool:
        """Whether the budget is to be what is left."""
        return self._asked is None

    @property
    def first(self) -> int:
        """What the manager begins with."""
        return min(self._asked or self._one_layer, self.largest)

    @property
    def total(self) -> int:
        """Bytes of the budget as users count it: with what stays resident of all experts."""
        return self._manager.budget + self.always

    @property
    def reserved(self) -> int:
        """Bytes of the budget that experts do not hold yet."""
        return self._manager.budget - self._held()

    def attach(self, manager: OffloadManager, resize: Callable[[int], None] | None = None) -> None:
        """Go on with the manager that was made with :attr:`first`; `resize` is how its budget changes."""
        self._manager = manager
        self._resize = resize or manager.resize

    def make_room(self) -> None:
        """Give back what earlier steps have loaded: with budget "auto" whatever comes now has the first choice."""
        self._resize(self._smallest)

    def prepare_warm_up(self, promised: int) -> None:
        """Allow steps that are only tried out a layer's experts, or as much of it as there is memory for.

        Parameters
        ----------
        promised : int
            As for :meth:`settle`.

        Raises
        ------
        BudgetError
            Not even one token's experts fit.
        """
        self._take_what_is_left(memory_left(), promised, self._one_layer)

    def settle(self, promised: int = 0, meet: Callable[[], None] = lambda: None) -> None:
        """Take the final budget, now that everything else has its memory, and fill it.

        Parameters
        ----------
        promised : int
            Bytes that others have reserved and not touched yet.
        meet : callable
            Returns when all workers of this machine have called it: nobody may look at what is left before the others
            have all but their experts, nor fill before the others have looked. Called :data:`MEETINGS` times, also
            where the budget is refused.

        Raises
        ------
        BudgetError
            The machine cannot hold the budget; or, for "auto", not even one token's experts.
        """
        meet()
        limit = memory_left()
        try:
            self._decide(limit, promised)
        finally:
            meet()  # the others wait, whatever became of this one
        self._manager.warm_up()
        self._manager.wait_until_filled()  # stock is ready when all experts are in memory, too
        self._watch_pressure(limit)

    def _decide(self, limit: MemoryLimit, promised: int) -> None:
        if self._asked is None:
            self._take_what_is_left(limit, promised, self.largest)
        elif self._on_host and self._manager.budget > (left := self._left(limit, promised)):
            raise BudgetError(
                f"A budget of {format_bytes(self._manager.budget)} exceeds what {limit.source} has left for experts "
                f"({format_bytes(max(0, left))}).",
                "Lower the budget, or use 'auto' to take what there is.",
            )

    def resize(self, budget: str | int) -> int:
        """Change the budget of a running server; returns the new one in bytes.

        Raises
        ------
        BudgetError
            It is not an amount, too small, or 'auto' on a device; the old one stays in force.
        """
        asked = self._without_resident(parse_budget(budget, self.largest + self.always))
        if asked is None and not self._on_host:
            raise BudgetError(
                "A budget of 'auto' is not possible for experts on a device, whose rest is the KV cache's.",
                "Say how many bytes, or how many percent of all experts.",
            )
        if asked is None:
            limit = memory_left()
            asked = max(self._smallest, self._left(limit, 0) - self._margin(limit.left))
        self._resize(min(asked, self.largest))
        if self._pressure is not None:
            self._pressure.ask(self._manager.budget)
        return self.total

    def close(self) -> None:
        """Stop the governor."""
        if self._pressure is not None:
            self._pressure.close()

    def _held(self) -> int:
        return self._manager.stats().resident_bytes

    def _without_resident(self, budget: int | None) -> int | None:
        """What a budget leaves to experts that come and go, after what stays resident of all of them."""
        if budget is None or not self.always:
            return budget
        if budget - self.always < self._smallest:
            raise BudgetError(
                f"A budget of {format_bytes(budget)} cannot hold what stays resident of all experts, their scales and "
                f"biases ({format_bytes(self.always)}), and the experts of one token "
                f"({format_bytes(self._smallest)}).",
                f"Give at least {format_bytes(self.always + self._smallest)}.",
            )
        return budget - self.always

    def _left(self, limit: MemoryLimit, promised: int) -> int:
        """Bytes that experts may hold in this worker."""
        return self._held() + (limit.left - promised) // self._sharers

    def _take_what_is_left(self, limit: MemoryLimit, promised: int, most: int) -> None:
        amount = min(self._left(limit, promised) - self._margin(limit.left), most)
        if amount < self._smallest:
            raise BudgetError(
                f"{limit.source} leaves {format_bytes(max(0, amount))} for experts, one token needs "
                f"{format_bytes(self._smallest)}.",
                "Raise the memory limit, or give the KV cache less (VLLM_CPU_KVCACHE_SPACE).",
            )
        self._resize(amount)

    def _margin(self, left: int) -> int:
        margin = self._options.margin
        if margin == "auto":
            return (64 << 20) + left // 50
        return parse_budget(margin, left) or 0

    def _watch_pressure(self, limit: MemoryLimit) -> None:
        """Start the governor where it was asked for."""
        if self._options.governor == "off":
            return
        settings = GovernorSettings.usual(
            smallest=self._smallest,
            largest=self._manager.budget,
            limit=limit.limit,
            margin=self._margin(limit.left) if self.automatic else None,
        )
        resize, stepping, manager = self._resize, self.stepping, self._manager

        def between_steps(budget: int) -> None:
            with stepping:
                resize(budget)

        self._pressure = PressureGovernor(settings, resize=between_steps, held=lambda: manager.stats().resident_bytes)
        self._pressure.start()
        weakref.finalize(self, self._pressure.close)
