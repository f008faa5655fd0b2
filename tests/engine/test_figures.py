"""What an engine tells of steps, memory, tenants and experts: against what is in it."""

from __future__ import annotations

import numpy as np

from octavo.engine.expert_load import LATELY_TOKENS, ExpertLoad
from octavo.engine.figures import tenant_usage
from octavo.engine.step_times import StepTimes
from octavo.kv_cache.usage import group_bytes
from octavo.observe.stats import MAX_TENANTS, OTHER_TENANTS, STEP_SECONDS_BUCKETS, TenantUsage
from octavo.request import Share
from octavo.visibility import Full, Window
from tests.scheduler.harness import BLOCK, Engine, spec_of


def test_a_step_is_timed_from_the_end_of_the_one_before_it() -> None:
    times = iter((10.0, 10.004, 10.02, 10.026))  # launch, launch, collect, collect
    steps = StepTimes(lambda: next(times))
    steps.launched()
    steps.launched()
    steps.collected()
    steps.collected()
    assert abs(steps.seconds - 0.026) < 1e-9
    bounds = [*STEP_SECONDS_BUCKETS, float("inf")]
    assert [bound for bound, count in zip(bounds, steps.counts, strict=True) if count] == [
        0.01,
        0.02,
    ]


def test_imbalance_follows_what_was_routed_lately() -> None:
    load = ExpertLoad()
    assert load.imbalance() == () == load.counts
    even = np.full((2, 4), LATELY_TOKENS // 4, np.int64)
    load.add(even)
    assert load.imbalance() == (1.0, 1.0)
    skewed = np.array([[LATELY_TOKENS, 0, 0, 0], [LATELY_TOKENS // 4] * 4], np.int64)
    for _ in range(3):  # the even ones are forgotten
        load.add(skewed)
        load.imbalance()
    assert load.imbalance() == (4.0, 1.0)
    assert load.counts[0] == (LATELY_TOKENS // 4 + 3 * LATELY_TOKENS, *[LATELY_TOKENS // 4] * 3)


def test_pages_that_sequences_share_count_once_and_only_those_held_count() -> None:
    specs = (spec_of(Full()), spec_of(Window(4)))
    engine = Engine(specs=specs, num_blocks=200, budget=60, max_num_seqs=8)
    prompt = list(range(4 * BLOCK))
    assert group_bytes(engine.manager, []) == [0, 0]
    engine.add("a", prompt, 8, share=Share(tenant="one"), n=3)
    for _ in range(4):
        engine.step()
    rows = [one.row for one in engine.scheduler.running]
    held = [
        {page for row in rows for page in table.row(row).tolist()} - {0}
        for table in engine.manager.tables
    ]
    page = engine.manager.layout.classes[0].stride
    assert group_bytes(engine.manager, rows) == [len(pages) * page for pages in held]
    assert len(held[0]) == 3 + 3 * 2 > len(held[1])  # the prompt but for its last token
    assert sum(group_bytes(engine.manager, rows)) == engine.manager.pools.used_bytes


def test_tenants_are_told_apart_and_those_beyond_a_limit_together() -> None:
    engine = Engine(num_blocks=400, budget=400, max_num_seqs=24)
    names = [f"{i:02}" * 20 for i in range(MAX_TENANTS + 2)]
    for i, name in enumerate(names):
        engine.add(
            f"r{i}",
            list(range(i, i + BLOCK * (1 + (i == 0)))),
            4,
            share=Share(tenant=name),
            salt=name,
        )
    waiting = tenant_usage(engine.scheduler)
    assert [one.num_waiting for one in waiting] == [*[1] * MAX_TENANTS, 2]
    engine.step()
    found = tenant_usage(engine.scheduler)
    page = engine.manager.layout.classes[0].stride
    assert found[0] == TenantUsage(
        tenant=names[0][:12], num_running=1, num_waiting=0, kv_bytes=2 * page
    )
    assert found[-1] == TenantUsage(
        tenant=OTHER_TENANTS, num_running=2, num_waiting=0, kv_bytes=2 * page
    )
    assert sum(one.kv_bytes for one in found) == engine.manager.pools.used_bytes
    assert len(found) == MAX_TENANTS + 1
