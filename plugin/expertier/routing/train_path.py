"""Training of the route path network; the only part of the core that uses torch."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from expertier.routing.path import PathShape
from expertier.routing.path_network import PathNetwork, to_arrays
from expertier.routing.path_start import start_from_counts
from expertier.routing.predictor import HORIZONS
from expertier.routing.table import TokenCounts
from expertier.routing.windows import Windows

_MOST_CELLS = 1 << 22  # numbers in one multi-label table of a batch
_UNTOLD = 0.3  # share of windows whose beginning, like a prompt, is read without being told its routes
# Matrix products are two to three times as fast where the processor has instructions for it; all else stays float32.
_HALF = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
_USUAL_WIDTH = 192  # for which the learning rate is meant
_WORTH_THREADS = 1 << 18
_LEAST_STEPS = 32  # of an epoch, if the text allows
_SOON_WEIGHT = 0.5  # of the three horizons together, against the present step


@dataclass(frozen=True, kw_only=True)
class PathTraining:
    """How long and how fast.

    Attributes
    ----------
    seconds : float
        Most time; the learning rate falls to 0 by then.
    epochs : int
        Most passes over the text.
    learning_rate, weight_decay : float
        Of AdamW; a narrower network learns in larger steps.
    batch : int
        Windows in a batch, fewer for models with very many experts.
    patience : int
        Checks on text kept back without a gain after which training ends.
    seed : int
        Of everything random.
    """

    seconds: float = 300.0
    epochs: int = 20
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    batch: int = 16
    patience: int = 4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class PathResult:
    """A trained network.

    Attributes
    ----------
    shape : PathShape
        Its sizes.
    weights : dict of str to ndarray of float32
        For :class:`expertier.routing.path.PathScorer`.
    loss : float
        Best on the text kept back.
    tokens : int
        That were read, repetitions included.
    seconds : float
        It took.
    """

    shape: PathShape
    weights: dict[str, NDArray[np.float32]]
    loss: float
    tokens: int
    seconds: float


def train_path(
    shape: PathShape,
    learn: Windows,
    keep: Windows,
    *,
    counts: TokenCounts,
    settings: PathTraining | None = None,
    embedding: NDArray[np.float32] | None = None,
    progress: Callable[[float, str], None] = lambda share, words: None,
) -> PathResult:
    """Train a network on windows of text.

    Parameters
    ----------
    shape : PathShape
        Sizes.
    learn, keep : Windows
        To learn from, and to tell when to stop.
    counts : TokenCounts
        Of the tokens of `learn`.
    settings : PathTraining, optional
        How long.
    embedding : ndarray of float32, shape (vocabulary, hidden), optional
        The model's token embedding to start from.
    progress : callable
        Told the share that is done and how it goes.
    """
    settings = settings or PathTraining()
    threads = torch.get_num_threads()
    if learn.width * settings.batch * shape.width < _WORTH_THREADS:
        torch.set_num_threads(1)  # handing such small pieces around takes longer than computing them
    try:
        return _train(shape, learn, keep, counts, settings, embedding, progress)
    finally:
        torch.set_num_threads(threads)


def _train(
    shape: PathShape,
    learn: Windows,
    keep: Windows,
    counts: TokenCounts,
    settings: PathTraining,
    embedding: NDArray[np.float32] | None,
    progress: Callable[[float, str], None],
) -> PathResult:
    torch.manual_seed(settings.seed)
    random = np.random.default_rng(settings.seed)
    network = PathNetwork(shape)
    with torch.no_grad():
        start_from_counts(network, learn, counts, embedding)
    decaying = [p for name, p in network.named_parameters() if p.ndim == 2 and "embedding" not in name]
    other = [p for name, p in network.named_parameters() if not (p.ndim == 2 and "embedding" not in name)]
    rate = settings.learning_rate * (_USUAL_WIDTH / shape.width) ** 0.5
    optimiser = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": settings.weight_decay}, {"params": other, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
    )
    per_batch = min(settings.batch, max(4, len(learn) // _LEAST_STEPS))  # of little text, more and smaller steps
    per_batch = max(1, min(per_batch, _MOST_CELLS // (learn.width * shape.layers * shape.experts)))
    steps_an_epoch = math.ceil(len(learn) / per_batch)
    check_every = max(20, min(steps_an_epoch, 100))
    started = time.perf_counter()
    best, best_loss, bad, step, read = to_arrays(copy.deepcopy(network)), math.inf, 0, 0, 0
    total = settings.epochs * steps_an_epoch
    done = False
    for _ in range(settings.epochs):
        order = random.permutation(len(learn))
        for start in range(0, len(order), per_batch):
            share = max(step / total, (time.perf_counter() - started) / settings.seconds)
            done = share >= 1.0
            if step and step % 10 == 0:
                progress(min(share, 1.0), "")
            if step % check_every == 0 or done:  # at 0, too: what was counted may be hard to beat with little text
                loss = _loss_on(network, keep, per_batch)
                improved = loss < best_loss
                bad = 0 if improved else bad + 1
                if improved:
                    best, best_loss = to_arrays(copy.deepcopy(network)), loss
                progress(min(share, 1.0), f"loss {loss:.4f} on text kept back")
                done = done or bad > settings.patience
            if done:
                break
            warm = min(1.0, (step + 1) / 50)
            for group in optimiser.param_groups:
                group["lr"] = rate * warm * max(0.02, 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))
            rows = order[start : start + per_batch]
            loss_now = _loss(network, learn, rows, _told(random, len(rows), learn.width))
            optimiser.zero_grad(set_to_none=True)
            loss_now.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            step += 1
            read += len(rows) * learn.width
        if done:
            break
    if not done or best_loss == math.inf:
        loss = _loss_on(network, keep, per_batch)
        if loss < best_loss:
            best, best_loss = to_arrays(network), loss
    return PathResult(shape=shape, weights=best, loss=best_loss, tokens=read, seconds=time.perf_counter() - started)


def _batch_of(windows: Windows, rows: NDArray[np.int64], cells: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, uses, targets, and what of the targets is known, of some windows."""
    tokens = torch.from_numpy(windows.tokens[rows])
    used = torch.from_numpy(windows.used(rows))
    known = torch.from_numpy(windows.known[rows]).float()
    layers = known.shape[-1]
    per_layer = known.repeat_interleave(cells // layers, -1)
    targets, valid = [used], [per_layer]
    sums = functional.pad(used.cumsum(1), (0, 0, 1, 0))
    seen = functional.pad(known.cumsum(1), (0, 0, 1, 0))
    count = used.shape[1]
    for horizon in HORIZONS:
        stop = torch.arange(1, count + 1) + horizon
        inside = stop <= count
        later = stop.clamp(max=count)
        targets.append(((sums[:, later] - sums[:, 1:]) > 0).float())
        whole = (seen[:, later] - seen[:, 1:] == horizon) & inside[None, :, None]
        valid.append(whole.float().repeat_interleave(cells // layers, -1))
    return tokens, used, torch.stack(targets, 2), torch.stack(valid, 2)


def _told(random: np.random.Generator, count: int, width: int) -> Tensor:
    """Return of which tokens the network is told the routes, shape ``(count, width, 1)``."""
    silent = np.where(random.random(count) < _UNTOLD, random.integers(0, width + 1, count), 0)
    return torch.from_numpy((np.arange(width) >= silent[:, None]).astype(np.float32)[..., None])


def _loss(network: PathNetwork, windows: Windows, rows: NDArray[np.int64], told: Tensor) -> Any:
    shape = network.shape
    tokens, used, targets, valid = _batch_of(windows, rows, shape.layers * shape.experts)
    with torch.autocast("cpu", torch.bfloat16, enabled=_HALF):
        logits = network(tokens, used, told)
    losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none") * valid
    parts = losses.sum((0, 1, 3)) / valid.sum((0, 1, 3)).clamp(min=1.0)
    return parts[0] + _SOON_WEIGHT * parts[1:].mean()


def _loss_on(network: PathNetwork, windows: Windows, per_batch: int) -> float:
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(windows), per_batch):
            rows = np.arange(start, min(start + per_batch, len(windows)))
            total += float(_loss(network, windows, rows, torch.ones(len(rows), 1, 1))) * len(rows)
            count += len(rows)
    return total / max(count, 1)
