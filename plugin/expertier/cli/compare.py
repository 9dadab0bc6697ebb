"""``expertier compare`` and ``expertier report``."""

from __future__ import annotations

import datetime
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from expertier import __version__
from expertier.budget import format_bytes, parse_budget
from expertier.catalog import read_catalog
from expertier.catalog.types import Catalog
from expertier.cli.ablate import ablation_variants, with_bounds, without_whole
from expertier.cli.engines import EngineSettings, Workloads, get_adapter
from expertier.cli.folder import prepare_folder
from expertier.cli.options import print_json
from expertier.comparison.arms import Ability, Limit, parse_limit, parse_variant, plan_arms
from expertier.comparison.figure import draw
from expertier.comparison.hardware import describe_hardware
from expertier.comparison.limits import find_confinement
from expertier.comparison.page_cache import Readahead, drop_method
from expertier.comparison.prompts import load_texts
from expertier.comparison.quality import LogitsFolder
from expertier.comparison.records import ArmRecord, Comparison, ModelRecord, Run, Settings, read_comparison
from expertier.comparison.runner import Runner, Workload
from expertier.comparison.summary import Summary, summarise
from expertier.comparison.table import print_report
from expertier.config import OffloadOptions
from expertier.errors import UnsupportedOptionError
from expertier.planning.calibrate import DiskSpeed, measure_disk
from expertier.planning.memory import memory_left
from expertier.quality.serving import read_quality_budget

RECORD = "comparison.json"
FIGURE = "comparison.png"
_SHORT_PROMPT, _LONG_PROMPT, _TEXTS = 32, 400, 4
_CHARACTERS_PER_TOKEN = 8  # more than any text needs
_CALIBRATION_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """What the user asked for; see the flags of the command."""

    model: Path
    options: OffloadOptions
    engine: str
    limits: tuple[str, ...] | None
    repeats: int
    tokens: int
    prompts: tuple[Path, ...]
    arms: tuple[str, ...] | None
    variants: tuple[str, ...]
    out: Path | None
    readaheads: tuple[int, ...]
    n_ubatch: int
    threads: int
    wait_policy: str
    timeout: float
    as_json: bool
    requests: tuple[int, ...] | None = None
    quality_budgets: tuple[str, ...] = ()
    ablate: bool = False


def compare(request: CompareRequest) -> None:
    """Run a comparison, write its record and figure, print its table."""
    adapter = get_adapter(request.engine)
    usual = adapter.workloads
    catalog = read_catalog(request.model)
    if request.options.profile == "auto":  # an arm must not learn from the arms before it, whose texts are the same
        request = replace(request, options=replace(request.options, profile="off"))
    parse_budget(request.options.budget, catalog.total_expert_bytes)  # a typing error shows now, not as failed arms
    limits = [parse_limit(text, catalog.file_bytes) for text in request.limits or usual.limits]
    requests = _requests(request, usual)
    _check_quality(request, catalog)
    out = prepare_folder(request.out, "comparisons", RECORD)
    confinement, reasons = find_confinement()
    readahead = Readahead(request.model)
    ability = Ability(
        confinement="" if confinement else "; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
        readahead=readahead.obstacle(),
        readahead_kb=readahead.value(),
        memory_left=memory_left().left,
    )
    variants, notes = _variants(request.variants, request.options), _notes(catalog, limits, ability)
    if request.ablate:
        parts, said = ablation_variants(catalog, request.options)
        variants, notes = {**parts, **variants}, (*notes, *said)
    arms = plan_arms(
        adapter,
        catalog,
        list(dict.fromkeys(limits)),
        asdict(request.options),
        ability=ability,
        variants=variants,
        only=request.arms,
        readaheads=request.readaheads,
        budgets=usual.budgets,
        quality_budgets=request.quality_budgets,
    )
    if request.ablate:
        arms = without_whole(arms, tuple(variants))
    texts_wanted = min(_TEXTS, request.tokens)
    per_text = -(-request.tokens // texts_wanted)
    prompts_per_text = -(-max(requests, default=0) // texts_wanted)
    texts = load_texts(
        request.prompts,
        request.model,
        decode=texts_wanted,
        characters=_CHARACTERS_PER_TOKEN
        * max(_LONG_PROMPT, _SHORT_PROMPT + per_text, prompts_per_text * _SHORT_PROMPT),
    )
    comparison = Comparison(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=("expertier", *sys.argv[1:]),
        engine=adapter.engine,
        versions={"expertier": __version__, "python": sys.version.split()[0], **adapter.versions()},
        hardware=describe_hardware(request.model),
        model=_describe_model(catalog),
        settings=Settings(
            repeats=request.repeats,
            tokens=per_text * texts_wanted,
            prompts=texts_wanted,
            short_prompt=_SHORT_PROMPT,
            long_prompt=_LONG_PROMPT,
            texts=texts.source,
            domains=tuple(text.domain for text in texts.decode),
            budget=str(request.options.budget),
            n_ubatch=request.n_ubatch,
            threads=request.threads,
            wait_policy=request.wait_policy,
            cold_start=drop_method(),
            confinement=confinement.name if confinement else "no memory limits",
            requests=requests,
            evidence=usual.evidence,
        ),
        arms=arms,
        notes=notes,
    )
    workload = Workload(
        model=catalog.path.absolute(),
        files=catalog.files,
        job={
            "n_ubatch": request.n_ubatch,
            "threads": request.threads,
            "long_text": texts.long.text,
            "texts": [text.text for text in texts.decode],
            "long_prompt": _LONG_PROMPT,
            "short_prompt": _SHORT_PROMPT,
            "tokens": per_text,
            "requests": requests,
        },
        wait_policy=request.wait_policy,
        timeout=request.timeout,
    )
    with tempfile.TemporaryDirectory(prefix="expertier-logits-") as folder:
        lossy = any(arm.lossy for arm in arms)
        workload = replace(workload, logits=LogitsFolder(Path(folder) if lossy else None))
        runner = Runner(adapter, workload, confinement, readahead)
        comparison = _run(runner, comparison, catalog, out, workload.logits)
    if request.ablate:
        settings = EngineSettings(n_ubatch=request.n_ubatch, threads=request.threads)
        comparison = with_bounds(
            comparison,
            adapter,
            request.options,
            texts.decode,
            out,
            per_text=per_text,
            settings=settings,
            catalog=catalog,
        )
        comparison.write(out / RECORD)
    _show(comparison, out, as_json=request.as_json)


def _requests(request: CompareRequest, usual: Workloads) -> tuple[int, ...]:
    if request.requests is None or request.requests == usual.requests:
        return usual.requests
    if not usual.requests:
        raise UnsupportedOptionError(
            f"Comparisons with {request.engine} measure one sequence at a time.", "Leave out --requests."
        )
    return tuple(sorted(set(request.requests)))


def _check_quality(request: CompareRequest, catalog: Catalog) -> None:
    """Refuse now what every arm with a quality budget would refuse."""
    if not request.quality_budgets:
        return
    options = replace(request.options, virtual_bias=None, virtual_protect=None, virtual_hard="off")
    for text in request.quality_budgets:
        read_quality_budget(replace(options, quality_budget=text), catalog)


def _variants(texts: Sequence[str], options: OffloadOptions) -> dict[str, dict[str, object]]:
    """Options of every variant, checked and converted now rather than in the middle of a comparison."""
    parsed: dict[str, dict[str, object]] = {}
    for text in texts:
        name, changes = parse_variant(text)
        if name in parsed:
            raise UnsupportedOptionError(f"There are two variants called {name!r}.", "Give each a name of its own.")
        if changes.keys() & {"scheduler", "scheduling"}:
            raise UnsupportedOptionError(
                f"The variant {name!r} names a scheduler, but nobody waits in these arms.",
                "Compare schedulers with --scheduler greedy: requests then queue for a batch.",
            )
        chosen = asdict(OffloadOptions.from_mapping({**asdict(options), **changes}))
        parsed[name] = {key: chosen[key] for key in changes}
    return parsed


def _describe_model(catalog: Catalog) -> ModelRecord:
    return ModelRecord(
        name=catalog.path.name,
        fingerprint=catalog.fingerprint,
        architecture=catalog.architecture,
        file_bytes=catalog.file_bytes,
        expert_bytes_total=catalog.total_expert_bytes,
        other_bytes=catalog.other_bytes,
        layers=len(catalog.layers),
        experts=max(layer.experts for layer in catalog.layers),
        top_k=max(layer.top_k for layer in catalog.layers),
        largest_expert_bytes=catalog.largest_expert_bytes,
        types=tuple(sorted({part.type_name for layer in catalog.layers for part in layer.parts})),
    )


def _notes(catalog: Catalog, limits: Sequence[Limit], ability: Ability) -> tuple[str, ...]:
    notes = []
    if all(limit.limit_bytes is not None for limit in limits):
        notes.append("without --limit none stock's compute time is unknown, so no bound is given")
    if catalog.file_bytes > ability.memory_left and any(limit.limit_bytes is None for limit in limits):
        notes.append(f"the model does not fit into the {format_bytes(ability.memory_left)} of memory that are left")
    return tuple(notes)


def _run(runner: Runner, comparison: Comparison, catalog: Catalog, out: Path, logits: LogitsFolder) -> Comparison:
    """Run all arms; the record on disk is brought up to date after every run, so that an interrupt loses none."""
    records = {(arm.limit, arm.key): arm for arm in comparison.arms}
    speeds: list[DiskSpeed] = []

    def current(*, complete: bool) -> Comparison:
        return replace(comparison, arms=tuple(records.values()), disk=tuple(speeds), complete=complete)

    with _progress(comparison) as (start, advance):

        def on_repeat(_repeat: int) -> None:
            start("measuring the storage")
            speeds.append(
                measure_disk(
                    catalog.files,
                    read_bytes=catalog.largest_expert_bytes,
                    most_bytes=_CALIBRATION_BYTES,
                    most_seconds=1.0,
                )
            )

        def on_done(arm: ArmRecord, run: Run) -> None:
            records[arm.limit, arm.key] = arm
            current(complete=False).write(out / RECORD)
            skipped = 0 if run.status == "ok" else comparison.settings.repeats - run.repeat - 1
            advance(1 + skipped)

        runner.run_all(
            comparison.arms,
            comparison.settings.repeats,
            lambda arm, repeat: start(
                f"preparing {arm.label}" if repeat < 0 else f"{arm.label}, limit {arm.limit}, repeat {repeat + 1}"
            ),
            on_done,
            on_repeat,
        )
    finished = current(complete=True)
    finished = replace(finished, arms=logits.judged(finished.arms))
    finished.write(out / RECORD)
    return finished


@contextmanager
def _progress(comparison: Comparison) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """A bar over all runs on a terminal, one line per run elsewhere."""
    runs = comparison.settings.repeats * sum(arm.status != "not run" for arm in comparison.arms)
    console = Console(stderr=True)
    if not console.is_terminal:
        done = 0

        def start(text: str) -> None:
            print(f"[{done}/{runs}] {text}", file=sys.stderr, flush=True)

        def advance(count: int) -> None:
            nonlocal done
            done += count

        yield start, advance
        return
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=runs)
        yield (
            lambda text: progress.update(task, description=text),
            lambda count: progress.advance(task, count),
        )


def report(directory: Path, *, as_json: bool) -> None:
    """Print the table and draw the figure of a comparison from its record."""
    _show(read_comparison(directory / RECORD), directory, as_json=as_json)


def _show(comparison: Comparison, out: Path, *, as_json: bool) -> None:
    summary: Summary = summarise(comparison)
    drawn = any(arm.runs for arm in summary.arms)
    if drawn:
        draw(comparison, summary, out / FIGURE)
    if as_json:
        print_json({"comparison": asdict(comparison), "summary": asdict(summary), "out": str(out)})
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    print_report(console, comparison, summary)
    console.print(f"[dim]Record: {out / RECORD}" + (f"   Figure: {out / FIGURE}[/]" if drawn else "[/]"))
