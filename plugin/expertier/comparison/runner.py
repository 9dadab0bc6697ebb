"""Runs the arms: interleaved, each in a process of its own, from a cold page cache, inside its memory limit."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from expertier.comparison.limits import Confinement, Usage
from expertier.comparison.page_cache import Readahead, drop_caches
from expertier.comparison.quality import LogitsFolder
from expertier.comparison.records import ArmRecord, Figures, Run, RunStatus, from_plain

if TYPE_CHECKING:
    from expertier.cli.engines import Adapter

_POLL_SECONDS = 0.1
# What decides about memory and stand-ins makes no difference to files that are made once per model.
_NOT_PREPARED = {"budget", "quality_budget", "virtual_bias", "virtual_protect", "virtual_prefill", "virtual_hard"}
_OPTION_PREFIX = "EXPERTIER_"
_REFUSAL = re.compile(r"\bexpertier\.errors\.(\w+): (.+)")

OnStart = Callable[[ArmRecord, int], None]
OnDone = Callable[[ArmRecord, Run], None]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every run does; see the worker of the engine for the fields of its job."""

    model: Path
    files: tuple[Path, ...]
    job: Mapping[str, Any]
    wait_policy: str
    timeout: float
    logits: LogitsFolder = field(default_factory=lambda: LogitsFolder(None))


class Runner:
    """Runs arms.

    Parameters
    ----------
    adapter : Adapter
        The engine.
    workload : Workload
        What to do.
    confinement : Confinement or None
        Makes control groups; ``None`` if none can be made (then peak memory stays unknown).
    readahead : Readahead
        Setting of the model's device.
    """

    def __init__(
        self, adapter: Adapter, workload: Workload, confinement: Confinement | None, readahead: Readahead
    ) -> None:
        self._adapter = adapter
        self._workload = workload
        self._confinement = confinement
        self._readahead = readahead

    def run_all(
        self,
        arms: Sequence[ArmRecord],
        repeats: int,
        on_start: OnStart,
        on_done: OnDone,
        on_repeat: Callable[[int], None],
    ) -> tuple[ArmRecord, ...]:
        """Run every arm `repeats` times.

        Parameters
        ----------
        arms : sequence of ArmRecord
            Those with status ``not run`` are left out.
        repeats : int
            How often. Each repeat begins with another arm, so that none always profits from its place.
        on_start, on_done, on_repeat : callable
            Told about progress (the repeat -1 is preparation); ``on_done`` gets the arm with the new run in it.

        Returns
        -------
        tuple of ArmRecord
            In the given order.

        Notes
        -----
        An arm that was killed, refused, or ran too long is not repeated: it would end in the same way.
        """
        records = {index: arm for index, arm in enumerate(arms)}
        runnable = [index for index, arm in records.items() if arm.status != "not run"]
        with _termination_unwinds():
            self._prepare_all([records[index] for index in runnable], on_start)
            for repeat in range(repeats):
                on_repeat(repeat)
                # Backwards every second time: what an arm leaves behind (a disk out of burst credit, a hot processor)
                # must not always meet the same successor.
                turn = repeat // 2 % max(1, len(runnable))
                order = runnable[turn:] + runnable[:turn]
                for index in reversed(order) if repeat % 2 else order:
                    arm = records[index]
                    if arm.status != "ok":
                        continue
                    on_start(arm, repeat)
                    run = self.run(arm, repeat)
                    arm = replace(arm, runs=(*arm.runs, run))
                    if run.status != "ok":
                        arm = replace(arm, status=run.status, reason=run.reason)
                    records[index] = arm
                    on_done(arm, run)
        return tuple(records.values())

    def _prepare_all(self, arms: Sequence[ArmRecord], on_start: OnStart) -> None:
        """Let every kind of Expertier arm make, outside limits and measurements, what is made once per model.

        If that fails, the arm itself will fail for the same reason and say so.
        """
        prepared: list[dict[str, Any]] = []
        for arm in arms:
            settings = {name: value for name, value in arm.settings.items() if name not in _NOT_PREPARED}
            if arm.ours and settings not in prepared:
                prepared.append(settings)
                on_start(arm, -1)
                unlimited = replace(arm, limit_bytes=None, settings={**settings, "budget": "auto"})
                self._process(unlimited, {"prepare": True})

    def run(self, arm: ArmRecord, repeat: int) -> Run:
        """Run one arm once."""
        cached = drop_caches(self._workload.files)
        with self._readahead.at(arm.readahead_kb):
            started = time.perf_counter()
            code, output, errors, usage = self._process(arm, self._workload.logits.job(arm, repeat))
            wall = time.perf_counter() - started
        status, reason, figures = _verdict(arm, code, output, errors, usage, self._workload.timeout)
        run = Run(
            repeat=repeat,
            status=status,
            reason=reason,
            wall_seconds=wall,
            peak_memory_bytes=usage.peak_bytes,
            oom_kills=usage.oom_kills,
            cached_before_bytes=cached,
            figures=figures,
        )
        self._workload.logits.done(arm, run)
        return run

    def _process(self, arm: ArmRecord, extra: Mapping[str, Any]) -> tuple[int | None, str, str, Usage]:
        """Exit code (``None``: it took too long), stdout, stderr, memory."""
        job = {
            **self._workload.job,
            **extra,
            "model": str(self._workload.model),
            "ours": arm.ours,
            "settings": {} if arm.ours else arm.settings,
            "options": arm.settings if arm.ours else {},
        }
        command = list(self._adapter.worker_command())
        group = self._confinement.open(arm.limit_bytes) if self._confinement is not None else None
        process: subprocess.Popen[bytes] | None = None
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            try:
                stdin.write(json.dumps(job).encode())
                stdin.seek(0)
                process = subprocess.Popen(
                    group.wrap(command) if group is not None else command,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    env=_environment(self._adapter, self._workload.wait_policy),
                    start_new_session=True,  # an interrupt from the terminal is ours to handle
                )
                code = self._wait(process, group.watch if group is not None else lambda pid: None)
                usage = group.usage() if group is not None else Usage(peak_bytes=None, oom_kills=0)
            finally:
                if process is not None:
                    _end(process)
                if group is not None:
                    group.close()
            stdout.seek(0)
            stderr.seek(0)
            return code, stdout.read().decode(errors="replace"), stderr.read().decode(errors="replace"), usage

    def _wait(self, process: subprocess.Popen[bytes], watch: Callable[[int], None]) -> int | None:
        deadline = time.monotonic() + self._workload.timeout
        while time.monotonic() < deadline:
            watch(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_SECONDS)
        return None


def _verdict(
    arm: ArmRecord, code: int | None, output: str, errors: str, usage: Usage, timeout: float
) -> tuple[RunStatus, str, Figures | None]:
    if code is None:
        return "timeout", f"it took longer than {timeout:g} s", None
    if code == 0:
        try:
            record = json.loads(output)
            if record["status"] == "refused":
                return "refused", str(record["reason"]), None
            return "ok", "", from_plain(Figures, record["figures"])
        except (KeyError, TypeError, ValueError) as error:
            return "failed", f"the worker's record cannot be read: {error}", None
    if usage.oom_kills or (code == -signal.SIGKILL and arm.limit_bytes is not None):
        return "killed", "by the kernel: the memory limit is too small for it", None
    named = _REFUSAL.findall(errors)
    if arm.ours and named:  # raised in a process below the worker, which can only print it
        return "refused", f"{named[-1][0]}: {named[-1][1]}", None
    lines = [line for line in errors.strip().splitlines() if line.strip()]
    reason = lines[-1].strip() if lines else "nothing was printed"
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return "failed", f"{how}: {reason}", None


def _environment(adapter: Adapter, wait_policy: str) -> dict[str, str]:
    # Options reach an arm in its job alone: a variable meant for the user's own runs must not change one arm.
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(_OPTION_PREFIX) or key == "EXPERTIER_CACHE"
    }
    roots = [
        str(Path(inspect.getfile(item)).resolve().parents[1]) for item in (type(adapter), sys.modules["expertier"])
    ]
    path = os.pathsep.join(dict.fromkeys([*roots, *kept.get("PYTHONPATH", "").split(os.pathsep)])).strip(os.pathsep)
    return {**kept, "PYTHONPATH": path, "OMP_WAIT_POLICY": wait_policy}


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind like an interrupt, so that system settings and groups are put back."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    except ValueError:  # not the main thread, which is the only one that gets signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
