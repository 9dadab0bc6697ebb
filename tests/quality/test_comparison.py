"""Lossy arms of a comparison: which they are, and what they are judged by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from expertier.comparison.quality import DecodedLogits, LogitsFolder, is_lossy, judge
from expertier.comparison.records import ArmRecord, Figures, Run
from expertier.errors import ExpertierError

FIGURES = Figures(
    load_seconds=1.0,
    ttft_long_seconds=1.0,
    ttft_short_seconds=(1.0,),
    token_seconds=(1.0,),
    peak_rss_bytes=1,
    read_bytes=1,
    decode_read_bytes=1,
    tokens_digest="t",
    logits_digest="l",
    choices=(1,),
    kernels="plain",
)


def arm(key: str, *, lossy: bool = False, ours: bool = True, repeats: int = 1, kernels: str = "plain") -> ArmRecord:
    figures = replace(FIGURES, kernels=kernels)
    runs = tuple(Run(repeat=repeat, status="ok", figures=figures) for repeat in range(repeats))
    return ArmRecord(key=key, label=key, ours=ours, limit_bytes=None, limit="33%", settings={}, lossy=lossy, runs=runs)


def write(path: str, noise: float, following: int = 3) -> NDArray[np.float32]:
    rng = np.random.default_rng(1)
    rows = rng.normal(0, 1, (40, 16)).astype(np.float32)
    rows += np.float32(noise) * rng.normal(0, 1, rows.shape).astype(np.float32)
    file = DecodedLogits({"logits": path})
    for position, row in enumerate(rows):
        file.add(position // 10, following, row)
    file.close()
    return rows


@pytest.mark.parametrize(
    ("settings", "lossy"),
    [
        ({}, False),
        ({"virtual_bias": 0.0}, False),
        ({"quality_budget": "exact"}, False),
        ({"quality_budget": "0"}, False),
        ({"virtual_bias": 0.1}, True),
        ({"virtual_hard": "on"}, True),
        ({"quality_budget": "1%"}, True),
        ({"quality_budget": "0.2"}, True),
    ],
)
def test_what_may_compute_something_else_is_lossy(settings: dict[str, Any], lossy: bool) -> None:
    assert is_lossy(settings) is lossy


def test_equal_logits_lose_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(str(tmp_path / name), 0.0)
    found = judge(tmp_path / "a", tmp_path / "b", FIGURES)
    assert (found.kl, found.agreement, found.tokens) == (0.0, 1.0, 40)
    assert found.increase.low == found.increase.high == 0.0


def test_other_logits_lose_what_the_tokens_say(tmp_path: Path) -> None:
    exact, lossy = write(str(tmp_path / "a"), 0.0), write(str(tmp_path / "b"), 0.3)
    found = judge(tmp_path / "b", tmp_path / "a", FIGURES)

    def entropy(rows: NDArray[np.float32]) -> float:
        return float(np.mean(np.log(np.exp(rows.astype(float)).sum(1)) - rows[:, 3]))

    assert found.cross_entropy == pytest.approx(entropy(lossy), rel=1e-5)
    assert found.exact_cross_entropy == pytest.approx(entropy(exact), rel=1e-5)
    assert found.kl > 0
    assert found.increase.middle == pytest.approx(np.expm1(entropy(lossy) - entropy(exact)), rel=1e-3, abs=1e-6)


def test_logits_of_other_tokens_are_refused(tmp_path: Path) -> None:
    write(str(tmp_path / "a"), 0.0)
    write(str(tmp_path / "b"), 0.0, following=4)
    with pytest.raises(ExpertierError, match="different tokens"):
        judge(tmp_path / "a", tmp_path / "b", FIGURES)


def test_a_lossy_run_is_judged_by_an_exact_one_with_the_same_kernels(tmp_path: Path) -> None:
    folder = LogitsFolder(tmp_path)
    stock, other = arm("stock", ours=False), arm("stock-repacked", ours=False, kernels="repacked")
    lossy = arm("expertier-quality-1%", lossy=True, repeats=2)
    for one in (stock, other, lossy):
        for run in one.runs:
            write(folder.job(one, run.repeat)["logits"], 0.5 if one.lossy else 0.0)
            folder.done(one, run)
    judged = folder.judged([other, lossy, stock])[1]
    assert all(run.figures is not None and run.figures.quality is not None for run in judged.runs)
    alone = folder.judged([other, lossy])[1]
    assert all(run.figures is not None and run.figures.quality is None for run in alone.runs)


def test_only_the_first_exact_repeat_is_kept_and_nothing_is_written_without_lossy_arms(tmp_path: Path) -> None:
    folder, exact = LogitsFolder(tmp_path), arm("expertier", repeats=3)
    for run in exact.runs:
        write(folder.job(exact, run.repeat)["logits"], 0.0)
        folder.done(exact, run)
    assert len(list(tmp_path.iterdir())) == 1
    assert LogitsFolder(None).job(exact, 0) == {}
