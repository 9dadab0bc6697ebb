"""Signal handlers wait while llama.cpp calls into Python.

Python runs a handler at the next function entry, and llama.cpp's next function entry is one of our callbacks. What a
handler raises there (``KeyboardInterrupt``) never reaches the callback's own code: ctypes prints it and hands llama.cpp
a made-up answer. So handlers that may raise are put off until the C call has returned.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Final

# Those whose handlers programs let raise: interruption, termination, time limits. A handler of another signal that
# raises is noticed where it is lost in a callback, but may cut our own bookkeeping in half.
_NUMBERS: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


class HeldSignals:
    """Context manager that holds signals back and delivers them at its end.

    Attributes
    ----------
    interrupted : bool
        Whether one has arrived whose handler will raise ``KeyboardInterrupt``: what is being done can be abandoned.

    Notes
    -----
    A signal that comes a second time is delivered at once, so that a hanging disk cannot make a program unstoppable.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._arrived: list[int] = []
        self.interrupted = False

    def __enter__(self) -> None:
        self._arrived.clear()
        self.interrupted = False  # in every thread: one that was interrupted earlier may have been another
        if threading.current_thread() is not threading.main_thread():
            return  # Python runs handlers in the main thread only
        try:
            for number in _NUMBERS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        except BaseException:  # by the handler of a signal that is not held yet
            self._restore()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._handlers:
            return
        handlers = dict(self._handlers)
        self._restore()
        for number in self._arrived:
            handlers[number](number, None)

    def _restore(self) -> None:
        while self._handlers:
            number, handler = next(iter(self._handlers.items()))
            try:
                signal.signal(number, handler)
                del self._handlers[number]
            except BaseException:  # by a handler that was just put back
                self._handlers.pop(number, None)
                self._restore()
                raise

    def _note(self, number: int, frame: FrameType | None) -> None:
        handler = self._handlers[number]
        if number in self._arrived:
            handler(number, frame)
        else:
            self._arrived.append(number)
            self.interrupted |= handler is signal.default_int_handler
