"""Tenants in turn: nobody with work waits longer than its share, and one alone notices nothing."""

from __future__ import annotations

from collections import defaultdict
from itertools import count

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.request import Share
from octavo.scheduler import fair_share
from octavo.scheduler.fair_share import CREDIT_TOKENS, Account, FairShare
from octavo.step import Purpose, StepPlan, StepResult
from tests.scheduler.harness import Engine

FLOOD, OTHER = Share(tenant="flood"), Share(tenant="other")


class _Counter:
    """A machine that computes nothing: every token is 1."""

    def launch(self, plan: StepPlan) -> StepPlan:
        return plan

    def collect(self, plan: StepPlan) -> StepResult:
        count = int(np.count_nonzero(plan.purposes == Purpose.TOKEN))
        return StepResult.single(plan, np.ones(count, np.int32))


def counting(**options: int) -> Engine:
    """An engine for what is counted in steps: thousands of tokens cost nothing."""
    engine = engine_of(**options)
    engine.machine = _Counter()  # type: ignore[assignment]
    engine.scheduler.check = lambda: None  # type: ignore[method-assign]
    return engine


def engine_of(**options: int) -> Engine:
    defaults = {"num_blocks": 8192, "max_num_seqs": 16, "budget": 64, "max_model_len": 4096}
    return Engine(**{**defaults, **options})  # type: ignore[arg-type]


def distinct(name: int, length: int) -> list[int]:
    """A prompt that shares no prefix with another's."""
    return [(name * 31 + i * (name % 7 + 1)) % 49 for i in range(length)]


def steps_to_first_token(engine: Engine, name: str) -> int:
    """Steps from the next one on until a request has its first token, the one on its way too."""
    for steps in count(1):
        engine.step()
        if engine.tokens[name, 0]:
            return steps
    raise AssertionError


def flooded(num_requests: int, length: int, max_tokens: int, **options: int) -> Engine:
    """An engine in which a tenant has had work for a while."""
    engine = counting(**options)
    for i in range(num_requests):
        engine.add(f"f{i}", distinct(i, length), max_tokens, share=FLOOD)
    for _ in range(20):
        engine.step()
    return engine


def added_steps(engine: Engine, prompt: list[int], **options: int) -> tuple[int, int]:
    """Returns the steps to the first token of another tenant alone, and beside the flood."""
    alone = counting(**options)
    alone.add("other", prompt, 4, share=OTHER)
    engine.add("other", prompt, 4, share=OTHER)
    return steps_to_first_token(alone, "other"), steps_to_first_token(engine, "other")


# -- what a flood adds -------------------------------------------------------------------------


def test_a_flood_of_500_requests_adds_at_most_three_steps_to_anothers_first_token() -> None:
    for length, max_tokens in ((24, 200), (200, 1), (60, 30)):
        engine = flooded(500, length, max_tokens)
        alone, beside = added_steps(engine, distinct(1000, 40))
        assert beside - alone <= 3, (length, max_tokens, alone, beside)


def test_a_flood_that_fills_the_cache_adds_at_most_three_steps() -> None:
    options = {"num_blocks": 300, "headroom": 64, "max_model_len": 1000}
    engine = flooded(500, 60, 400, **options)
    assert len(engine.scheduler.running) < 16  # it is room that lacks, not rows
    alone, beside = added_steps(engine, distinct(1000, 40), **options)
    assert beside - alone <= 3


def test_a_prompt_of_8192_tokens_takes_at_most_half_as_many_steps_more_beside_a_flood() -> None:
    options = {"budget": 1024, "max_num_seqs": 32, "max_model_len": 10000}
    for length, max_tokens in ((2000, 1), (8192, 8), (64, 3000)):
        engine = flooded(500, length, max_tokens, **options)
        alone, beside = added_steps(engine, distinct(1000, 8192), **options)
        assert beside <= 1.5 * alone, (length, alone, beside)


def test_whoever_has_no_share_of_the_rows_gets_one_and_the_tokens_of_all_stay() -> None:
    engine = engine_of(max_num_seqs=4, num_blocks=200, max_model_len=200)
    for i in range(12):
        engine.add(f"f{i}", distinct(i, 8), 30, share=FLOOD)
    for _ in range(5):
        engine.step()
    assert {s.request.tenant for s in engine.scheduler.running} == {"flood"}
    for i in range(3):
        engine.add(f"o{i}", distinct(20 + i, 8), 30, share=OTHER)
    engine.step()
    engine.step()
    running = [s.request.tenant for s in engine.scheduler.running]
    assert (running.count("flood"), running.count("other")) == (2, 2)
    preempted = engine.scheduler.counters.num_preemptions
    for _ in range(10):
        engine.step()
    assert engine.scheduler.counters.num_preemptions == preempted  # nothing goes to and fro
    engine.run()
    engine.check_tokens()


def test_a_tenant_with_three_times_the_weight_has_three_times_the_rows() -> None:
    engine = counting(max_num_seqs=8)
    for i in range(30):
        engine.add(f"f{i}", distinct(i, 8), 50, share=FLOOD)
    engine.step()
    heavy = Share(tenant="heavy", weight=3.0)
    for i in range(30):
        engine.add(f"h{i}", distinct(40 + i, 8), 50, share=heavy)
    for _ in range(3):
        engine.step()
    running = [s.request.tenant for s in engine.scheduler.running]
    assert running.count("heavy") == 6


def test_no_tenant_is_preempted_for_one_whose_priority_is_worse() -> None:
    engine = engine_of(max_num_seqs=4, num_blocks=200, max_model_len=200)
    for i in range(8):
        engine.add(f"f{i}", distinct(i, 8), 20, share=FLOOD, priority=-1)
    engine.step()
    engine.add("other", distinct(20, 8), 20, share=OTHER)
    for _ in range(5):
        engine.step()
    assert not engine.tokens["other", 0]
    assert engine.scheduler.counters.num_preemptions == 0
    engine.run()
    engine.check_tokens()


def test_a_share_of_the_cache_bounds_what_a_tenant_begins_and_nobody_else() -> None:
    engine = engine_of(num_blocks=101, max_num_seqs=16, max_model_len=400, num_kv_tokens=400)
    small = Share(tenant="small", kv_share=0.25)
    for i in range(8):
        engine.add(f"s{i}", distinct(i, 36), 4, share=small)
    engine.add("other", distinct(20, 40), 4, share=OTHER)
    for _ in range(2):
        engine.step()
        held = sum(s.kv.capacity for s in engine.scheduler.running if s.request.tenant == "small")
        assert held <= 100 + 8
    assert any(s.request.tenant == "other" for s in engine.scheduler.running)
    engine.run()
    engine.check_tokens()
    engine.add("large", distinct(30, 300), 4, share=small)  # alone it may have more
    engine.run()
    engine.check_tokens()


# -- shares --------------------------------------------------------------------------------------


def computed_by_tenant(engine: Engine) -> dict[str, float]:
    """Tokens by weight, of tenants that have work."""
    return {
        account.tenant: account.computed / account.weight
        for account in engine.scheduler._queues.fair_share.active
    }


@settings(max_examples=8, deadline=None)
@given(
    tenants=st.lists(
        st.tuples(
            st.sampled_from([0.5, 1.0, 2.0, 4.0]),  # weight
            st.integers(1, 120),  # length of prompts
            st.integers(1, 12),  # of answers
        ),
        min_size=2,
        max_size=4,
    ),
    budget=st.sampled_from([16, 64, 200]),
)
def test_no_tenant_with_work_waits_longer_than_its_share(
    tenants: list[tuple[float, int, int]], budget: int
) -> None:
    engine = counting(budget=budget, max_num_seqs=24)
    names = count()
    shares = [Share(tenant=f"t{i}", weight=weight) for i, (weight, _, _) in enumerate(tenants)]
    waiting: dict[str, int] = defaultdict(int)

    def fill() -> None:
        for share, (_, length, max_tokens) in zip(shares, tenants, strict=True):
            account = engine.scheduler._queues.fair_share.account(share)
            while len(account.waiting) < 24:
                number = next(names)
                prompt = distinct(number, length)
                engine.add(f"r{number}", prompt, max_tokens, share=share, caching=False)

    fill()
    for _ in range(10):
        engine.step()
        fill()
    before = computed_by_tenant(engine)
    waiting.clear()
    for _ in range(40):
        had = computed_by_tenant(engine)
        engine.step()
        fill()
        for tenant, tokens in computed_by_tenant(engine).items():
            waiting[tenant] = waiting[tenant] + 1 if tokens == had[tenant] else 0
            # Whoever has work has a token at least as often as its weight says.
            weight = {share.tenant: share.weight for share in shares}[tenant]
            total = sum(share.weight for share in shares)
            longest = 120 + budget
            assert waiting[tenant] <= 2 + total / weight * longest / min(budget, 16)
    gained = {name: tokens - before[name] for name, tokens in computed_by_tenant(engine).items()}
    # Of one another, they are apart by what one step and one turn of each may be at most: a step's
    # tokens, and those of the rows that nobody takes from who runs.
    slack = max(
        (budget + 24 + length + max_tokens) / weight for weight, length, max_tokens in tenants
    )
    assert max(gained.values()) - min(gained.values()) <= 2 * slack


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=5),
    events=st.lists(
        st.tuples(
            st.integers(0, 4), st.sampled_from(["begin", "end", "compute"]), st.integers(1, 9)
        ),
        max_size=60,
    ),
)
def test_virtual_time_never_falls_and_credit_is_bounded(
    weights: list[float], events: list[tuple[int, str, int]]
) -> None:
    share, accounts = FairShare(), dict[int, Account]()
    for number, event, amount in events:
        number %= len(weights)
        account = share.account(Share(tenant=str(number), weight=weights[number]))
        accounts[number] = account
        before = account.virtual_time
        if event == "begin":
            least = min((one.virtual_time for one in share.active), default=None)
            was_idle = not account.num_unfinished
            share.begin(account, amount)
            if was_idle and least is not None:
                assert account.virtual_time >= least - CREDIT_TOKENS / account.weight
        elif account.num_unfinished and event == "compute":
            account.computed += amount * 1000
        elif account.num_unfinished:
            share.end(account)
        assert account.virtual_time >= before
        assert {one.tenant for one in share.active} == {
            one.tenant for one in accounts.values() if one.num_unfinished
        }


def test_tenants_that_left_long_ago_are_forgotten_and_debts_are_not() -> None:
    share = FairShare()
    stays = share.account(Share(tenant="stays"))
    share.begin(stays, 1)
    debtor = share.account(Share(tenant="debtor"))
    share.begin(debtor, 1)
    debtor.computed = 10**9
    share.end(debtor)
    stays.computed = 10**6
    for number in range(3 * fair_share._FORGOTTEN_ABOVE):
        guest = share.account(Share(tenant=f"guest-{number}"))
        share.begin(guest, 1)
        stays.computed += 100
        share.end(guest)
    assert len(share._accounts) < 2 * fair_share._FORGOTTEN_ABOVE
    assert share.account(Share(tenant="debtor")) is debtor


# -- one tenant alone ----------------------------------------------------------------------------


def test_a_tenant_alone_is_served_as_if_there_were_none() -> None:
    plans = []
    for share in (Share(), Share(tenant="a", weight=0.1)):
        engine = engine_of(num_blocks=200, max_num_seqs=6, budget=24, max_model_len=200)
        for i in range(30):
            prompt = distinct(i % 11, 5 + i % 40)
            engine.add(f"r{i}", prompt, 1 + i % 17, n=1 + i % 2, priority=i % 3, share=share)
            if i % 4 == 0:
                engine.step()
        engine.run()
        engine.check_tokens()
        plans.append((engine.step_sizes, dict(engine.num_cached)))
    assert plans[0] == plans[1]


def test_cached_tokens_cost_no_turn() -> None:
    engine = engine_of(budget=64, num_blocks=300, max_model_len=500)
    prefix = distinct(3, 400)
    engine.add("first", [*prefix, 1], 1, share=FLOOD)
    engine.run()
    account = engine.scheduler._queues.fair_share.account(FLOOD)
    before = account.computed
    engine.add("second", [*prefix, 2], 1, share=FLOOD)
    engine.run()
    assert account.computed - before < 20
