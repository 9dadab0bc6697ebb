"""An engine of vLLM in this process, driven step by step: what ``expertier run`` and one run of a comparison need.

Upstream, all of it public: ``vllm.LLM`` and its ``llm_engine`` (``add_request``, ``step``,
``has_unfinished_requests``), ``SamplingParams``, and the environment variables named here. Importing this module
imports no vLLM.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from expertier.errors import ExpertLoadError
from expertier_vllm.offloaders import no_device
from expertier_vllm.options import KEY

GIVEN_TOKENS: Final = "expertier_vllm.given:GivenTokens"
"""Logits processor that :class:`GivenTexts` needs."""


def prepare_environment(threads: int) -> None:
    """Set what vLLM reads when it is imported; what the user has set is left as it is.

    Parameters
    ----------
    threads : int
        Compute threads.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    # The scheduler in this process: what is added between two steps is in the next one, so that the same requests make
    # the same batches in every run. The worker stays a process of its own.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # where a device is, it would be refused with Expertier
    # It would win over the size of the KV cache given below.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)


def open_engine(
    model: Path,
    options: Mapping[str, Any] | None,
    *,
    context: int,
    step_tokens: int,
    requests: int,
    cache_bytes: int,
    eager: bool = True,
    processors: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
) -> Any:
    """Construct a ``vllm.LLM``.

    Parameters
    ----------
    model : Path
        Directory of the checkpoint.
    options : mapping or None
        Options of Expertier; ``None`` for stock.
    context : int
        Most tokens of a request.
    step_tokens : int
        Most tokens of a forward pass; longer prompts take several.
    requests : int
        Most requests at a time.
    cache_bytes : int
        Size of the KV cache.
    eager : bool
        Without ``torch.compile``.
    processors : sequence of str
        Logits processors.
    more : mapping, optional
        Further arguments of the engine.

    Raises
    ------
    ExpertierError
        Expertier was asked for and cannot take over.
    """
    from vllm import LLM

    given = {name: value for name, value in (options or {}).items() if value is not None}
    with _stdout_is_stderr():
        return LLM(
            model=str(model),
            max_model_len=context,
            max_num_batched_tokens=max(step_tokens, requests),
            max_num_seqs=requests,
            kv_cache_memory_bytes=cache_bytes,
            enforce_eager=eager,
            distributed_executor_backend="mp",
            # A prompt that was seen before would cost nothing the second time.
            enable_prefix_caching=False,
            logits_processors=list(processors) or None,
            additional_config={} if options is None else {KEY: given},
            seed=0,
            # Of a device's kernels only this one is managed, and stock is to compute with the same.
            **({} if no_device() else {"moe_backend": "triton"}),
            **(more or {}),
        )


@contextlib.contextmanager
def _stdout_is_stderr() -> Iterator[None]:
    """Let processes that are started meanwhile print to stderr: stdout is for what the user asked for."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@dataclass
class Answer:
    """What one request got.

    Attributes
    ----------
    tokens : list of int
        In order.
    at : list of float
        When each of them came, in seconds since the requests were made. Only time inside the engine counts.
    """

    tokens: list[int] = field(default_factory=list)
    at: list[float] = field(default_factory=list)


class Steps:
    """Serves requests that are made at the same moment, one forward pass at a time.

    Parameters
    ----------
    llm : vllm.LLM
        The engine.
    prompts : sequence of sequence of int
        Tokens of each prompt.
    parameters : vllm.SamplingParams or list of them
        The same for all, or one for each.

    Attributes
    ----------
    answers : list of Answer
        In the order of the prompts; grows while one iterates.
    seconds : float
        Time spent inside the engine so far.
    """

    def __init__(self, llm: Any, prompts: Sequence[Sequence[int]], parameters: Any) -> None:
        self._engine = llm.llm_engine
        self.answers = [Answer() for _ in prompts]
        begin = time.perf_counter()
        # The engine gives requests names of its own inside, and ours back in its answers.
        own = parameters if isinstance(parameters, list) else [parameters] * len(prompts)
        for index, prompt in enumerate(prompts):
            self._engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, own[index])
        self.seconds = time.perf_counter() - begin

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield what each forward pass gave.

        Raises
        ------
        ExpertLoadError
            As for :func:`check_answered`.
        """
        while self._engine.has_unfinished_requests():
            begin = time.perf_counter()
            outputs = self._engine.step()
            self.seconds += time.perf_counter() - begin
            for output in outputs:
                check_answered(output)
                answer = self.answers[int(output.request_id)]
                new = output.outputs[0].token_ids[len(answer.tokens) :]
                answer.tokens += new
                answer.at += [self.seconds] * len(new)
            yield outputs


class GivenTexts:
    """Texts forced upon an engine at the same moment, token by token, and what the model would have said instead.

    Parameters
    ----------
    llm : vllm.LLM
        An engine with :data:`GIVEN_TOKENS`.
    texts : sequence of sequence of int
        Tokens of each text.
    prompt : int
        So many of a text's tokens are computed as its prompt.

    Attributes
    ----------
    answers : list of Answer
        As of :class:`Steps`: one token for each of a text's from the last of its prompt on.
    """

    def __init__(self, llm: Any, texts: Sequence[Sequence[int]], *, prompt: int) -> None:
        self._llm = llm
        self._texts = [list(text) for text in texts]
        self._prompt = prompt
        self._vocabulary = int(llm.llm_engine.model_config.get_vocab_size())
        self._files: list[Path] = []
        self.answers: list[Answer] = []

    def __iter__(self) -> Iterator[None]:
        """Yield after every step that said something."""
        with tempfile.TemporaryDirectory(prefix="expertier-logits-") as folder:
            self._files = [Path(folder) / str(index) for index in range(len(self._texts))]
            prompts = [text[: self._prompt] for text in self._texts]
            steps = Steps(self._llm, prompts, list(map(self._parameters, self._texts, self._files)))
            self.answers = steps.answers
            for outputs in steps:
                if outputs:
                    yield

    def _parameters(self, text: list[int], file: Path) -> Any:
        from vllm import SamplingParams

        from expertier_vllm.given import GIVEN, LOGITS

        file.touch()
        rest = text[self._prompt :]
        return SamplingParams(
            temperature=0.0,
            max_tokens=len(rest) + 1,  # what is sampled last is not computed
            ignore_eos=True,
            detokenize=False,
            extra_args={GIVEN: rest, LOGITS: str(file)},
        )

    def logits(self, text: int = 0) -> NDArray[np.float32]:
        """What was said of a text last, shape ``(vocabulary,)``; to be asked for while one iterates."""
        place = 4 * (len(self.answers[text].tokens) - 1) * self._vocabulary
        return np.fromfile(self._files[text], np.float32, self._vocabulary, offset=place)


def check_answered(output: Any) -> None:
    """Raise why a request was ended, if it was: to the engine it is over like any other, with the text it had got.

    Upstream: ``finish_reason`` and ``stop_reason``, in which our scheduler leaves the cause.

    Raises
    ------
    ExpertLoadError
        An expert could not be loaded, or another failure of its step.
    """
    answer = output.outputs[0]
    if answer.finish_reason == "error":
        raise ExpertLoadError(f"Request {output.request_id} failed: {answer.stop_reason}")


def greedy(tokens: int) -> Any:
    """Parameters that always take the likeliest token, for exactly so many tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
