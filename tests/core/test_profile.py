"""What a run learned warms the next one, and a profile that cannot be trusted is told by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertier.catalog.types import Catalog, LayerExperts
from expertier.errors import ProfileError
from expertier.residency import POLICIES, make_policy
from expertier.residency.base import ExpertSpace
from expertier.residency.uses import UseCounts
from expertier.routing import AheadLoader, GainGate, Lookahead, Span
from expertier.routing.predictor import RoutedModel
from expertier.routing.profile import ProfileKeeper, RoutingProfile, profile_name, read_profile, write_profile
from support.fake_engine import FakeEngine, fake_engine, uniform, until
from support.predictors import FixedPredictor

EXPERTS = 8


def catalog(folder: Path, *, fingerprint: str = "f" * 32) -> Catalog:
    layers = tuple(LayerExperts(layer=layer, experts=EXPERTS, top_k=2, parts=()) for layer in range(3))
    return Catalog(
        path=folder / "model.gguf",
        files=(),
        format="gguf",
        architecture="tiny",
        layers=layers,
        block_count=3,
        file_bytes=1,
        other_bytes=0,
        fingerprint=fingerprint,
    )


def learned(folder: Path) -> RoutingProfile:
    model = catalog(folder)
    chances = {layer: np.linspace(0, 1, EXPERTS) for layer in range(3)}
    return RoutingProfile(
        fingerprint=model.fingerprint, model="model.gguf", architecture="tiny", tokens=100.0, chances=chances
    )


def damage(path: Path, how: str) -> None:
    raw = path.read_bytes()
    document = json.loads(raw)
    if how == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "nothing":
        path.write_bytes(b"")
    elif how == "something else":
        path.write_bytes(b'{"profile": [1, 2], "digest": 3}')
    elif how == "changed":
        document["profile"]["tokens"] = 5.0
        path.write_text(json.dumps(document))
    elif how == "newer":
        document["profile"]["version"] = 99
        path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut", "cut"),
        ("nothing", "cut"),
        ("something else", "cut"),
        ("changed", "has changed"),
        ("newer", "newer Expertier"),
    ],
)
def test_a_damaged_profile_is_refused_by_name_and_passed_over_when_nobody_named_it(
    tmp_path: Path, how: str, words: str
) -> None:
    path = tmp_path / profile_name(catalog(tmp_path))
    write_profile(path, learned(tmp_path))
    damage(path, how)
    with pytest.raises(ProfileError, match=words):
        read_profile(path, catalog(tmp_path))
    with fake_engine(tmp_path, uniform(3, EXPERTS), 1 << 30) as engine:
        with pytest.raises(ProfileError, match=words):
            ProfileKeeper(str(path), catalog(tmp_path), [], engine.manager)
        assert ProfileKeeper("auto", catalog(tmp_path), [tmp_path], engine.manager).found is None


def test_the_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_profile(path, learned(tmp_path))
    with pytest.raises(ProfileError, match="another model"):
        read_profile(path, catalog(tmp_path, fingerprint="0" * 32))


def test_a_profile_that_lacks_a_layer_contradicts_itself(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    whole = learned(tmp_path)
    part = RoutingProfile(
        fingerprint=whole.fingerprint,
        model=whole.model,
        architecture=whole.architecture,
        tokens=1.0,
        chances={0: whole.chances[0]},
    )
    write_profile(path, part)
    with pytest.raises(ProfileError, match="contradicts itself"):
        read_profile(path, catalog(tmp_path))


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be written"):
        write_profile(tmp_path / "absent" / "p.json", learned(tmp_path))


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_what_is_written_is_read_back(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("profile")
    rows = st.lists(st.floats(0, 1), min_size=EXPERTS, max_size=EXPERTS)
    chances = {layer: np.array(data.draw(rows)) for layer in range(3)}
    whole = RoutingProfile(
        fingerprint="f" * 32,
        model="m",
        architecture="tiny",
        tokens=data.draw(st.floats(0, 1e6)),
        chances=chances,
        ahead={"gate": {"winner": True}},
        predictor="path",
    )
    write_profile(folder / "p.json", whole)
    again = read_profile(folder / "p.json", catalog(folder))
    assert (again.ahead, again.predictor) == (whole.ahead, whole.predictor)
    for layer, row in chances.items():
        np.testing.assert_allclose(again.chances[layer], row, atol=1e-5)


def test_a_run_leaves_a_profile_and_the_next_one_fills_its_room_with_what_was_used_most(tmp_path: Path) -> None:
    shapes = uniform(3, EXPERTS)
    slot = shapes[0].slot_bytes
    model = catalog(tmp_path)
    with fake_engine(tmp_path, shapes, 12 * slot, fill=True) as engine:
        keeper = ProfileKeeper("auto", model, [tmp_path], engine.manager)
        for _ in range(40):
            engine.step({0: [[5, 6]], 1: [[6, 7]], 2: [[1, 6]]})
        keeper.close()
    assert (tmp_path / profile_name(model)).exists()
    with fake_engine(tmp_path, shapes, 6 * slot, fill=True) as engine:
        ProfileKeeper("auto", model, [tmp_path], engine.manager)
        engine.manager.warm_up()
        until(lambda: engine.manager.stats().resident_experts == 6)
        resident = [np.flatnonzero(engine.manager.resident(layer)).tolist() for layer in range(3)]
        assert resident == [[5, 6], [6, 7], [1, 6]]
        engine.check()


def test_a_run_of_a_few_tokens_writes_nothing_and_off_neither_reads_nor_writes(tmp_path: Path) -> None:
    shapes = uniform(3, EXPERTS)
    with fake_engine(tmp_path, shapes, 1 << 30) as engine:
        few = ProfileKeeper(str(tmp_path / "few.json"), catalog(tmp_path), [], engine.manager)
        engine.step({0: [[5, 6]], 1: [[6, 7]], 2: [[1, 6]]})
        few.close()
        off = ProfileKeeper("off", catalog(tmp_path), [tmp_path], engine.manager)
        for _ in range(40):
            engine.step({0: [[5, 6]], 1: [[6, 7]], 2: [[1, 6]]})
        off.close()
    assert not list(tmp_path.glob("*.json"))


def test_a_place_that_takes_no_profile_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with fake_engine(tmp_path, uniform(3, EXPERTS), 1 << 30) as engine:
        keeper = ProfileKeeper("auto", catalog(tmp_path), [tmp_path / "file", tmp_path / "second"], engine.manager)
        for _ in range(40):
            engine.step({0: [[5, 6]], 1: [[6, 7]], 2: [[1, 6]]})
        keeper.close()
    assert (tmp_path / "second" / profile_name(catalog(tmp_path))).exists()


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_warmed_policy_ranks_as_the_profile_does(name: str) -> None:
    space = ExpertSpace(layer_of=np.repeat(np.arange(2), 4), layers=2)
    policy = make_policy(name, space)
    chances = np.array([0.1, 0.9, 0.0, 0.5, 0.2, 0.3, 0.4, 0.6])
    policy.warm(chances)
    policy.advance(1)
    expected = policy.use_probability(np.arange(8))
    assert (np.argsort(expected, kind="stable") == np.argsort(chances, kind="stable")).all()


def test_long_run_counts_follow_a_change_and_never_exceed_certainty() -> None:
    counts = UseCounts(4)
    for _ in range(100):
        counts.note(np.array([0, 1]), 1)
        counts.advance(1)
    counts.note(np.array([0, 2, 0, 3]), 2)
    counts.advance(2)
    assert counts.chances()[0] == 1.0
    np.testing.assert_allclose(counts.chances()[1:], np.array([100, 1, 1]) / 102)


def ahead_on(engine: FakeEngine, predictor: FixedPredictor | None = None) -> AheadLoader:
    experts = dict.fromkeys(range(3), EXPERTS)
    gates = {layer: np.eye(EXPERTS, dtype=np.float32) for layer in experts}
    return AheadLoader(
        manager=engine.manager,
        experts=experts,
        lookahead=Lookahead(gates=gates, norms={}, top_k=dict.fromkeys(experts, 2)),
        gate=GainGate(block=1, rounds=1),
        predictor=predictor,
    )


def test_what_loading_ahead_learned_is_kept_too(tmp_path: Path) -> None:
    chances = np.zeros((3, EXPERTS), np.float32)
    chances[1:, :2] = 0.9
    model = RoutedModel(layers=(0, 1, 2), experts=(EXPERTS,) * 3, top_k=(2,) * 3, fingerprint="x")
    hidden = np.arange(EXPERTS, dtype=np.float32)[None]
    with fake_engine(tmp_path, uniform(3, EXPERTS), 12 * uniform(1, 1)[0].slot_bytes) as engine:
        keeper = ProfileKeeper("auto", catalog(tmp_path), [tmp_path], engine.manager)
        ahead = ahead_on(engine, FixedPredictor(model, chances))
        keeper.follow(ahead)
        for position in range(40):
            ahead.begin([Span(key=0, position=position, tokens=[1])], decode=True)
            engine.manager.begin_step(1)
            for layer in range(3):
                routes = np.array([[0, 5 + (position + layer) % 3]])
                engine.manager.observe(layer, routes)
                with engine.manager.acquire(layer, routes):
                    ahead.after_router(layer, routes, lambda: hidden, decode=True)
            engine.manager.end_step()
        keeper.close()
        learned = ahead.learned()
    assert set(learned) == {"lookahead", "predictor", "gate"}
    with fake_engine(tmp_path, uniform(3, EXPERTS), 1 << 30) as engine:
        keeper = ProfileKeeper("auto", catalog(tmp_path), [tmp_path], engine.manager)
        assert keeper.found is not None and keeper.found.predictor == "fixed + lookahead"
        again = ahead_on(engine, FixedPredictor(model, chances))
        keeper.follow(again)
        assert again.learned() == learned
        other = ahead_on(engine)
        keeper.follow(other)
        assert "gate" not in other.learned(), "a verdict about another predictor says nothing"


@pytest.mark.parametrize(
    "nonsense",
    [
        {},
        {"lookahead": 3, "predictor": [], "gate": None},
        {"lookahead": {"0": [0.5]}, "predictor": {"name": "fixed", "claimed": [1], "used": ["x"]}, "gate": {"by": 1}},
        {"lookahead": {str(layer): [2.0] * 4 for layer in range(3)}, "gate": {}},
    ],
)
def test_nonsense_about_loading_ahead_is_passed_over(tmp_path: Path, nonsense: dict[str, object]) -> None:
    model = RoutedModel(layers=(0, 1, 2), experts=(EXPERTS,) * 3, top_k=(2,) * 3, fingerprint="x")
    with fake_engine(tmp_path, uniform(3, EXPERTS), 1 << 30) as engine:
        ahead = ahead_on(engine, FixedPredictor(model, np.zeros((3, EXPERTS))))
        before = ahead.learned()
        ahead.warm(nonsense)
        assert ahead.learned() == before
