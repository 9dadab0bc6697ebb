"""All commands and their flags. Whatever a command needs is imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from expertier.cli.options import offload_flags, refuse_beside, refuse_without, reported
from expertier.config import OffloadOptions
from expertier.errors import UnsupportedOptionError

app = typer.Typer(
    name="expertier",
    help="Run mixture-of-experts models that are bigger than your memory, inside the engine you already use.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)

_MODEL_HELP = "GGUF file (of a split model the first one) or directory of a Hugging Face checkpoint."
Model = Annotated[Path, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text for people.")]
Engine = Annotated[str, typer.Option("--engine", help="Engine, by the name of its adapter.")]
Ubatch = Annotated[int, typer.Option("--n-ubatch", min=1, help="Tokens of a prompt that are computed in one step.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Compute threads. \\[default: all cores]")]


def _version(wanted: bool) -> None:
    if wanted:
        from expertier import __version__

        print(f"expertier {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run mixture-of-experts models that are bigger than your memory, inside the engine you already use."""


@app.command()
@reported
def doctor(
    model: Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="Model to check with.")] = None,
    as_json: AsJson = False,
) -> None:
    """Look at engines, kernel, storage and memory limits, and say what would be refused and why."""
    from expertier.cli.doctor import doctor as command

    command(model, as_json=as_json)


@app.command()
@reported
@offload_flags
def plan(
    model: Model,
    options: OffloadOptions,
    n_ubatch: Ubatch = 512,
    no_disk: Annotated[bool, typer.Option("--no-disk", help="Do not measure the storage.")] = False,
    routes: Annotated[
        Path | None,
        typer.Option(
            "--routes", help="What `expertier profile` recorded. \\[default: where it puts it, if that exists]"
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Measure the engine's speed with this model, in seconds; kept for next time."),
    ] = False,
    engine: Engine = "llamacpp",
    threads: Threads = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory for record and figure. \\[default: in the cache directory]")
    ] = None,
    apply: Annotated[
        Path | None, typer.Option("--apply", help="Write the plan into this file of options: EXPERTIER_CONFIG=FILE.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a budget means for a model on this machine and, with recorded routes, what every budget gives."""
    from expertier.cli.engines import EngineSettings
    from expertier.cli.plan import PlanRequest
    from expertier.cli.plan import plan as command
    from expertier.comparison.hardware import cores

    command(
        PlanRequest(
            model=model,
            options=options,
            routes=routes,
            calibrate=calibrate,
            engine=engine,
            settings=EngineSettings(n_ubatch=n_ubatch, threads=threads or cores()),
            out=out,
            apply=apply,
            measure=not no_disk,
            as_json=as_json,
        )
    )


@app.command()
@reported
@offload_flags
def run(
    model: Model,
    options: OffloadOptions,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue. \\[default: stdin]")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", "-f", help="File with the text.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest.")] = 0.8,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Repeatable sampling. \\[default: random]")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template.")] = False,
    engine: Engine = "llamacpp",
    n_ctx: Annotated[
        int | None, typer.Option("--n-ctx", min=8, help="Context length. \\[default: 4096, or the model's if less]")
    ] = None,
    n_ubatch: Ubatch = 512,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Generate text with a bounded set of experts in memory."""
    from expertier.cli.engines import EngineSettings
    from expertier.cli.run import run as command
    from expertier.comparison.hardware import cores

    settings = EngineSettings(n_ctx=n_ctx, n_ubatch=n_ubatch, threads=threads or cores())
    command(
        model,
        options,
        prompt=prompt,
        prompt_file=prompt_file,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        engine=engine,
        settings=settings,
        as_json=as_json,
    )


@app.command()
@reported
@offload_flags
def compare(
    model: Model,
    options: OffloadOptions,
    engine: Engine = "llamacpp",
    limit: Annotated[
        list[str] | None,
        typer.Option("--limit", help="Memory limit: percent of the model, an amount, or none. Repeat it for several."),
    ] = None,
    requests: Annotated[
        list[int] | None,
        typer.Option(
            "--requests",
            min=1,
            help="Requests at a time (vLLM). Repeat it for several. \\[default: 1, 8, 32] With --scheduler: "
            "requests of a round. \\[default: 64]",
        ),
    ] = None,
    repeats: Annotated[int | None, typer.Option("--repeats", min=1, help="Repeats. \\[default: 5, quick: 2]")] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Tokens decoded per run. \\[default: 64, quick: 24]")
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option("--prompts", help="JSON list of texts (or of objects with domain and text), or text files."),
    ] = None,
    arms: Annotated[str | None, typer.Option("--arms", help="Only these arms, by key, separated by commas.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", help="One more Expertier arm: NAME:option=value,option=value. May be repeated."),
    ] = None,
    quality_budget: Annotated[
        list[str] | None,
        typer.Option(
            "--quality-budget",
            help="One more Expertier arm that may lose so much, measured: 1%, a bias, or 0. Repeat it for several.",
        ),
    ] = None,
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help="Instead of Expertier as a whole: what each of its parts adds, and the bounds from the simulator.",
        ),
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Two repeats and few tokens: a first impression.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory for record and figure. \\[default: in the cache directory]")
    ] = None,
    scheduler: Annotated[
        list[str] | None,
        typer.Option(
            "--scheduler",
            help="Instead, who joins the batch: greedy, similarity, balanced, random, domains; fcfs always. Repeat it.",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", min=1, help="Requests that run at a time (--scheduler). Repeat it. \\[default: 8]"),
    ] = None,
    domains: Annotated[
        int | None, typer.Option("--domains", min=1, help="Kinds of text in one round (--scheduler).")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="Tokens of a prompt, least:most (--scheduler). \\[default: 32:128]"),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", help="Tokens of an answer, least:most (--scheduler). \\[default: 64:192]"),
    ] = None,
    load: Annotated[
        str | None, typer.Option("--load", help="Poisson arrivals at this part of what fcfs serves (--scheduler).")
    ] = None,
    earlier: Annotated[
        int | None,
        typer.Option("--earlier", min=0, help="Other texts that are read before (--scheduler). \\[default: 32]"),
    ] = None,
    log: Annotated[
        Path | None, typer.Option("--log", help="Requests as a log recorded them, a JSON object a line (--scheduler).")
    ] = None,
    side_by_side: Annotated[
        bool,
        typer.Option(
            "--side-by-side",
            help="An engine for each scheduler, all in memory, in turns of a second: fair on a busy machine "
            "(--scheduler).",
        ),
    ] = False,
    readahead: Annotated[
        list[int] | None,
        typer.Option("--readahead", min=4, help="KiB of readahead for stock under a limit. \\[default: 128]"),
    ] = None,
    n_ubatch: Ubatch = 512,
    threads: Threads = None,
    wait_policy: Annotated[
        Literal["passive", "active"] | None,
        typer.Option("--wait-policy", help="OMP_WAIT_POLICY of all arms. \\[default: passive]"),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=1, help="Longest run in seconds. \\[default: 900]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the stock engine and Expertier side by side under the same memory limits."""
    from expertier.cli.compare import CompareRequest
    from expertier.cli.compare import compare as command
    from expertier.comparison.arms import USUAL_READAHEAD_KB
    from expertier.comparison.hardware import cores

    if scheduler:
        from expertier.cli.schedulers import SchedulersRequest, compare_schedulers
        from expertier.simulation.scheduling import TrafficPlan

        refuse_beside(
            "--scheduler",
            limit=limit,
            variant=variant,
            arms=arms,
            ablate=ablate or None,
            tokens=tokens,
            quality_budget=quality_budget,
            readahead=readahead,
            wait_policy=wait_policy,
            timeout=timeout,
        )
        if requests and len(requests) > 1:
            raise UnsupportedOptionError("--scheduler takes --requests once.", "Leave the others out.")
        queued = max(requests or (64,))
        compare_schedulers(
            SchedulersRequest(
                model=model,
                options=options,
                engine=engine,
                arms=tuple(scheduler),
                batches=tuple(dict.fromkeys(batch or (8,))),
                plan=TrafficPlan(
                    requests=queued,
                    clients=queued,
                    domains=domains,
                    earlier=32 if earlier is None else earlier,
                    budget=0,
                ),
                prompt=prompt or "32:128",
                output=output or "64:192",
                load=load,
                log=log,
                rounds=repeats or (1 if quick else 3),
                side_by_side=side_by_side,
                texts=tuple(prompts or ()),
                out=out,
                n_ubatch=n_ubatch,
                threads=threads or cores(),
                as_json=as_json,
            )
        )
        return
    refuse_without(
        "--scheduler",
        batch=batch,
        domains=domains,
        prompt=prompt,
        output=output,
        load=load,
        log=log,
        earlier=earlier,
        side_by_side=side_by_side or None,
    )
    command(
        CompareRequest(
            model=model,
            options=options,
            engine=engine,
            limits=tuple(limit) if limit else None,
            requests=tuple(requests) if requests else None,
            repeats=repeats or (2 if quick else 5),
            tokens=tokens or (24 if quick else 64),
            prompts=tuple(prompts or ()),
            arms=tuple(part.strip() for part in arms.split(",") if part.strip()) if arms is not None else None,
            variants=tuple(variant or ()),
            out=out,
            readaheads=tuple(dict.fromkeys(readahead or (USUAL_READAHEAD_KB,))),
            n_ubatch=n_ubatch,
            threads=threads or cores(),
            wait_policy=wait_policy or "passive",
            timeout=timeout or 900.0,
            ablate=ablate,
            as_json=as_json,
            quality_budgets=tuple(quality_budget or ()),
        )
    )


@app.command()
@reported
@offload_flags
def profile(
    model: Model,
    options: OffloadOptions,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text", help="Text file, or JSON list of texts (or of objects with domain and text). Repeat it."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Trace to write or to continue. \\[default: in the cache directory]"),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            help="Engine, by the name of its adapter; or 'transformers': whole texts at once, without a budget.",
        ),
    ] = "llamacpp",
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help="Most tokens to read. \\[default: 20000]")
    ] = None,
    per_text: Annotated[int, typer.Option("--tokens-per-text", min=2, help="Most tokens of one text.")] = 256,
    prompt: Annotated[
        int | None,
        typer.Option(
            "--prompt", min=1, help="Tokens of each text that are read in one step, as a prompt. \\[default: 1]"
        ),
    ] = None,
    quality: Annotated[
        bool,
        typer.Option("--quality", help="Measure what virtual experts cost instead: the model's quality profile."),
    ] = False,
    at: Annotated[
        list[str] | None,
        typer.Option("--at", help="With --quality: a memory budget to measure at, e.g. 25%. Repeat it for several."),
    ] = None,
    count: Annotated[
        int | None, typer.Option("--texts", min=1, help="With --quality: most texts to read. \\[default: 24]")
    ] = None,
    points: Annotated[
        int | None, typer.Option("--points", min=1, help="With --quality: biases per memory budget. \\[default: 5]")
    ] = None,
    hard: Annotated[bool, typer.Option("--hard", help="With --quality: measure hard mode, too.")] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Read texts token by token and record which experts the routers choose, or what virtual experts cost."""
    from expertier.cli.engines import EngineSettings
    from expertier.cli.profile import ProfileRequest
    from expertier.cli.profile import profile as command
    from expertier.cli.profile_checkpoint import ENGINE as CHECKPOINT
    from expertier.cli.quality import QualityRequest, profile_quality
    from expertier.comparison.hardware import cores

    settings = EngineSettings(threads=threads or cores())
    if quality:
        refuse_beside("--quality", tokens=tokens, prompt=prompt)
        profile_quality(
            QualityRequest(
                model=model,
                options=options,
                texts=tuple(text or ()),
                out=out,
                engine=engine,
                levels=tuple(at or ()),
                count=count or 24,
                per_text=per_text,
                points=points or 5,
                hard=hard,
                settings=settings,
                as_json=as_json,
            )
        )
        return
    refuse_without("--quality", at=at, texts=count, points=points, hard=hard or None)
    if engine == CHECKPOINT:
        refuse_beside(f"--engine {CHECKPOINT}", prompt=prompt)  # whole texts at once
    command(
        ProfileRequest(
            model=model,
            options=options,
            texts=tuple(text or ()),
            out=out,
            engine=engine,
            tokens=tokens or 20_000,
            per_text=per_text,
            prompt=prompt or 1,
            settings=settings,
            as_json=as_json,
        )
    )


@app.command()
@reported
def traffic(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="What `expertier profile` recorded.")],
    arm: Annotated[
        list[str] | None,
        typer.Option("--arm", help="fcfs (always), similarity, greedy, balanced, random, domains, answers. Repeat it."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Requests that run at a time. Repeat it. \\[default: 8]")
    ] = None,
    budget: Annotated[str, typer.Option("--budget", help="Memory for experts: percent or an amount.")] = "50%",
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests of one run.")] = 64,
    clients: Annotated[
        int | None, typer.Option("--clients", min=1, help="Clients that wait for answers. \\[default: all at once]")
    ] = None,
    load: Annotated[
        str | None, typer.Option("--load", help="Poisson arrivals at this part of what fcfs can serve, e.g. 70%.")
    ] = None,
    domains: Annotated[
        int | None, typer.Option("--domains", min=1, help="Kinds of text in one run, drawn anew for each.")
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="Tokens of a prompt, least:most.")] = "32:128",
    output: Annotated[str, typer.Option("--output", help="Tokens of an answer, least:most.")] = "64:192",
    earlier: Annotated[int, typer.Option("--earlier", min=0, help="Other texts the server has served before.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Runs with other requests.")] = 5,
    bandwidth: Annotated[str | None, typer.Option("--bandwidth", help="Storage speed, e.g. 1.5GB/s.")] = None,
    compute_ms: Annotated[
        float | None, typer.Option("--compute-ms", min=0, help="Milliseconds of compute in a step of one token.")
    ] = None,
    token_ms: Annotated[
        float, typer.Option("--token-ms", min=0, help="Milliseconds of compute of every further token.")
    ] = 0.0,
    partial: Annotated[
        bool, typer.Option("--partial", help="Use what is intact of a trace that was not closed.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory for record and figure. \\[default: in the cache directory]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve recorded requests together: who joins the batch, what that loads, and who waits how long."""
    from expertier.cli.traffic import TrafficRequest
    from expertier.cli.traffic import traffic as command
    from expertier.simulation.scheduling import TrafficPlan

    command(
        TrafficRequest(
            trace=trace,
            arms=tuple(arm or ("random", "balanced", "similarity", "greedy", "domains", "answers")),
            batches=tuple(dict.fromkeys(batch or (8,))),
            budget=budget,
            plan=TrafficPlan(
                requests=requests, clients=clients or requests, domains=domains, earlier=earlier, budget=0
            ),
            prompt=prompt,
            output=output,
            load=load,
            repeats=repeats,
            bandwidth=bandwidth,
            compute_ms=compute_ms,
            token_ms=token_ms,
            partial=partial,
            out=out,
            as_json=as_json,
        )
    )


@app.command()
@reported
def train(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE...", help="What `expertier profile --trace-tokens on` recorded.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the predictors.")],
    model: Annotated[
        Path | None,
        typer.Option("--model", help="The traces' model: its token embedding is a better start than noise."),
    ] = None,
    test: Annotated[
        list[Path] | None,
        typer.Option("--test", help="Also report on this trace, e.g. of another domain. Repeat it for several."),
    ] = None,
    hold_out: Annotated[
        list[str] | None,
        typer.Option(
            "--hold-out", help="Learn nothing from texts of this domain and report on them. Repeat it for several."
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Score all predictors and two controls on text that was kept back.")
    ] = False,
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.01, help="Most time for the path network to learn.")
    ] = 5.0,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Most passes over the text.")] = 20,
    width: Annotated[int, typer.Option("--width", min=8, help="Numbers per token in the path network.")] = 192,
    report_tokens: Annotated[
        int, typer.Option("--report-tokens", min=2, help="Most tokens of each text to score.")
    ] = 10_000,
    partial: Annotated[
        bool, typer.Option("--partial", help="Use what is intact of traces that were not closed.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Learn to predict routes from recorded ones: experts can then be loaded before a layer asks for them."""
    from expertier.cli.train import TrainRequest, train_command
    from expertier.routing.train import TrainSettings

    train_command(
        TrainRequest(
            traces=tuple(traces),
            tests=tuple(test or ()),
            out=out,
            model=model,
            hold_out=tuple(hold_out or ()),
            report=report,
            settings=TrainSettings(seconds=60 * minutes, epochs=epochs, width=width, seed=seed),
            partial=partial,
            report_tokens=report_tokens,
            as_json=as_json,
        )
    )


@app.command()
@reported
def simulate(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="What `expertier profile` recorded.")],
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", help="Memory for experts: percent or an amount. Repeat it for several."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", help="Eviction policy, e.g. lfu, lfu:8 (half-life), lru. Repeat it for several."),
    ] = None,
    prefetch: Annotated[
        list[str] | None,
        typer.Option(
            "--prefetch",
            help="Also load ahead of need with the first policy: by the oracles perfect and perfect4, the control "
            "previous, or what an engine has: blend, path, table, tokens, lookahead, or two as in blend+lookahead.",
        ),
    ] = None,
    predictor: Annotated[
        Path | None,
        typer.Option("--predictor", help="What `expertier train` has written; also tells the policy 'predictive'."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Measure the storage of this model, which must be the trace's.")
    ] = None,
    bandwidth: Annotated[str | None, typer.Option("--bandwidth", help="Storage speed, e.g. 1.5GB/s.")] = None,
    latency_us: Annotated[
        float | None, typer.Option("--latency-us", min=0, help="Microseconds to a first byte.")
    ] = None,
    compute_ms: Annotated[
        float | None, typer.Option("--compute-ms", min=0, help="Milliseconds of compute in a decode step.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=2, help="Most tokens of the trace to use.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Use what is intact of a trace that was not closed.")
    ] = False,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Replays at a time. \\[default: all cores]")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory for record and figure. \\[default: in the cache directory]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replay a trace through policies and budgets, with Belady and the bounds beside them."""
    from expertier.cli.simulate import SimulateRequest
    from expertier.cli.simulate import simulate as command
    from expertier.comparison.hardware import cores

    command(
        SimulateRequest(
            trace=trace,
            budgets=tuple(budget or ()),
            policies=tuple(policy or ()),
            predictors=tuple(prefetch or ()),
            predictor=predictor,
            model=model,
            bandwidth=bandwidth,
            latency_us=latency_us,
            compute_ms=compute_ms,
            tokens=tokens,
            partial=partial,
            jobs=jobs or cores(),
            out=out,
            as_json=as_json,
        )
    )


@app.command()
@reported
def report(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="What `compare --out` wrote (the directory or its record), or a trace of routes."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Of a trace: directory for page and pictures. \\[default: beside it]")
    ] = None,
    predictor: Annotated[
        Path | None,
        typer.Option("--predictor", help="Of a trace: are the chances of what `expertier train` wrote true?"),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Of a trace: use what is intact if it was not closed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Draw a comparison again from its record, or a trace: use of experts, reuse, hit ratios, loads against compute."""
    from expertier.cli.compare import RECORD
    from expertier.cli.compare import report as command

    known = os.path.exists(path)  # a Path's own method raises where a folder may not be looked into
    if os.path.isdir(path) or not known or path.name == RECORD:
        if known:
            refuse_without("a trace", out=out, predictor=predictor, partial=partial or None)
        command(path.parent if path.name == RECORD else path, as_json=as_json)
    else:
        from expertier.cli.report_trace import report_trace

        report_trace(path, out, predictor=predictor, partial=partial, as_json=as_json)
