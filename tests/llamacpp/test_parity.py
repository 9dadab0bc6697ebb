"""Expertier computes what the stock engine computes: every logit of every row is the same, bit by bit."""

from __future__ import annotations

import gc
import os
import pickle
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from expertier.errors import ModelNotFoundError, RequestError, UnsupportedOptionError
from expertier_llamacpp import BatchEngine, Llama
from expertier_llamacpp.batch.view import RequestView
from llamacpp.engines import (
    PROMPT,
    TEXT,
    Kernels,
    closing,
    expertier,
    last_logits,
    settings,
    sizes,
    stock_trace,
    stock_twin,
    trace,
)
from support.tiny_gguf import ARCHITECTURES, TinySpec

pytestmark = pytest.mark.engine

TinyModel = Callable[[TinySpec], Path]
PLAIN = TinySpec(experts=16)


@pytest.fixture
def plain(tiny_model: TinyModel) -> Path:
    return tiny_model(PLAIN)


@pytest.fixture(scope="module")
def plain_rows(tiny_model: TinyModel) -> list[bytes]:
    return stock_trace(tiny_model(PLAIN))


# ---- models


@pytest.mark.parametrize(
    ("architecture", "expert_type"),
    [
        (architecture, expert_type)
        for architecture in ARCHITECTURES
        for expert_type in ("F16", "Q8_0", "MXFP4" if architecture == "gpt-oss" else "Q4_K")
    ],
)
def test_every_architecture_gives_the_logits_of_the_stock_engine_at_every_budget(
    tiny_model: TinyModel, architecture: str, expert_type: str
) -> None:
    path = tiny_model(TinySpec(architecture=architecture, expert_type=expert_type, experts=16))
    need = sizes(path)
    expected = stock_trace(path)
    for budget in (need.layer, max(need.layer, need.total // 2), "100%"):
        with closing(expertier(path, budget)) as llm:
            assert trace(llm) == expected
            stats = llm.offload.stats()
            assert stats.peak_resident_bytes <= stats.budget_bytes
            assert stats.decode.tokens == 16
            if budget == need.layer:
                assert stats.evictions > 0


@pytest.mark.parametrize("architecture", ["deepseek2", "hy_v3"])  # llama.cpp leaves such a layer out; it allocates it
def test_experts_of_layers_that_predict_further_tokens_stay_on_storage(
    tiny_model: TinyModel, architecture: str
) -> None:
    path = tiny_model(TinySpec(architecture=architecture, layers=4, experts=16, idle_layers=1))
    with closing(expertier(path, "50%")) as llm:
        assert trace(llm) == stock_trace(path)
        assert [layer.layer for layer in llm.catalog.layers] == [1, 2]
        assert llm.offload.stats().total_experts == 32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("expert_type", ["Q8_0", "Q4_K"])
def test_repacked_kernels_give_the_logits_of_the_default_stock_engine(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, expert_type: str
) -> None:
    path = tiny_model(TinySpec(architecture=architecture, expert_type=expert_type, experts=16))
    expected = stock_trace(path, "repacked")
    for _ in range(2):  # the first writes the sidecar, the second finds it
        with closing(expertier(path, sizes(path).layer, "repacked", expert_sidecar_dir=str(tmp_path))) as llm:
            assert trace(llm) == expected


@pytest.mark.parametrize(
    "spec",
    [
        TinySpec(hidden=96, feed_forward=160, experts=12, top_k=3, expert_type="Q4_0"),
        TinySpec(hidden=96, feed_forward=160, experts=12, top_k=3, expert_type="Q8_0", alignment=4096),
        TinySpec(hidden=96, feed_forward=96, expert_type="Q8_0", down_type="F16"),
        TinySpec(hidden=64, feed_forward=32, experts=32, expert_type="Q4_0", down_type="Q8_0", top_k=4),
        TinySpec(expert_type="Q4_K", down_type="Q6_K"),
        TinySpec(architecture="hy_v3", hidden=96, feed_forward=160, expert_type="Q4_0", down_type="Q8_0"),
        TinySpec(architecture="gpt-oss", hidden=96, feed_forward=160, expert_type="MXFP4", files=4),
        TinySpec(architecture="deepseek2", expert_type="Q4_K", down_type="Q5_K", files=7),
        TinySpec(hidden=96, feed_forward=160, alignment=64, files=3),
        TinySpec(layers=1, experts=16),
        TinySpec(layers=6, experts=16, top_k=1),
        TinySpec(experts=4, top_k=4),
        TinySpec(experts=128, feed_forward=32, expert_type="F16", top_k=8, skew=2.0),
    ],
    ids=lambda spec: (
        f"{spec.architecture}-{spec.hidden}x{spec.feed_forward}-{spec.expert_type}-{spec.down_type}"
        f"-{spec.layers}x{spec.experts}-top{spec.top_k}-{spec.files}files-{spec.alignment}"
    ),
)
@pytest.mark.parametrize(("io_mode", "kernels"), [("direct", "plain"), ("buffered", "plain"), ("direct", "repacked")])
def test_any_size_any_alignment_and_any_number_of_files_gives_the_same_logits(
    tiny_model: TinyModel, tmp_path: Path, kernels: Kernels, spec: TinySpec, io_mode: str
) -> None:
    path = tiny_model(spec)
    changes = {"expert_io_mode": io_mode, "expert_sidecar_dir": str(tmp_path)}
    with closing(expertier(path, sizes(path).layer, kernels, **changes)) as llm:
        assert trace(llm) == stock_trace(path, kernels)


# ---- settings


@pytest.mark.parametrize(
    "options",
    [
        *({"policy": policy} for policy in ("lru", "lfu", "lfru", "edge", "predictive")),
        {"policy": "lfu", "half_life": 2.0},
        {"lookahead": "on"},
        {"lookahead": "off"},
        {"io_mode": "buffered"},
        {"io_mode": "direct"},
        {"io_threads": 1},
        {"io_threads": 4, "lookahead": "on"},
    ],
    ids=str,
)
def test_no_option_changes_a_logit(plain: Path, plain_rows: list[bytes], options: dict[str, Any]) -> None:
    own = {f"expert_{name}": value for name, value in options.items()}
    with closing(expertier(plain, sizes(plain).layer, **own)) as llm:
        assert trace(llm) == plain_rows


@pytest.mark.parametrize(
    "changes",
    [
        {"n_ubatch": 8},
        {"n_ubatch": 1},
        {"n_ubatch": 512},
        {"n_batch": 7},
        {"n_threads": 2, "n_threads_batch": 2},
        {"flash_attn": True},
        {"type_k": 8, "flash_attn": True},
        {"offload_kqv": False},
        {"use_mmap": False},
        {"kv_overrides": {"qwen3moe.expert_used_count": 1}},
        {"kv_overrides": {"qwen3moe.expert_used_count": 5}},
    ],
    ids=str,
)
def test_settings_of_the_engine_work_as_in_the_stock_engine(plain: Path, changes: dict[str, Any]) -> None:
    with closing(expertier(plain, sizes(plain).layer, **changes)) as llm:
        assert trace(llm) == stock_trace(plain, **changes)


def test_a_budget_for_one_token_serves_single_tokens_and_micro_batches_of_one(plain: Path) -> None:
    with closing(expertier(plain, sizes(plain).token, n_ubatch=1)) as llm:
        assert trace(llm) == stock_trace(plain, n_ubatch=1)
        assert llm.offload.stats().peak_resident_bytes == sizes(plain).token


@pytest.mark.parametrize("kernels", ["plain", "repacked"])
def test_the_automatic_budget_gives_memory_back_between_steps_and_changes_no_logit(
    plain: Path, tmp_path: Path, kernels: Kernels
) -> None:
    prompts = [PROMPT, PROMPT[:1], PROMPT[::-1], PROMPT[:17], PROMPT * 2]
    changes = {"n_ctx": 256, "logits_all": True}

    def use(llm: llama_cpp.Llama) -> list[Any]:
        results: list[Any] = []
        for prompt in prompts:
            llm.reset()
            results.append(trace(llm, prompt, steps=4))
            results.append(llm.scores[: llm.n_tokens].tobytes())
        state = llm.save_state()
        llm.reset()
        llm.load_state(state)
        return [*results, trace(llm, PROMPT[:3], steps=4)]

    with closing(stock_twin(plain, kernels, **changes)) as llm:
        expected = use(llm)
    with closing(expertier(plain, "auto", kernels, expert_sidecar_dir=str(tmp_path), **changes)) as llm:
        assert use(llm) == expected


def test_a_hundred_percent_holds_every_expert(tiny_model: TinyModel) -> None:
    path = tiny_model(TinySpec(hidden=96, feed_forward=160, expert_type="Q4_0"))
    with closing(expertier(path, "100%")) as llm:
        trace(llm)
        before = llm.offload.stats()
        assert before.evictions == 0
        assert before.budget_bytes == before.total_bytes
        llm.reset()
        trace(llm)
        assert llm.offload.stats().bytes_read <= before.total_bytes * 1.3  # file bytes, page edges read twice


# ---- resizing while it runs


def test_the_budget_may_change_between_tokens(plain: Path, plain_rows: list[bytes]) -> None:
    need = sizes(plain)
    with closing(expertier(plain, need.total)) as llm:
        rows, tokens = [], PROMPT
        for budget in [need.total, need.layer, need.token, need.total // 2] * 4 + [need.token]:
            llm.eval(tokens)
            logits = last_logits(llm)
            rows.append(logits.tobytes())
            tokens = [int(logits.argmax())]
            llm.offload.resize(budget)
            assert llm.offload.stats().resident_bytes <= budget
        assert rows == plain_rows


def test_the_budget_may_change_from_another_thread_in_the_middle_of_a_token(plain: Path) -> None:
    need = sizes(plain)
    choice = random.Random(0)
    stop = threading.Event()
    failures: list[BaseException] = []

    def resize() -> None:
        try:
            while not stop.is_set():
                llm.offload.resize(choice.randrange(need.layer, need.total))
        except BaseException as error:
            failures.append(error)

    expected = stock_trace(plain, steps=60)
    with closing(expertier(plain, need.total)) as llm:
        resizer = threading.Thread(target=resize)
        resizer.start()
        try:
            assert trace(llm, steps=60) == expected
        finally:
            stop.set()
            resizer.join()
        assert not failures


# ---- several engines in one process


def test_a_model_may_be_named_in_every_way_a_file_can(
    plain: Path, plain_rows: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "ein Modell, gr\u00f6\u00dfer 100% (1).gguf"
    odd.symlink_to(plain)
    monkeypatch.chdir(tmp_path)
    for name in (str(odd), odd, odd.name, f"./{odd.name}"):
        with closing(Llama(name, expert_budget=sizes(plain).layer, expert_repack="off", **settings())) as llm:
            assert trace(llm) == plain_rows


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no file system in memory")
def test_a_file_system_in_memory_is_read_as_well(plain: Path, plain_rows: list[bytes]) -> None:
    copied = Path(shutil.copy(plain, f"/dev/shm/expertier-test-{os.getpid()}.gguf"))
    try:
        with closing(expertier(copied, sizes(plain).layer)) as llm:
            assert trace(llm) == plain_rows
    finally:
        copied.unlink()


def test_two_models_take_turns_in_one_process(tiny_model: TinyModel, plain: Path, plain_rows: list[bytes]) -> None:
    other = tiny_model(TinySpec(architecture="olmoe", experts=16, expert_type="Q4_K"))
    with (
        closing(expertier(plain, sizes(plain).layer)) as first,
        closing(expertier(other, sizes(other).layer)) as second,
    ):
        rows: dict[int, list[bytes]] = {0: [], 1: []}
        tokens = [PROMPT, PROMPT]
        for _ in range(17):
            for index, llm in enumerate((first, second)):
                llm.eval(tokens[index])
                logits = last_logits(llm)
                rows[index].append(logits.tobytes())
                tokens[index] = [int(logits.argmax())]
        assert rows[0] == plain_rows
        assert rows[1] == stock_trace(other)


def test_two_models_generate_at_the_same_time(plain: Path) -> None:
    expected = stock_trace(plain, steps=40)
    results: dict[int, list[bytes]] = {}
    with closing(*(expertier(plain, sizes(plain).layer) for _ in range(2))) as models:
        threads = [
            threading.Thread(target=lambda i=index, m=llm: results.update({i: trace(m, steps=40)}))
            for index, llm in enumerate(models)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {0: expected, 1: expected}


def test_a_stock_model_constructed_at_the_same_time_stays_stock(plain: Path, plain_rows: list[bytes]) -> None:
    with closing(llama_cpp.Llama(str(plain), **settings())) as llm:
        default_rows = trace(llm)
    ours: list[bool] = []
    stock: list[bool] = []
    barrier = threading.Barrier(2)

    def construct(load: Callable[[], Any], expected: list[bytes], results: list[bool]) -> None:
        for _ in range(4):
            barrier.wait()
            with closing(load()) as llm:
                results.append(trace(llm) == expected)

    threads = [
        threading.Thread(target=construct, args=(lambda: expertier(plain, "100%"), plain_rows, ours)),
        threading.Thread(
            target=construct, args=(lambda: llama_cpp.Llama(str(plain), **settings()), default_rows, stock)
        ),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ours == stock == [True] * 4


# ---- what llama_cpp.Llama can do


def test_logits_of_every_prompt_position_are_the_same(plain: Path) -> None:
    scores = []
    for llm in (stock_twin(plain, logits_all=True), expertier(plain, sizes(plain).layer, logits_all=True)):
        with closing(llm):
            llm.eval(PROMPT)
            scores.append(llm.scores[: len(PROMPT)].tobytes())
    assert scores[0] == scores[1]


@pytest.mark.parametrize("pooling", [llama_cpp.LLAMA_POOLING_TYPE_MEAN, llama_cpp.LLAMA_POOLING_TYPE_NONE])
def test_embeddings_are_the_same(plain: Path, pooling: int) -> None:
    texts = [TEXT, TEXT.upper(), "x"]
    changes = {"embedding": True, "pooling_type": pooling, "n_batch": 64, "n_ubatch": 64}
    vectors = []
    for llm in (stock_twin(plain, **changes), expertier(plain, sizes(plain).layer, **changes)):
        with closing(llm):
            vectors.append([llm.create_embedding(texts)["data"] for _ in range(2)])
    assert vectors[0] == vectors[1]


def _write_adapter(path: Path, spec: TinySpec, *, on_experts: bool) -> Path:
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, spec.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    rank = 4
    for layer in range(spec.layers):
        if on_experts:
            shapes = {
                "ffn_gate_exps": (spec.experts, spec.feed_forward, spec.hidden),
                "ffn_down_exps": (spec.experts, spec.hidden, spec.feed_forward),
            }
        else:
            shapes = {"attn_q": (spec.hidden, spec.hidden)}
        for name, (*front, rows, columns) in shapes.items():
            for part, shape in (("a", (*front, rank, columns)), ("b", (*front, rows, rank))):
                values = rng.standard_normal(shape, dtype=np.float32) / 8
                writer.add_tensor(f"blk.{layer}.{name}.weight.lora_{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("on_experts", [False, True], ids=["attention", "experts"])
@pytest.mark.parametrize("kernels", ["plain", "repacked"])
def test_adapters_work_on_attention_and_on_experts(
    plain: Path, plain_rows: list[bytes], tmp_path: Path, on_experts: bool, kernels: Kernels
) -> None:
    adapter = str(_write_adapter(tmp_path / "lora.gguf", PLAIN, on_experts=on_experts))
    expected = stock_trace(plain, kernels, lora_path=adapter)
    assert expected != plain_rows
    changes = {"lora_path": adapter, "expert_sidecar_dir": str(tmp_path)}
    with closing(expertier(plain, sizes(plain).layer, kernels, **changes)) as llm:
        assert trace(llm) == expected


def _both(plain: Path, use: Callable[[llama_cpp.Llama], Any], **changes: Any) -> tuple[Any, Any]:
    results = []
    for llm in (stock_twin(plain, **changes), expertier(plain, sizes(plain).layer, **changes)):
        with closing(llm):
            results.append(use(llm))
    return results[0], results[1]


def test_completions_sampled_with_a_seed_are_the_same(plain: Path) -> None:
    def use(llm: llama_cpp.Llama) -> list[str]:
        return [llm(TEXT, max_tokens=24, temperature=0.9, seed=seed)["choices"][0]["text"] for seed in (1, 2)]

    stock, ours = _both(plain, use)
    assert stock == ours
    assert stock[0] != stock[1]


def test_logprobs_are_the_same(plain: Path) -> None:
    def use(llm: llama_cpp.Llama) -> Any:
        return llm(TEXT, max_tokens=6, temperature=0, logprobs=4)["choices"][0]

    stock, ours = _both(plain, use, logits_all=True)
    assert stock == ours


def test_a_grammar_constrains_both_alike(plain: Path) -> None:
    def use(llm: llama_cpp.Llama) -> str:
        grammar = llama_cpp.LlamaGrammar.from_string('root ::= ("ab" | "cd" | [0-9])+', verbose=False)
        return str(llm(TEXT, max_tokens=16, temperature=0, grammar=grammar)["choices"][0]["text"])

    stock, ours = _both(plain, use)
    assert stock == ours
    assert ours
    assert set(ours) <= set("abcd0123456789")


def test_a_grammar_that_cannot_be_parsed_is_an_error_and_not_the_end_of_the_process(plain: Path) -> None:
    wrong = llama_cpp.LlamaGrammar.from_string("root ::= [", verbose=False)
    with closing(expertier(plain, "50%")) as llm, pytest.raises(RequestError, match="cannot parse the grammar"):
        llm(TEXT, max_tokens=2, grammar=wrong)
    with (
        BatchEngine(str(plain), expert_budget="50%", n_ctx=128, verbose=False) as engine,
        pytest.raises(RequestError, match="cannot parse the grammar"),
    ):
        RequestView(engine, 0)(TEXT, max_tokens=2, grammar=wrong)


@pytest.mark.parametrize("token", [-5, 99_999_999])
def test_a_number_that_is_no_token_is_an_error_and_not_the_end_of_the_process(plain: Path, token: int) -> None:
    with closing(expertier(plain, "50%")) as llm, pytest.raises(RequestError, match=f"no token {token}"):
        llm.detokenize([1, token])


def test_a_saved_state_can_be_loaded_and_continued(plain: Path) -> None:
    def use(llm: llama_cpp.Llama) -> list[bytes]:
        llm.eval(PROMPT)
        state = llm.save_state()
        llm.reset()
        llm.eval(PROMPT[:5])
        llm.load_state(state)
        return trace(llm, PROMPT[:3], steps=8)

    stock, ours = _both(plain, use)
    assert stock == ours


def test_prompt_lookup_decoding_gives_the_same_text(plain: Path) -> None:
    texts = []
    for load in (stock_twin, lambda *args, **kwargs: expertier(args[0], sizes(plain).layer, **kwargs)):
        draft = LlamaPromptLookupDecoding(num_pred_tokens=5, max_ngram_size=1)
        with closing(load(plain, draft_model=draft, n_ctx=256)) as llm:
            texts.append(llm(TEXT * 2, max_tokens=40, temperature=0)["choices"][0]["text"])
    assert texts[0] == texts[1]


def test_streamed_text_is_the_same(plain: Path) -> None:
    def use(llm: llama_cpp.Llama) -> list[str]:
        return [item["choices"][0]["text"] for item in llm(TEXT, max_tokens=24, temperature=0, stream=True)]

    stock, ours = _both(plain, use)
    assert stock == ours
    assert len(ours) > 10


def test_a_pickled_model_comes_back_with_its_options(plain: Path, plain_rows: list[bytes]) -> None:
    budget = sizes(plain).layer
    with closing(expertier(plain, budget, expert_policy="lru", expert_lookahead="off")) as llm:
        pickled = pickle.dumps(llm)
    with closing(pickle.loads(pickled)) as llm:
        assert isinstance(llm, Llama)
        assert llm.offload.budget == budget
        assert llm.offload.config.policy == "lru"
        assert llm.context_params.n_ubatch == 16
        assert trace(llm) == plain_rows


def test_a_reset_model_starts_again(plain: Path, plain_rows: list[bytes]) -> None:
    with closing(expertier(plain, sizes(plain).layer)) as llm:
        for _ in range(3):
            assert trace(llm) == plain_rows
            llm.reset()


def test_locked_memory_is_everything_but_the_experts(plain: Path, plain_rows: list[bytes]) -> None:
    with closing(expertier(plain, sizes(plain).layer, use_mlock=True)) as llm:
        assert trace(llm) == plain_rows


@pytest.mark.parametrize("layers", [1, -1, 99])
def test_layers_on_a_gpu_are_refused_by_name(plain: Path, layers: int) -> None:
    with pytest.raises(UnsupportedOptionError, match="n_gpu_layers"):
        expertier(plain, "50%", n_gpu_layers=layers)


def test_loading_only_the_vocabulary_is_refused_by_name(plain: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="vocab_only"):
        expertier(plain, "50%", vocab_only=True)


def test_a_lora_adapter_that_is_not_there_is_refused_by_name(plain: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no LoRA adapter .*none\.gguf"):
        expertier(plain, "50%", lora_path="none.gguf")


def test_an_unknown_option_of_ours_is_refused_and_lists_the_known_ones(plain: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match=r"'budgte'.*budget"):
        Llama(str(plain), expert_budgte="50%")


def _footprint() -> tuple[int, int, int]:
    gc.collect()
    return (
        len(Path("/proc/self/maps").read_text().splitlines()),
        len(list(Path("/proc/self/fd").iterdir())),
        threading.active_count(),
    )


def test_opening_and_closing_leaks_no_mapping_no_file_and_no_thread(plain: Path) -> None:
    def once() -> None:
        with closing(expertier(plain, "50%")) as llm:
            llm.eval(PROMPT)

    for _ in range(3):
        once()
    before = _footprint()
    for _ in range(20):
        once()
    after = _footprint()
    assert after[1:] == before[1:]
    assert after[0] - before[0] < 10, "mappings grow with the number of models"


def test_a_forgotten_model_is_closed_at_once_and_not_by_the_garbage_collector(plain: Path) -> None:
    gc.disable()
    try:
        before = threading.active_count()
        llm = expertier(plain, "50%")
        llm.eval(PROMPT)
        assert threading.active_count() > before
        del llm
        assert threading.active_count() == before
    finally:
        gc.enable()


def test_a_closed_model_may_be_closed_again(plain: Path) -> None:
    llm = expertier(plain, "50%")
    llm.close()
    llm.close()
