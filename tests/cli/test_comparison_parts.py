"""Limits, readahead, records, arms, prompts, summary and figure, each by itself."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from expertier.catalog.gguf import read_gguf
from expertier.cli.engines import get_adapter
from expertier.comparison import limits as limits_module
from expertier.comparison.arms import Ability, Limit, parse_limit, parse_variant, plan_arms
from expertier.comparison.figure import draw
from expertier.comparison.hardware import describe_hardware
from expertier.comparison.limits import ScopeConfinement, V1Confinement, V2Confinement, find_confinement
from expertier.comparison.page_cache import Readahead, cached_bytes, drop_caches
from expertier.comparison.prompts import load_texts
from expertier.comparison.records import (
    ArmRecord,
    Comparison,
    Figures,
    Load,
    ModelRecord,
    OffloadFigures,
    Run,
    Settings,
    read_comparison,
)
from expertier.comparison.runner import Runner, Workload, _verdict
from expertier.comparison.summary import summarise
from expertier.comparison.table import identity_line, print_report
from expertier.errors import BudgetError, ExpertierError, UnsupportedOptionError
from expertier.planning.calibrate import DiskSpeed
from support.tiny_gguf import TinySpec

TinyModel = Callable[[TinySpec], Path]
GIB = 1 << 30
ABLE = Ability(confinement="", readahead="", readahead_kb=8192, memory_left=64 * GIB)


# ---- records


def offload(hit: float = 0.8) -> OffloadFigures:
    return OffloadFigures(
        mode="mode",
        budget_bytes=10,
        peak_resident_bytes=9,
        total_bytes=20,
        hit_ratio=hit,
        ready_hit_ratio=hit,
        misses_per_token=1.0,
        stall_ms_per_token=2.0,
        read_bytes_per_token=100.0,
    )


def figures(
    token: float, *, logits: str = "same", kernels: str = "plain", ours: bool = False, read: int = 0
) -> Figures:
    return Figures(
        load_seconds=1.0,
        ttft_long_seconds=token * 10,
        ttft_short_seconds=(token * 2, token * 3),
        token_seconds=(token,) * 4,
        peak_rss_bytes=GIB,
        read_bytes=read,
        decode_read_bytes=read,
        tokens_digest="tokens",
        logits_digest=logits,
        choices=(1, 2, 3, 4),
        kernels=kernels,
        offload=offload() if ours else None,
    )


def arm(key: str, limit: int | None, seconds: list[float], **given: Any) -> ArmRecord:
    ours = key.startswith("expertier")
    runs = tuple(
        Run(
            repeat=index,
            status="ok",
            wall_seconds=1.0,
            peak_memory_bytes=GIB,
            figures=figures(value, ours=ours, **given),
        )
        for index, value in enumerate(seconds)
    )
    return ArmRecord(
        key=key,
        label=key,
        ours=ours,
        limit="none" if limit is None else f"{limit} GiB",
        limit_bytes=None if limit is None else limit * GIB,
        settings={"repack": False, "half_life": None},
        runs=runs,
    )


def comparison(*arms: ArmRecord) -> Comparison:
    return Comparison(
        created="2026-01-01T00:00:00+00:00",
        command=("expertier", "compare"),
        engine="llama.cpp",
        versions={"expertier": "0"},
        hardware=describe_hardware(Path(__file__)),
        model=ModelRecord(
            name="m.gguf",
            fingerprint="f",
            architecture="qwen3moe",
            file_bytes=3 * GIB,
            expert_bytes_total=2 * GIB,
            other_bytes=GIB,
            layers=2,
            experts=8,
            top_k=2,
            largest_expert_bytes=GIB,
            types=("F16",),
        ),
        settings=Settings(
            repeats=3,
            tokens=4,
            prompts=1,
            short_prompt=32,
            long_prompt=400,
            texts="t",
            domains=("d",),
            budget="auto",
            n_ubatch=512,
            threads=2,
            wait_policy="passive",
            cold_start="c",
            confinement="cgroup v1",
        ),
        disk=(DiskSpeed(direct=True, sequential=1e9, random=2e9, read_bytes=1, threads=2, measured_bytes=1),),
        arms=arms,
        complete=True,
    )


KILLED = dataclasses.replace(
    arm("stock-repack", 1, []), status="killed", reason="too small", runs=(Run(repeat=0, status="killed", oom_kills=1),)
)
NOT_RUN = dataclasses.replace(arm("stock-readahead", 1, []), status="not run", reason="needs root")


def test_a_comparison_survives_the_trip_through_its_file(tmp_path: Path) -> None:
    record = comparison(arm("stock", 1, [0.2, 0.3]), arm("expertier", 1, [0.1, 0.1]), KILLED, NOT_RUN)
    record.write(tmp_path / "comparison.json")
    assert read_comparison(tmp_path / "comparison.json") == record
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("model"),
        lambda data: data.update(schema="something-else/1"),
        lambda data: data.update(surprise=1),
        lambda data: data.update(arms=[{"key": "stock"}]),
        lambda data: data.update(arms="stock"),
        lambda data: data.update(complete="yes"),
        lambda data: data["hardware"].update(cores="two"),
        lambda data: data["arms"][0].update(status="splendid"),
        lambda data: data["arms"][0].update(settings=[1]),
        lambda data: data["arms"][0]["runs"].append(5),
        lambda data: data.update(disk=7),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, damage: Callable[[Any], Any]) -> None:
    path = tmp_path / "comparison.json"
    comparison(arm("stock", 1, [0.2])).write(path)
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ExpertierError, match=r"comparison\.json"):
        read_comparison(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7"])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(content)
    with pytest.raises(ExpertierError):
        read_comparison(path)


# ---- summary


def test_ratios_are_paired_by_repeat_and_against_the_fastest_stock_arm_under_the_same_limit() -> None:
    result = summarise(
        comparison(
            arm("stock", 1, [0.2, 0.4, 0.2]),
            arm("stock-readahead", 1, [2.0, 2.0, 2.0]),
            arm("expertier", 1, [0.1, 0.1, 0.2]),
            arm("stock", None, [0.01, 0.01, 0.01]),
        )
    )
    by_key = {(item.limit, item.key): item for item in result.arms}
    assert by_key["1 GiB", "stock"].best_stock
    assert not by_key["1 GiB", "stock-readahead"].best_stock
    ratio = by_key["1 GiB", "expertier"].against_stock
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((2.0, 1.0, 4.0))


def test_the_first_token_is_compared_with_the_stock_arm_that_is_soonest_there() -> None:
    slow_decode = arm("stock-readahead", 1, [0.5])
    [run] = slow_decode.runs
    assert run.figures is not None
    soon = dataclasses.replace(run, figures=dataclasses.replace(run.figures, ttft_long_seconds=0.1))
    result = summarise(
        comparison(arm("stock", 1, [0.2]), dataclasses.replace(slow_decode, runs=(soon,)), arm("expertier", 1, [0.1]))
    )
    ratio = result.arms[2].ttft_against_stock
    assert ratio is not None and ratio.median == pytest.approx(0.1)


def test_the_bound_is_the_larger_of_compute_and_reading() -> None:
    stock = arm("stock", None, [0.05])
    reading = summarise(comparison(stock, arm("expertier", 1, [0.4], read=4 * 200_000_000))).arms[1]
    assert reading.bound_by == "storage"
    assert reading.bound_tokens_per_second == pytest.approx(10)  # 200 MB at 2 GB/s
    assert reading.over_bound == pytest.approx(4)
    computing = summarise(comparison(stock, arm("expertier", 1, [0.1], read=4))).arms[1]
    assert computing.bound_by == "compute"
    assert computing.over_bound == pytest.approx(2)
    unknown = summarise(comparison(arm("stock", 1, [0.05]), arm("expertier", 1, [0.1], read=4))).arms[1]
    assert unknown.over_bound is None


def test_storage_is_never_believed_to_be_slower_than_a_run_has_seen_it() -> None:
    fast = arm("expertier", 1, [0.1], read=4 * 500_000_000)  # 5 GB/s, measured were 2
    result = summarise(comparison(arm("stock", None, [0.001]), fast))
    assert result.disk_bytes_per_second == pytest.approx(5e9)
    assert result.arms[1].over_bound == pytest.approx(1)


def test_outputs_are_compared_within_one_kind_of_kernels_over_all_limits() -> None:
    same = summarise(comparison(arm("stock", None, [0.1, 0.1]), arm("expertier", 1, [0.1]))).identity
    assert same.same_logits is True and same.logits_runs == 3 and same.agreement is None
    assert "bit-identical" in identity_line(same)
    other = summarise(comparison(arm("stock", None, [0.1]), arm("expertier", 1, [0.1], logits="other"))).identity
    assert other.same_logits is False
    assert "DIFFER" in identity_line(other)
    kernels = summarise(comparison(arm("stock", 1, [0.1]), arm("expertier", 1, [0.1], kernels="repacked"))).identity
    assert kernels.same_logits is None and kernels.agreement == 1.0
    alone = summarise(comparison(arm("expertier", 1, [0.1]))).identity
    assert alone.same_tokens is None and alone.same_logits is None


def test_two_repeats_of_stock_that_differ_are_not_called_identical() -> None:
    first = arm("stock", None, [0.1])
    second = dataclasses.replace(arm("stock", None, [0.1], logits="other"), key="stock-plain")
    assert summarise(comparison(first, second, arm("expertier", 1, [0.1]))).identity.same_logits is False


# ---- several requests at a time


def serving(key: str, limit: int | None, speeds: list[float], *, stall: float | None = None) -> ArmRecord:
    """An arm measured with 1 and with 8 requests at a time, 8 times as fast with 8."""
    record = arm(key, limit, [0.1] * len(speeds))
    runs = []
    for run, speed in zip(record.runs, speeds, strict=True):
        assert run.figures is not None
        loads = tuple(
            Load(
                requests=count,
                seconds=80 / (speed * count),
                tokens=80,
                ttft_seconds=(0.5,) * (count - 1) + (1.5,),
                token_seconds=(0.1,) * 99 + (0.3,),
                read_bytes=8000,
                hit_ratio=0.75 if stall is not None else None,
                ready_hit_ratio=0.5 if stall is not None else None,
                stall_seconds=stall,
            )
            for count in (1, 8)
        )
        runs.append(dataclasses.replace(run, figures=dataclasses.replace(run.figures, loads=loads)))
    return dataclasses.replace(record, runs=tuple(runs))


def test_every_number_of_requests_is_compared_with_the_fastest_stock_arm_under_the_same_limit() -> None:
    result = summarise(
        comparison(
            serving("stock", 1, [10.0, 20.0]), serving("stock-b", 1, [1.0, 1.0]), serving("stock", None, [90.0]),
            serving("expertier", 1, [30.0, 20.0], stall=8.0),
        )
    )  # fmt: skip
    one, eight = result.arms[3].loads
    assert (one.requests, eight.requests) == (1, 8)
    assert one.tokens_per_second == pytest.approx(25) and eight.tokens_per_second == pytest.approx(200)
    assert one.against_stock is not None
    assert (one.against_stock.low, one.against_stock.median, one.against_stock.high) == pytest.approx((1.0, 2.0, 3.0))
    assert eight.ttft_p50 == 0.5 and 1.0 < eight.ttft_p99 <= 1.5
    assert eight.token_p50 == pytest.approx(0.1) and eight.token_p99 is not None and eight.token_p99 < 0.3
    assert eight.read_bytes_per_token == 100 and eight.stall_ms_per_token == pytest.approx(100)
    assert (eight.hit_ratio, eight.ready_hit_ratio) == (0.75, 0.5)
    assert result.arms[0].loads[0].hit_ratio is None


def test_requests_at_a_time_survive_the_file_and_appear_in_table_and_figure(tmp_path: Path) -> None:
    record = comparison(serving("stock", None, [10.0]), serving("expertier", None, [12.0], stall=1.0), KILLED)
    record.write(tmp_path / "comparison.json")
    assert read_comparison(tmp_path / "comparison.json") == record
    text = io.StringIO()
    print_report(Console(file=text, width=150), record, summarise(record))
    [line] = [line for line in text.getvalue().splitlines() if "1.20x" in line and " 8 " in line]
    assert "75 %" in line and "50 %" in line and "0.50 / 1.43 s" in line and "100 / 102 ms" in line
    draw(record, summarise(record), tmp_path / "figure.png")
    draw(comparison(arm("stock", 1, [0.1])), summarise(comparison(arm("stock", 1, [0.1]))), tmp_path / "single.png")
    heights = [int.from_bytes((tmp_path / name).read_bytes()[20:24], "big") for name in ("figure.png", "single.png")]
    assert heights[0] > 1.5 * heights[1]  # a second row


def test_greedy_tokens_are_not_called_logits() -> None:
    record = comparison(arm("stock", None, [0.1]), arm("expertier", None, [0.1], logits="other"))
    tokens = dataclasses.replace(record, settings=dataclasses.replace(record.settings, evidence="tokens"))
    assert "GREEDY TOKENS DIFFER" in identity_line(summarise(tokens).identity)
    assert "LOGITS DIFFER" in identity_line(summarise(record).identity)


# ---- figure


@pytest.mark.parametrize(
    "arms",
    [
        (arm("stock", 1, [0.2, 0.3]), KILLED, NOT_RUN, arm("expertier", 1, [0.1, 0.1]), arm("expertier-lru", 1, [0.2])),
        (arm("stock", 1, [0.2]), arm("expertier", 1, [0.1]), arm("stock", None, [0.1]), arm("expertier", None, [0.1])),
        (arm("expertier", None, [0.1]),),
        (KILLED,),
    ],
)
def test_the_figure_is_a_png_whatever_was_measured(tmp_path: Path, arms: tuple[ArmRecord, ...]) -> None:
    record = comparison(*arms)
    path = tmp_path / "figure.png"
    draw(record, summarise(record), path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR"
    assert int.from_bytes(content[16:20], "big") > 1000 and content.endswith(b"IEND\xaeB`\x82")


# ---- arms


def test_limits_are_percent_amounts_or_none() -> None:
    assert parse_limit("50%", 1000) == Limit(text="50%", limit_bytes=500)
    assert parse_limit("2GiB", 1000).limit_bytes == 2 * GIB
    assert parse_limit(" NONE ", 1000).limit_bytes is None
    for text in ("auto", "lots", "-1", "0", "150%"):
        with pytest.raises(BudgetError):
            parse_limit(text, 1000)


def test_variants_are_named_lists_of_options() -> None:
    assert parse_variant("lru:policy=lru, io-threads=4") == ("lru", {"policy": "lru", "io_threads": "4"})
    for text in ("lru", ":policy=lru", "lru:", "lru:policy", "lru:=x", ""):
        with pytest.raises(UnsupportedOptionError):
            parse_variant(text)


def planned(model: Path, ability: Ability, **given: Any) -> dict[tuple[str, str], ArmRecord]:
    limits = [Limit(text="1GiB", limit_bytes=GIB), Limit(text="none", limit_bytes=None)]
    arms = plan_arms(get_adapter("llamacpp"), read_gguf(model), limits, {"budget": "auto"}, ability=ability, **given)
    return {(item.limit, item.key): item for item in arms}


def test_stock_runs_at_its_best_readahead_and_at_that_of_the_machine(tiny_model: TinyModel) -> None:
    arms = planned(tiny_model(TinySpec(expert_type="Q4_K")), ABLE)
    assert {key for limit, key in arms if limit == "1GiB"} == {"stock", "stock-readahead", "stock-repack", "expertier"}
    assert arms["1GiB", "stock"].readahead_kb == 128
    assert arms["1GiB", "stock-readahead"].readahead_kb is None
    assert arms["none", "expertier"].settings["budget"] == "100%"
    assert arms["1GiB", "expertier"].settings["budget"] == "auto"
    more = planned(tiny_model(TinySpec()), ABLE, readaheads=(64, 512))
    assert [item.readahead_kb for (limit, _), item in more.items() if limit == "1GiB"] == [64, 512, None, 64, None]
    usual = planned(tiny_model(TinySpec()), dataclasses.replace(ABLE, readahead_kb=128, readahead="not root"))
    assert ("1GiB", "stock-readahead") not in usual
    assert usual["1GiB", "stock"].status == "ok"


def test_arms_that_this_machine_cannot_run_say_why(tiny_model: TinyModel) -> None:
    model = tiny_model(TinySpec())
    unconfined = planned(model, dataclasses.replace(ABLE, confinement="no cgroup"))
    assert all((item.status == "not run") == (limit == "1GiB") for (limit, _), item in unconfined.items())
    assert "no cgroup" in unconfined["1GiB", "expertier"].reason
    fixed = planned(model, dataclasses.replace(ABLE, readahead="not root"))
    assert fixed["1GiB", "stock"].status == "not run" and "not root" in fixed["1GiB", "stock"].reason
    assert fixed["1GiB", "stock-readahead"].status == "ok"
    small = planned(model, dataclasses.replace(ABLE, memory_left=GIB // 2))
    assert small["1GiB", "expertier"].status == "not run"


def test_budgets_are_further_arms_where_nothing_limits_memory(tiny_model: TinyModel) -> None:
    arms = planned(tiny_model(TinySpec()), ABLE, budgets=("50%",))
    assert arms["none", "expertier-50%"].settings["budget"] == "50%"
    assert arms["none", "expertier"].settings["budget"] == "100%"
    assert ("1GiB", "expertier-50%") not in arms


def test_a_refusal_that_only_a_process_below_the_worker_could_print_is_a_refusal() -> None:
    printed = "(Worker pid=1) ERROR expertier.errors.BudgetError: Too small. Give more.\nRuntimeError: engine failed\n"
    usage = limits_module.Usage(peak_bytes=None, oom_kills=0)
    ours, stock = arm("expertier", None, []), arm("stock", None, [])
    assert _verdict(ours, 1, "", printed, usage, 1.0)[:2] == ("refused", "BudgetError: Too small. Give more.")
    assert _verdict(stock, 1, "", printed, usage, 1.0)[0] == "failed"
    killed = dataclasses.replace(usage, oom_kills=1)
    assert _verdict(ours, 1, "", printed, killed, 1.0)[0] == "killed"


def test_variants_are_further_arms_under_every_limit(tiny_model: TinyModel) -> None:
    arms = planned(tiny_model(TinySpec()), ABLE, variants={"lru": {"policy": "lru"}}, only=["expertier-lru"])
    assert {(limit, item.settings["policy"]) for (limit, _), item in arms.items()} == {("1GiB", "lru"), ("none", "lru")}


# ---- texts


def test_texts_come_from_as_many_domains_as_there_are(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"domain": name, "text": name * 50} for name in ("a", "a", "b", "c", "c", "d")]))
    texts = load_texts([prompts], tmp_path / "m.gguf", decode=4, characters=40)
    assert [text.domain for text in texts.decode] == ["a", "b", "c", "d"]
    assert texts.source == "prompts.json"


def test_texts_beside_the_model_come_before_the_standard_library(tmp_path: Path) -> None:
    fallback = load_texts([], tmp_path / "m.gguf", decode=4, characters=3200)
    assert "standard library" in fallback.source
    assert len({text.domain for text in fallback.decode}) == 4
    assert all(len(text.text) >= 3200 for text in (*fallback.decode, fallback.long))
    (tmp_path / "prompts.json").write_text(json.dumps(["mine " * 10]))
    beside = load_texts([], tmp_path / "m.gguf", decode=2, characters=40)
    assert "mine" in beside.decode[1].text


def test_short_texts_of_a_domain_are_joined(tmp_path: Path) -> None:
    prompts = tmp_path / "p.json"
    prompts.write_text(json.dumps([{"domain": "a", "text": "x" * 30}] * 5))
    assert all(len(text.text) >= 80 for text in load_texts([prompts], tmp_path, decode=1, characters=80).decode)


@pytest.mark.parametrize("content", ["{", "[1]", '[{"domain": "x"}]', "[]"])
def test_prompts_of_another_form_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(ExpertierError):
        load_texts([path], tmp_path, decode=1, characters=10)


# ---- limits


def v1_tree(root: Path) -> Path:
    own = root / "sys/fs/cgroup/memory/mine"
    own.mkdir(parents=True)
    (own / "memory.limit_in_bytes").write_text("1")
    return own


def test_a_v1_group_is_a_child_of_our_own_so_that_outer_limits_hold(tmp_path: Path) -> None:
    own = v1_tree(tmp_path)
    group = V1Confinement(tmp_path, "4:memory:/mine\n0::/\n").open(4096)
    [child] = [path for path in own.iterdir() if path.is_dir()]
    assert (child / "memory.limit_in_bytes").read_text() == "4096"
    assert str(child / "cgroup.procs") in group.wrap(["program"])
    (child / "memory.max_usage_in_bytes").write_text("1234\n")
    (child / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert (group.usage().peak_bytes, group.usage().oom_kills) == (1234, 2)


def test_v1_without_a_memory_controller_is_no_way(tmp_path: Path) -> None:
    (tmp_path / "sys/fs/cgroup/memory").mkdir(parents=True)
    with pytest.raises(OSError, match="no memory controller"):
        V1Confinement(tmp_path, "0::/\n").open(4096)


def test_a_v2_group_is_made_where_the_memory_controller_is_delegated(tmp_path: Path) -> None:
    parent = tmp_path / "sys/fs/cgroup/user.slice/session"
    own = parent / "mine"
    own.mkdir(parents=True)
    (own / "cgroup.subtree_control").write_text("\n")
    (parent / "cgroup.subtree_control").write_text("cpu memory\n")
    V2Confinement(tmp_path, "0::/user.slice/session/mine\n").open(4096)
    [child] = [path for path in parent.iterdir() if path.name.startswith("expertier-")]
    assert (child / "memory.max").read_text() == "4096"
    assert (child / "memory.swap.max").read_text() == "0"


def test_v2_without_delegation_is_no_way(tmp_path: Path) -> None:
    own = tmp_path / "sys/fs/cgroup/a/b"
    own.mkdir(parents=True)
    for group in (own, own.parent):
        (group / "cgroup.subtree_control").write_text("cpu pids\n")
    with pytest.raises(OSError, match="not delegated"):
        V2Confinement(tmp_path, "0::/a/b\n").open(4096)


def test_v2_that_is_not_mounted_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no cgroup v2 hierarchy"):
        V2Confinement(tmp_path, "0::/\n").open(4096)


def test_a_scope_is_asked_of_systemd_and_watched_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module.shutil, "which", lambda name: f"/usr/bin/{name}")
    group = ScopeConfinement(user=True, root=tmp_path).open(4096)
    command = group.wrap(["program"])
    assert command[-2:] == ["--", "program"] and "--user" in command and "MemoryMax=4096" in command
    scope = tmp_path / "sys/fs/cgroup/user.slice/expertier-1-1.scope"
    scope.mkdir(parents=True)
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/cgroup").write_text("0::/user.slice/session-1.scope\n")
    group.watch(7)
    assert group.usage().peak_bytes is None
    (tmp_path / "proc/7/cgroup").write_text("0::/user.slice/expertier-1-1.scope\n")
    (scope / "memory.peak").write_text("99\n")
    (scope / "memory.events").write_text("low 0\noom_kill 1\n")
    group.watch(7)
    group.watch(8)  # already gone
    assert (group.usage().peak_bytes, group.usage().oom_kills) == (99, 1)


def test_every_way_that_does_not_work_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidden:
        name = "forbidden way"

        def open(self, limit: int | None) -> Any:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(limits_module, "confinements", lambda: [Forbidden()])
    assert find_confinement() == (None, {"forbidden way": "Permission denied"})


@pytest.mark.root
def test_the_kernel_enforces_a_limit_and_counts_the_kill() -> None:
    way, reasons = find_confinement()
    if way is None:
        pytest.skip(f"no memory limit can be set here: {reasons}")
    import subprocess

    group = way.open(64 << 20)
    try:
        command = group.wrap([sys.executable, "-c", "import time; data = b'x' * (256 << 20); time.sleep(1)"])
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            group.watch(process.pid)
        assert process.returncode == -9
        usage = group.usage()
        assert usage.peak_bytes is None or 0 < usage.peak_bytes <= 64 << 20
    finally:
        group.close()
    path = getattr(group, "path", None)
    assert path is None or not path.exists()


# ---- readahead and page cache


def fake_readahead(root: Path, model: Path, value: int = 8192) -> Path:
    device = os.stat(model).st_dev
    control = root / f"sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    control.parent.mkdir(parents=True)
    control.write_text(f"{value}\n")
    return control


def test_readahead_is_restored_whatever_happens(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.touch()
    control = fake_readahead(tmp_path / "root", model)
    readahead = Readahead(model, tmp_path / "root")
    with pytest.raises(KeyboardInterrupt), readahead.at(128):
        assert control.read_text() == "128"
        raise KeyboardInterrupt
    assert readahead.value() == 8192
    with readahead.at(None):
        assert readahead.value() == 8192


def test_a_filesystem_without_readahead_is_said_so(tmp_path: Path) -> None:
    readahead = Readahead(Path(__file__), tmp_path)
    assert readahead.value() is None
    assert "no readahead" in readahead.obstacle()
    with readahead.at(128):
        pass


class FailingAdapter:
    """An engine whose worker runs a given program."""

    name = engine = "failing"

    def __init__(self, program: str) -> None:
        self._program = program

    def worker_command(self) -> list[str]:
        return [sys.executable, "-c", self._program]


def runner(program: str, model: Path, root: Path, timeout: float = 30.0) -> Runner:
    workload = Workload(model=model, files=(model,), job={}, wait_policy="passive", timeout=timeout)
    return Runner(FailingAdapter(program), workload, None, Readahead(model, root))  # type: ignore[arg-type]


STOCK = dataclasses.replace(arm("stock", None, []), readahead_kb=128)


def test_readahead_is_set_during_a_run_and_restored_after_one_that_fails(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.write_bytes(b"x" * 5000)
    control = fake_readahead(tmp_path / "root", model)
    program = f"import sys; sys.exit('seen ' + open({str(control)!r}).read())"
    run = runner(program, model, tmp_path / "root").run(STOCK, 0)
    assert run.status == "failed" and run.reason == "exit code 1: seen 128"
    assert control.read_text().strip() == "8192"


@pytest.mark.parametrize(
    ("program", "status", "named"),
    [
        ("print('no record')", "failed", "record"),
        ("print('{}')", "failed", "record"),
        ("""print('{"status": "ok", "figures": {"load_seconds": 1}}')""", "failed", "record"),
        ("""print('{"status": "refused", "reason": "BudgetError: too small"}')""", "refused", "BudgetError"),
        ("import os; os.kill(os.getpid(), 11)", "failed", "signal 11"),
        ("import time; time.sleep(60)", "timeout", "longer than"),
    ],
)
def test_a_worker_that_brings_no_figures_gets_a_status_and_a_reason(
    tmp_path: Path, program: str, status: str, named: str
) -> None:
    model = tmp_path / "model"
    model.write_bytes(b"x")
    run = runner(program, model, tmp_path, timeout=1.5 if status == "timeout" else 60.0).run(STOCK, 0)
    assert (run.status, run.figures) == (status, None)
    assert named in run.reason


def test_an_arm_that_did_not_end_well_is_not_repeated_and_neighbours_change(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.write_bytes(b"x")
    good = json.dumps({"status": "ok", "figures": dataclasses.asdict(figures(0.1))})
    program = (
        f"import json, sys; job = json.load(sys.stdin)\nprint({good!r}) if job['settings'].get('good') else sys.exit(1)"
    )
    arms = [
        dataclasses.replace(arm(key, None, []), settings={"good": key != "bad"})
        for key in ("stock", "bad", "stock-plain")
    ]
    started: list[tuple[str, int]] = []
    done = runner(program, model, tmp_path).run_all(
        [*arms, NOT_RUN],
        4,
        lambda item, repeat: started.append((item.key, repeat)),
        lambda item, run: None,
        lambda repeat: None,
    )
    assert started[:3] == [("stock", 0), ("bad", 0), ("stock-plain", 0)]
    rest = [("stock", 3), ("stock-plain", 3)]
    assert started[3:] == [("stock-plain", 1), ("stock", 1), ("stock-plain", 2), ("stock", 2), *rest]
    assert [(item.status, len(item.runs)) for item in done] == [("ok", 4), ("failed", 1), ("ok", 4), ("not run", 0)]


def test_the_users_own_options_do_not_leak_into_an_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTIER_POLICY", "lru")
    model = tmp_path / "model"
    model.write_bytes(b"x")
    program = "import os, sys; sys.exit(' '.join(sorted(k for k in os.environ if k.startswith(('EXPERT', 'OMP')))))"
    assert runner(program, model, tmp_path).run(STOCK, 0).reason.endswith(": EXPERTIER_CACHE OMP_WAIT_POLICY")


def test_a_dropped_file_is_out_of_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(1 << 20))
    assert cached_bytes(path) == 1 << 20
    left = drop_caches([path])
    assert left is not None and left < 1 << 20
    (tmp_path / "empty").touch()
    assert cached_bytes(tmp_path / "empty") == 0
