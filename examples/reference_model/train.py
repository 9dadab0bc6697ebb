"""Training the base model for a given time, and measuring what came out."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch.nn import functional

from reference_model.config import ReferenceConfig
from reference_model.corpus import Corpus
from reference_model.model import ReferenceModel
from reference_model.tokenizer import END_OF_TEXT

_SEQUENCE, _BATCH = 256, 2
_PEAK_RATE, _WARM_UP = 4e-3, 0.06
_CONSOLE = Console(stderr=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What held-out text shows.

    Attributes
    ----------
    loss : dict of str to float
        Cross-entropy in nats per token, by domain.
    bits_per_byte : dict of str to float
        The same per byte of text, comparable between tokenizers.
    hottest_quarter : list of float
        By layer, the share of routes that goes to the most used quarter of experts; 0.25 if all are used alike.
    entropy_bits : list of float
        By layer, entropy of expert use in bits.
    repeated : list of float
        By layer, the share of a token's experts that the token before it used too.
    """

    loss: dict[str, float]
    bits_per_byte: dict[str, float]
    hottest_quarter: list[float]
    entropy_bits: list[float]
    repeated: list[float]


def encode(tokenizer: Tokenizer, texts: Mapping[str, list[str]]) -> dict[str, NDArray[np.uint16]]:
    """Return one stream of token ids per domain, every text ended by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return {
        domain: np.fromiter(
            itertools.chain.from_iterable([*encoding.ids, end] for encoding in tokenizer.encode_batch(list(some))),
            np.uint16,
        )
        for domain, some in texts.items()
    }


def train(
    config: ReferenceConfig,
    tokenizer: Tokenizer,
    corpus: Corpus,
    *,
    minutes: float,
    seed: int = 0,
    progress: bool = True,
) -> tuple[ReferenceModel, int]:
    """Train a model from scratch for a stretch of wall-clock time.

    The learning rate follows the elapsed share of the time, so that a slow machine ends with a finished schedule too.
    Data and initial weights depend on `seed` alone; how many steps fit in depends on the machine.

    Parameters
    ----------
    config : ReferenceConfig
        The shape.
    tokenizer : Tokenizer
        Trained on the same corpus.
    corpus : Corpus
        Only its training side is read.
    minutes : float
        Time for the training loop.
    seed : int
        Seed of weights and of the order of text.
    progress : bool
        Show a progress bar on standard error.

    Returns
    -------
    ReferenceModel
        Ready for evaluation.
    int
        Tokens it was trained on.
    """
    torch.set_num_threads(_threads())
    model = ReferenceModel(config)
    model.initialise(seed)
    batches = _batches(encode(tokenizer, corpus.train), seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=_PEAK_RATE, betas=(0.9, 0.95), eps=1e-9, fused=True)
    # The coefficient is meant for a balance loss that counts every one of a token's experts.
    balance = config.router_aux_loss_coef * config.num_experts_per_tok
    start = time.monotonic()
    smooth, seen = math.nan, 0
    columns = [
        TextColumn("training"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s  ETA"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=_CONSOLE, disable=not progress, transient=False) as bar:
        task = bar.add_task("", total=1.0, loss=math.nan, speed=0.0)
        done = 0.0
        while done < 1.0:
            for group in optimiser.param_groups:
                group["lr"] = _PEAK_RATE * _schedule(done)
            tokens = next(batches)
            output = model(tokens[:, :-1])
            scores = model.logits(output.hidden).flatten(0, 1)
            loss = functional.cross_entropy(scores, tokens[:, 1:].flatten())
            # Stronger at first: before experts differ, a few of them would attract everything.
            (loss + balance * (1.0 + 4.0 * (1.0 - done)) * output.balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            seen += tokens[:, 1:].numel()
            smooth = loss.item() if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss.item()
            elapsed = time.monotonic() - start
            done = elapsed / (60 * minutes) if minutes > 0 else 1.0
            bar.update(task, completed=min(done, 1.0), loss=smooth, speed=seen / elapsed)
    return model.eval(), seen


def _threads() -> int:
    return max(1, min(8, len(os.sched_getaffinity(0))))


def _schedule(done: float) -> float:
    if done < _WARM_UP:
        return 0.05 + 0.95 * done / _WARM_UP
    return max(0.02, (1.0 - done) / (1.0 - _WARM_UP))


def _batches(streams: Mapping[str, NDArray[np.uint16]], seed: int) -> Iterator[torch.Tensor]:
    """Yield token ids of shape ``(batch, sequence + 1)`` for ever."""
    random = np.random.default_rng(seed)
    usable = [stream for _, stream in sorted(streams.items()) if len(stream) > _SEQUENCE + 1]
    # The root keeps large domains from drowning small ones, and small ones from being learnt by heart.
    weights = np.sqrt([len(stream) for stream in usable])
    weights /= weights.sum()
    while True:
        rows = []
        for domain in random.choice(len(usable), _BATCH, p=weights):
            start = int(random.integers(len(usable[domain]) - _SEQUENCE - 1))
            rows.append(usable[domain][start : start + _SEQUENCE + 1].astype(np.int64))
        yield torch.from_numpy(np.stack(rows))


@torch.inference_mode()
def evaluate(
    model: ReferenceModel, tokenizer: Tokenizer, corpus: Corpus, *, sequences: int = 8, length: int = 256
) -> Evaluation:
    """Measure loss and routing on held-out text.

    Parameters
    ----------
    sequences : int
        Texts per domain.
    length : int
        Tokens per text.
    """
    config = model.config
    loss: dict[str, float] = {}
    per_byte: dict[str, float] = {}
    used = torch.zeros(config.num_hidden_layers, config.num_experts)
    repeated = []
    for domain in corpus.domains:
        nats = count = size = 0.0
        for text in itertools.islice((t for t in corpus.held_out[domain] if len(t) > 8 * length), sequences):
            ids = tokenizer.encode(text[len(text) // 3 :][: 8 * length]).ids[: length + 1]
            if len(ids) < 2:
                continue
            tokens = torch.tensor([ids])
            output = model(tokens[:, :-1])
            scores = model.logits(output.hidden)[0]
            nats += functional.cross_entropy(scores, tokens[0, 1:], reduction="sum").item()
            count += len(ids) - 1
            size += len(tokenizer.decode(ids[1:]).encode())
            chosen = functional.one_hot(output.routes, config.num_experts).sum(2)
            used += chosen.sum(1)
            repeated.append((chosen[:, 1:] * chosen[:, :-1]).sum(-1).float().mean(1) / config.num_experts_per_tok)
        if count:
            loss[domain] = nats / count
            per_byte[domain] = nats / math.log(2) / size
    share = used / used.sum(1, keepdim=True)
    hottest = share.sort(1, descending=True).values[:, : max(1, config.num_experts // 4)].sum(1)
    entropy = -(share * share.clamp_min(1e-12).log2()).sum(1)
    return Evaluation(
        loss=loss,
        bits_per_byte=per_byte,
        hottest_quarter=hottest.tolist(),
        entropy_bits=entropy.tolist(),
        repeated=torch.stack(repeated).mean(0).tolist() if repeated else [],
    )
