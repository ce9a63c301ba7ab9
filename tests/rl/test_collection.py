"""Which episodes a collection keeps: ranges, and the buffer that grows and is thinned."""

import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.rl.collection import Buffer, select
from springhead.rl.facts import Fact
from springhead.rl.filters import Ranges, Thin, thin

pytestmark = pytest.mark.unit


def plane(number, seed=0):
    generator = np.random.default_rng(seed)
    return [
        Fact(0, place, f"{place:04x}", "p", "ppo-lag", 1.0, place, False, None, float(value), float(cost), (), 10)
        for place, (value, cost) in enumerate(zip(generator.normal(size=number), generator.gamma(1, 30, number)))
    ]


def test_without_rules_everything_is_kept_but_copies():
    facts = plane(20)
    chosen = select([*facts, facts[3]], Buffer(), 0)
    assert chosen.kept == facts
    assert chosen.duplicates == 1
    assert chosen.decisions["id"] == []


def test_ranges_reject_and_say_so():
    facts = plane(200)
    chosen = select(facts, Buffer(keep=Ranges(cost_max=50.0, return_min=-1.0)), 0)
    assert chosen.kept == [fact for fact in facts if fact.cost_return <= 50 and fact.episode_return >= -1]
    dropped = {i for i, kept in zip(chosen.decisions["id"], chosen.decisions["kept"], strict=True) if not kept}
    assert dropped == {fact.id for fact in facts} - {fact.id for fact in chosen.kept}
    by_id = {fact.id: fact for fact in facts}
    table = zip(*(chosen.decisions[name] for name in ("id", "rule", "kept", "value", "threshold")), strict=True)
    for row, rule, kept, value, threshold in table:
        if rule == "range-cost-max":
            assert (value, threshold, kept) == (by_id[row].cost_return, 50.0, value <= 50.0)
    with pytest.raises(BadInput, match="rejects every episode"):
        select(facts, Buffer(keep=Ranges(cost_max=-1.0)), 0)


def test_the_buffer_grows_to_half_as_much_again_and_is_thinned_over_the_plane():
    facts = plane(1000)
    chosen = select(facts, Buffer(100), 7)
    assert len(chosen.kept) == 100
    order = [fact.place for fact in chosen.kept]
    assert order == sorted(order)
    ids, kept = chosen.decisions["id"], chosen.decisions["kept"]
    assert sorted(ids) == sorted(fact.id for fact in facts)  # one decision each
    assert {i for i, k in zip(ids, kept, strict=True) if k} == {fact.id for fact in chosen.kept}
    # Thinned before the end: by hand, the first 151 episodes give the first 51 that are dropped.
    returns = np.array([fact.episode_return for fact in facts[:151]])
    costs = np.array([fact.cost_return for fact in facts[:151]])
    first = thin(returns, costs, Thin(100), np.random.default_rng([7, 0]))
    assert set(ids[:51]) == {facts[position].id for position in np.flatnonzero(~first.kept)}
    # Spread: rare corners of the plane survive more often than the crowd.
    rare = {fact.id for fact in facts if fact.cost_return > 100}
    assert sum(fact.id in rare for fact in chosen.kept) / len(rare) > 2 * 100 / 1000
    assert select(facts, Buffer(100), 7).kept == chosen.kept
    assert select(facts, Buffer(100), 8).kept != chosen.kept
    assert len(select(facts[:120], Buffer(100), 7).kept) == 100
    assert select(facts[:100], Buffer(100), 7).kept == facts[:100]
