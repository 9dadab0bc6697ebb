"""The table of a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expertier.budget import format_bytes
from expertier.comparison.ratios import Ratio
from expertier.comparison.records import Bound, Comparison
from expertier.comparison.summary import ArmSummary, Identity, Summary

_DASH = "[dim]-[/]"
_STATUS_STYLE = {"killed": "red", "failed": "red", "timeout": "red", "refused": "yellow", "not run": "dim"}


def print_report(console: Console, comparison: Comparison, summary: Summary) -> None:
    """Print everything about a comparison that fits a screen."""
    model, hardware, settings = comparison.model, comparison.hardware, comparison.settings
    console.print(
        f"[bold]{escape(model.name)}[/]  {model.architecture}, {model.layers} layers x {model.experts} experts "
        f"({', '.join(model.types)}), {format_bytes(model.file_bytes)}"
    )
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    console.print(f"[dim]{hardware.cpu}, {hardware.cores} cores, {format_bytes(hardware.memory_bytes)}; {versions}[/]")
    console.print(
        f"[dim]{settings.repeats} interleaved repeats, {settings.tokens} tokens of {settings.prompts} texts "
        f"({', '.join(settings.domains)}), {settings.long_prompt}-token prompt; {settings.confinement}; "
        f"cold start by {settings.cold_start}[/]"
    )
    for limit in dict.fromkeys(arm.limit for arm in summary.arms):
        arms = [arm for arm in summary.arms if arm.limit == limit]
        table = _table(limit, arms)
        for bound in comparison.bounds:
            if bound.limit == limit:
                table.add_row(*_bound_row(bound))
        console.print(table)
        if any(arm.loads for arm in arms):
            console.print(_loads_table(arms))
        if any(arm.quality is not None for arm in arms):
            console.print(_quality_table(arms))
    for line in _closing_lines(comparison, summary):
        console.print(line)


def _table(limit: str, arms: list[ArmSummary]) -> Table:
    amount = arms[0].limit_bytes
    title = "no memory limit" if amount is None else f"memory limit {format_bytes(amount)}"
    if limit.endswith("%"):
        title += f" ({limit} of the model)"
    table = Table(title=title, title_style="bold", title_justify="left", header_style="dim", expand=False)
    table.add_column("arm", no_wrap=True)
    memory = "peak memory (worker)" if any(arm.loads for arm in arms) else "peak memory"
    for name in ("tok/s", "against stock", "first token", memory, "read/token", "hits", "stall/token", "bound"):
        table.add_column(name, justify="right")
    for arm in arms:
        table.add_row(*_row(arm))
    return table


def _row(arm: ArmSummary) -> Iterable[str]:
    name = f"[bold cyan]{escape(arm.label)}[/]" if arm.ours else escape(arm.label)
    if arm.lossy:
        name += " [yellow]lossy[/]"
    if not arm.runs:
        style = _STATUS_STYLE.get(arm.status, "red")
        return [name, f"[{style}]{arm.status}[/]", *[_DASH] * 2, _bytes(arm.peak_memory_bytes), *[_DASH] * 4]
    speed = f"{arm.tokens_per_second:.1f}"
    cells = [
        f"[bold]{speed}[/]" if arm.ours else speed,
        "[dim]best stock[/]" if arm.best_stock else _ratio(arm.against_stock),
        _seconds(arm.ttft_long_seconds)
        + (f" [dim]({arm.ttft_against_stock.median:.2f}x)[/]" if arm.ours and arm.ttft_against_stock else ""),
        # An engine of several processes: the one with the weights counts, beside all of them with the page cache.
        _bytes(arm.peak_memory_bytes or arm.peak_rss_bytes)
        + (f" [dim]({_bytes(arm.peak_rss_bytes)})[/]" if arm.loads else ""),
        _bytes(arm.read_bytes_per_token),
        _percent(arm.hit_ratio),
        _DASH if arm.stall_ms_per_token is None else f"{arm.stall_ms_per_token:.1f} ms",
        _DASH
        if arm.over_bound is None
        else f"{arm.bound_tokens_per_second:.1f} [dim]({arm.over_bound:.2f}x {arm.bound_by})[/]",
    ]
    return [name, *cells]


def _bound_row(bound: Bound) -> Iterable[str]:
    return [
        f"[dim]bound: {escape(bound.label)}[/]",
        f"[dim]{bound.tokens_per_second:.1f}[/]",
        *[_DASH] * 3,
        f"[dim]{_bytes(bound.read_bytes_per_token)}[/]",
        f"[dim]{_percent(bound.hit_ratio)}[/]",
        *[_DASH] * 2,
    ]


def _loads_table(arms: list[ArmSummary]) -> Table:
    table = Table(title="requests at a time", title_justify="left", header_style="dim", expand=False)
    table.add_column("arm", no_wrap=True)
    names = ("requests", "tok/s", "against stock", "first token p50/p99", "later p50/p99", "read/token")
    for name in (*names, "hits", "ready", "stall/token"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in arms:
        for index, load in enumerate(arm.loads):
            name = "" if index else f"[bold cyan]{escape(arm.label)}[/]" if arm.ours else escape(arm.label)
            table.add_row(
                name,
                str(load.requests),
                f"{load.tokens_per_second:.1f}",
                _ratio(load.against_stock) if arm.ours else _DASH,
                f"{load.ttft_p50:.2f} / {load.ttft_p99:.2f} s",
                _DASH
                if load.token_p50 is None or load.token_p99 is None
                else f"{1e3 * load.token_p50:.0f} / {1e3 * load.token_p99:.0f} ms",
                _bytes(load.read_bytes_per_token),
                _percent(load.hit_ratio),
                _percent(load.ready_hit_ratio),
                _DASH if load.stall_ms_per_token is None else f"{load.stall_ms_per_token:.1f} ms",
            )
    return table


def _quality_table(arms: list[ArmSummary]) -> Table:
    table = Table(title="what lossy arms lost", title_justify="left", header_style="dim", expand=False)
    table.add_column("arm", no_wrap=True)
    names = ("tok/s", "perplexity", "90 % interval", "KL", "same token", "read/token", "fewer bytes", "bias")
    for name in (*names, "gate mass"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in arms:
        quality = arm.quality
        if quality is None or arm.tokens_per_second is None:
            continue
        exact, own = quality.exact_read_bytes_per_token, arm.read_bytes_per_token
        table.add_row(
            f"[bold cyan]{escape(arm.label)}[/]",
            f"{arm.tokens_per_second:.1f}",
            f"{math.exp(quality.cross_entropy):.3f} ({100 * quality.increase.middle:+.2f} %)",
            f"{100 * quality.increase.low:+.1f} .. {100 * quality.increase.high:+.1f} %",
            f"{quality.kl:.4f}",
            _percent(quality.agreement),
            _bytes(own),
            f"{exact / own:.1f}x" if exact and own else _DASH,
            _bias(arm),
            _percent(sum(arm.substituted) / len(arm.substituted)) if arm.substituted else _DASH,
        )
    return table


def _bias(arm: ArmSummary) -> str:
    if arm.bias is None:
        return _DASH
    backed_off = arm.calibrated_bias is not None and arm.bias < arm.calibrated_bias
    return f"{arm.bias:.3g}" + (f" [dim](of {arm.calibrated_bias:.3g})[/]" if backed_off else "")


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return _DASH
    colour = "green" if ratio.low > 1 else "red" if ratio.high < 1 else "yellow"
    return f"[{colour}]{ratio.median:.2f}x[/] [dim]{ratio.low:.2f}..{ratio.high:.2f}[/]"


def _bytes(amount: float | None) -> str:
    return _DASH if amount is None else format_bytes(int(amount))


def _seconds(value: float | None) -> str:
    return _DASH if value is None else f"{value:.2f} s"


def _percent(share: float | None) -> str:
    return _DASH if share is None else f"{100 * share:.0f} %"


def _closing_lines(comparison: Comparison, summary: Summary) -> Iterable[str]:
    for arm in summary.arms:
        if arm.reason:
            style = _STATUS_STYLE.get(arm.status, "red")
            yield f"[{style}]{arm.status}[/]: {escape(arm.label)}, limit {arm.limit}: {escape(arm.reason)}"
    yield identity_line(summary.identity)
    if summary.disk_bytes_per_second is not None:
        line = f"The storage does {format_bytes(int(summary.disk_bytes_per_second))}/s"
        if summary.compute_seconds is not None:
            line += (
                f", stock computes a token in {1e3 * summary.compute_seconds:.1f} ms when nothing is scarce. "
                "Bound: the larger of that and the time to read what was read"
            )
        yield f"[dim]{line}.[/]"
    for note in comparison.notes:
        yield f"[dim]Note: {escape(note)}[/]"
    if not comparison.complete:
        yield "[yellow]This comparison was interrupted; what is shown is what had been measured.[/]"


def identity_line(identity: Identity) -> str:
    """Say in one line whether the arms computed the same."""
    parts = []
    if identity.same_logits is not None:
        same, differ = {
            "logits": ("Every logit of Expertier is bit-identical to stock's", "LOGITS DIFFER"),
            "tokens": ("Every greedy token of Expertier is stock's", "GREEDY TOKENS DIFFER"),
        }[identity.evidence]
        verdict = f"[green]{same}[/]" if identity.same_logits else f"[red]{differ} from stock with the same kernels[/]"
        parts.append(f"{verdict} ({identity.logits_runs} runs)")
    if identity.agreement is not None:
        parts.append(f"likeliest token equal to stock with other kernels at {100 * identity.agreement:.1f} % or more")
    if identity.same_tokens is False:
        parts.append("[red]the arms were fed different tokens[/]")
    if identity.lossy_arms:
        arms = "lossy arm is" if identity.lossy_arms == 1 else "lossy arms are"
        parts.append(f"{identity.lossy_arms} {arms} no part of this")
    return "; ".join(parts) + "." if parts else "[dim]There were no two runs whose outputs can be compared.[/]"
