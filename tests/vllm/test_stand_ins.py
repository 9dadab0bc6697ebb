"""Stand-ins in a batch of vLLM, with a router whose scores are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from expertier.virtual import VirtualExperts, VirtualSettings

torch = pytest.importorskip("torch")

SCORES = [[0.5, 0.3, 0.15, 0.05], [0.3, 0.1, 0.4, 0.2], [0.5, 0.2, 0.2, 0.1]]


class GivenScores:
    """What is handed in as logits are the probabilities."""

    def scores(self, logits: Any) -> Any:
        return logits.numpy(), logits.numpy()

    def weights(self, logits: Any, ids: Any) -> Any:
        return logits.gather(1, ids.long())


def chosen(resident: list[bool], exact: list[bool] | None, tokens: slice = slice(None)) -> tuple[Any, VirtualExperts]:
    from expertier_vllm.stand_ins import stand_in

    virtual = VirtualExperts([0], VirtualSettings(bias=0.5))
    logits = torch.tensor(SCORES)[tokens]
    weights, ids = logits.topk(2)
    ids = ids.to(torch.int32)
    mask = None if exact is None else np.array(exact)
    virtual.begin_step(len(ids), "decode", exact=0 if mask is None else int(mask.sum()))
    routes = ids.numpy().astype(np.int64)
    new = stand_in(virtual, 0, np.array(resident), GivenScores(), logits, weights, ids, routes, mask)
    assert torch.equal(new[0], GivenScores().weights(logits, new[1]))
    return new[1].tolist(), virtual


def test_a_stand_in_takes_the_place_and_has_the_routers_own_weight() -> None:
    ids, virtual = chosen([True, False, True, True], None, slice(0, 1))
    assert ids == [[0, 2]]
    assert virtual.stats().substituted_share == (0.5,)


def test_tokens_that_must_be_exact_keep_their_experts_and_are_not_counted() -> None:
    ids, virtual = chosen([True, True, False, True], [False, True, False])
    assert ids[1] == [2, 0]
    assert virtual.wishes.tolist() == [4] and virtual.tokens == 2 and virtual.exact_tokens == 1


def test_what_an_exact_token_brings_in_costs_the_others_nothing() -> None:
    absent = [False, False, True, True]
    alone, _ = chosen(absent, None, slice(1, 2))
    assert 0 not in alone[0], "its expert 0 would be stood in for"
    together, virtual = chosen(absent, [True, False, True])
    assert together[1] == [2, 0]
    assert virtual.substituted.tolist() == [0]


def test_what_is_foreseen_is_what_would_be_brought_in() -> None:
    from expertier_vllm.stand_ins import insisted

    virtual = VirtualExperts([0], VirtualSettings(bias=0.5))
    scores = np.array(SCORES, np.float32)
    absent = np.array([False, False, True, True])

    def foreseen(exact: list[bool] | None) -> list[int]:
        mask = None if exact is None else np.array(exact)
        return insisted(virtual, absent, GivenScores(), scores, 2, mask).tolist()

    assert foreseen(None) == np.setdiff1d(chosen(absent.tolist(), None)[0], [2, 3]).tolist()
    assert foreseen([True, False, False]) == [0, 1]
