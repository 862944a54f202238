"""The schedule as a value: what runs next, given who is there."""

import random

from pelton.config import SamplingParams
from pelton.engine.prefix_cache import CachePolicy
from pelton.engine.request import Request, Sequence, Status
from pelton.engine.scheduler import Policy, SchedulerState, schedule


def sequence(name: str, num_prompt_tokens: int, index: int = 0, **options) -> Sequence:
    prompt = tuple(range(100, 100 + num_prompt_tokens))
    options = {"params": SamplingParams(), "arrival_time": 0.0, "max_total_tokens": 1000} | options
    return Sequence(Request(name, prompt, seed=0, stop_token_ids=frozenset(), **options), index)


def state_of(*prompts: tuple[str, int], num_blocks: int = 100, block_size: int = 4, caching=False) -> SchedulerState:
    state = SchedulerState(num_blocks, block_size, caching=caching)
    for index, (name, length) in enumerate(prompts):
        state.add(sequence(name, length, index))
    return state


def run(state: SchedulerState, max_num_seqs: int = 8, max_num_batched_tokens: int = 16, **rules) -> dict[str, int]:
    """Schedule a step and pretend that it ran; {request id: num_scheduled_tokens}."""
    now = rules.pop("now", 1.0)
    flush = rules.pop("flush", False)
    planned = schedule(state, Policy(max_num_seqs, max_num_batched_tokens, **rules), now, flush=flush)
    for seq, scheduled in zip(planned.sequences, planned.batch.sequences, strict=True):
        if scheduled.sample is not None:
            seq.append(7, now)
            state.release_forks(seq)
    state.check()
    return {s.request_id: len(s.token_ids) for s in planned.batch.sequences}


def test_waiting_requests_are_admitted_in_arrival_order_until_the_tokens_are_used_up():
    state = state_of(("a", 6), ("b", 6), ("c", 6))
    assert run(state) == {"a": 6, "b": 6, "c": 4}


def test_a_long_prompt_is_computed_in_chunks_and_only_the_last_chunk_samples():
    state = state_of(("a", 40))
    budget = Policy(8, 16)
    for start, length, samples in ((0, 16, False), (16, 16, False), (32, 8, True)):
        planned = schedule(state, budget, now=0.0)
        (scheduled,) = planned.batch.sequences
        assert scheduled.num_computed_tokens == start
        assert scheduled.token_ids == tuple(range(100 + start, 100 + start + length))
        assert (scheduled.sample is not None) == samples
        assert len(scheduled.block_ids) == (start + length) // 4
        assert planned.sequences[0].num_computed_tokens == start + length


def test_running_decodes_come_before_a_prefill_that_arrived_earlier():
    state = state_of(("long", 100), ("short", 1))
    run(state, max_num_batched_tokens=101)
    state.running["long"].num_computed_tokens = 0  # as if its prefill were still going on
    assert list(run(state).items()) == [("short", 1), ("long", 15)]


def test_decodes_and_a_prefill_chunk_share_a_step():
    state = state_of(("a", 3), ("b", 3))
    run(state)
    state.add(sequence("c", 30, 2))
    assert run(state) == {"a": 1, "b": 1, "c": 14}


def test_no_more_than_max_num_seqs_run():
    state = state_of(*((name, 1) for name in "abcde"))
    assert list(run(state, max_num_seqs=3)) == ["a", "b", "c"]
    state.remove(state.running["b"], "stop")
    assert list(run(state, max_num_seqs=3)) == ["a", "c", "d"]


def test_no_more_than_max_num_batched_tokens_run_even_if_more_sequences_decode():
    state = state_of(("a", 1), ("b", 1), ("c", 1))
    run(state)
    assert run(state, max_num_batched_tokens=2) == {"a": 1, "b": 1}


def test_a_request_that_does_not_fit_is_not_overtaken():
    state = state_of(("a", 8), ("big", 16), ("small", 1), num_blocks=5)
    assert run(state, max_num_batched_tokens=64) == {"a": 8}
    assert state.first_waiting().request_id == "big"


def test_when_blocks_run_out_the_latest_arrival_is_preempted_and_goes_to_the_head_of_the_queue():
    state = state_of(("a", 4), ("b", 3), num_blocks=3)
    state.add(sequence("c", 4, 2))
    assert run(state) == {"a": 4, "b": 3}
    assert run(state) == {"a": 1, "b": 1}  # a takes the third block
    late = state.running["b"]
    assert run(state) == {"a": 1}  # and nobody is admitted in a step that preempts
    assert late.status is Status.PREEMPTED
    assert (late.num_computed_tokens, late.block_ids, late.num_preemptions) == (0, (), 1)
    assert state.first_waiting() is late


def test_the_output_of_a_preempted_request_is_part_of_what_is_recomputed():
    state = state_of(("a", 4), ("b", 3), num_blocks=3)
    run(state), run(state)
    late = state.running["b"]
    run(state)
    state.remove(state.running["a"], "stop")
    planned = schedule(state, Policy(8, 16), now=2.0)
    (scheduled,) = planned.batch.sequences
    assert scheduled.token_ids == (100, 101, 102, 7, 7)
    assert scheduled.sample is not None
    assert list(scheduled.sample.output_token_ids) == [7, 7]
    assert late.first_scheduled_time == 1.0


def test_admission_leaves_a_block_for_every_running_sequence():
    state = state_of(("a", 4), ("b", 8), num_blocks=3)
    assert run(state, max_num_batched_tokens=64) == {"a": 4}
    state.remove(state.running["a"], "stop")
    assert run(state, max_num_batched_tokens=64) == {"b": 8}


def test_the_same_state_gives_the_same_schedule():
    def build() -> SchedulerState:
        rng = random.Random(3)
        return state_of(*((f"r{i}", rng.randint(1, 20)) for i in range(12)), num_blocks=20)

    first, second = build(), build()
    for _ in range(30):
        a = schedule(first, Policy(4, 8), now=0.0)
        b = schedule(second, Policy(4, 8), now=0.0)
        assert a.batch == b.batch
        assert [s.request_id for s in a.preempted] == [s.request_id for s in b.preempted]
        for planned in (a, b):
            for seq, scheduled in zip(planned.sequences, planned.batch.sequences, strict=True):
                if scheduled.sample is not None:
                    seq.append(7, 0.0)


def test_removing_a_waiting_request_leaves_the_others_in_order():
    state = state_of(("a", 1), ("b", 1), ("c", 1))
    state.remove(state.waiting["b"], "abort")
    assert list(run(state)) == ["a", "c"]


# Order: priorities and deadlines


def order_of(*sequences: Sequence, now: float = 1.0) -> list[str]:
    state = SchedulerState(100, 4)
    for one in sequences:
        state.add(one)
    return list(run(state, max_num_batched_tokens=1000, now=now))


def test_a_lower_priority_number_goes_first_and_a_minute_of_waiting_outweighs_one():
    first = sequence("low", 4, 0, priority=1, arrival_time=0.0)
    assert order_of(first, sequence("high", 4, 1, priority=0, arrival_time=59.0)) == ["high", "low"]
    first = sequence("low", 4, 0, priority=1, arrival_time=0.0)
    assert order_of(first, sequence("high", 4, 1, priority=0, arrival_time=61.0)) == ["low", "high"]


def test_a_near_deadline_goes_before_those_who_have_time():
    waits = sequence("waits", 4, 0)
    assert order_of(waits, sequence("urgent", 4, 1, arrival_time=5.0, deadline=20.0)) == ["urgent", "waits"]
    waits = sequence("waits", 4, 0)
    assert order_of(waits, sequence("has time", 4, 1, arrival_time=5.0, deadline=500.0)) == ["waits", "has time"]


def test_a_higher_priority_takes_the_place_of_a_lower_one_that_came_later_in_order():
    state = SchedulerState(100, 4)
    for index, priority in enumerate((0, 2)):
        state.add(sequence(f"p{priority}", 4, index, priority=priority))
    assert list(run(state, max_num_seqs=2)) == ["p0", "p2"]
    state.add(sequence("p1", 4, 2, priority=1))
    assert list(run(state, max_num_seqs=2)) == ["p0", "p1"]
    assert state.waiting["p2"].status is Status.PREEMPTED
    assert list(run(state, max_num_seqs=2, capacity="guaranteed_no_evict")) == ["p0", "p1"]
    state.add(sequence("p0b", 4, 3, priority=0))
    assert list(run(state, max_num_seqs=2, capacity="guaranteed_no_evict")) == ["p0", "p1"]


def test_equal_priorities_never_preempt_each_other_for_admission():
    state = state_of(("a", 4), ("b", 4))
    run(state, max_num_seqs=2)
    state.add(sequence("urgent", 4, 2, deadline=2.0))
    assert list(run(state, max_num_seqs=2)) == ["a", "b"]


# Capacity


def test_guaranteed_no_evict_admits_what_fits_to_its_end():
    def full() -> SchedulerState:
        state = SchedulerState(6, 4)
        for index, name in enumerate("abc"):
            state.add(sequence(name, 4, index, max_total_tokens=13))  # 12 tokens of KV: 3 blocks
        return state

    state = full()
    assert list(run(state, capacity="guaranteed_no_evict")) == ["a", "b"]
    for _ in range(8):
        assert list(run(state, capacity="guaranteed_no_evict")) == ["a", "b"]
    assert state.blocks.num_free == 0
    state.remove(state.running["a"], "stop")
    assert list(run(state, capacity="guaranteed_no_evict")) == ["b", "c"]
    assert list(run(full())) == ["a", "b", "c"]  # max_utilization hopes for the best


# Prefix caching


def test_a_common_beginning_is_computed_once_even_within_one_step():
    state = state_of(("a", 10), ("b", 10), caching=True)
    assert run(state) == {"a": 10, "b": 2}
    assert state.running["b"].num_cached_tokens == 8
    assert state.running["a"].block_ids[:2] == state.running["b"].block_ids[:2]
    assert state.running["a"].block_ids[2] != state.running["b"].block_ids[2]


def test_the_last_token_is_computed_even_if_all_is_cached():
    state = state_of(("a", 8), ("b", 8), caching=True)
    assert run(state) == {"a": 8, "b": 4}


def test_what_a_finished_request_left_is_found_until_its_blocks_are_needed():
    state = state_of(("a", 8), num_blocks=4, caching=True)
    run(state)
    state.remove(state.running["a"], "stop")
    state.check()
    assert (state.blocks.num_free, state.blocks.num_cached) == (4, 2)
    state.add(sequence("b", 9, 1))
    assert run(state) == {"b": 1}
    state.remove(state.running["b"], "stop")
    other = sequence("other", 16, 2, cache=CachePolicy(salt="another tenant"))
    state.add(other)
    assert run(state) == {"other": 16}
    state.remove(other, "stop")
    state.add(sequence("c", 9, 3))
    assert run(state) == {"c": 9}


def test_salts_share_nothing_and_a_request_may_neither_look_nor_leave_anything():
    state = SchedulerState(100, 4, caching=True)
    for index, cache in enumerate(
        (CachePolicy(store=False), CachePolicy(salt="x"), CachePolicy(), CachePolicy(read=False), CachePolicy())
    ):
        state.add(sequence(f"r{index}", 9, index, cache=cache))
    assert run(state, max_num_batched_tokens=100) == {"r0": 9, "r1": 9, "r2": 9, "r3": 9, "r4": 1}


def test_the_lowest_retention_goes_first_and_of_a_sequence_its_end():
    state = SchedulerState(5, 4, caching=True)
    for index, retention in enumerate((90, 10)):
        one = sequence(f"r{index}", 9, index, cache=CachePolicy(salt=str(index), retention=retention))
        state.add(one)
        run(state)
        state.remove(one, "stop")
    state.add(sequence("new", 5, 2, cache=CachePolicy(salt="new")))
    run(state)  # one block was free, the other is the last of the second

    def found(index: int) -> int:
        probe = sequence("probe", 9, 3, cache=CachePolicy(salt=str(index)))
        return len(state.blocks.find(probe.keys(4))[0])

    assert (found(0), found(1)) == (2, 1)


def test_cached_blocks_are_forgotten_after_their_time_to_live():
    state = SchedulerState(8, 4, caching=True)
    cache = CachePolicy(ttl=10.0)
    for name, now, computed in (("a", 0.0, 9), ("b", 9.0, 1), ("c", 18.0, 1), ("d", 29.0, 9)):
        one = sequence(name, 9, cache=cache)
        state.add(one)
        assert run(state, now=now) == {name: computed}, name
        state.remove(one, "stop")
        state.check()


def test_a_step_that_fails_leaves_nothing_to_be_found():
    state = state_of(("a", 10), ("b", 10), caching=True)
    state.roll_back(schedule(state, Policy(8, 16), 0.0))
    state.check()
    assert state.blocks.num_cached == 0
    assert run(state) == {"a": 10, "b": 2}


# Forks


def test_forks_wait_for_the_prompt_and_compute_its_last_token_only():
    for caching in (False, True):
        state = SchedulerState(100, 4, caching=caching)
        parent = sequence("a", 10)
        state.add(parent)
        for index in (1, 2):
            state.add(Sequence(sequence(f"a{index}", 10).request, index, parent))
        assert run(state, max_num_batched_tokens=8) == {"a": 8}
        assert run(state, max_num_batched_tokens=8) == {"a": 2}
        planned = schedule(state, Policy(8, 16), 1.0)
        assert [len(s.token_ids) for s in planned.batch.sequences] == [1, 1, 1]
        tail = parent.block_ids[2]
        assert planned.batch.copies == tuple((tail, s.block_ids[2]) for s in planned.batch.sequences[1:])
        assert all(s.block_ids[:2] == parent.block_ids[:2] for s in planned.batch.sequences)
        state.check()


def test_forks_of_a_parent_that_ended_first_run_alone():
    state = state_of(("a", 10))
    parent = state.waiting["a"]
    state.add(Sequence(sequence("fork", 10).request, 1, parent))
    state.remove(parent, "abort")
    state.check()
    assert run(state) == {"fork": 10}


def test_a_fork_is_not_copied_from_a_parent_that_is_being_recomputed():
    state = SchedulerState(100, 4)
    parent = sequence("a", 10)
    state.add(parent)
    state.add(Sequence(sequence("fork", 10).request, 1, parent))
    run(state)
    state.preempt(parent)
    planned = schedule(state, Policy(8, 100), 1.0)
    assert {s.request_id: len(s.token_ids) for s in planned.batch.sequences} == {"a": 11, "fork": 10}
    assert not planned.batch.copies


# Static and dynamic batches


def test_a_dynamic_batch_starts_when_it_is_full_or_the_first_has_waited():
    state = state_of(("a", 2), ("b", 2))
    rules = {"max_num_seqs": 3, "batching": "dynamic", "batching_delay": 5.0}
    assert run(state, now=1.0, **rules) == {}
    state.add(sequence("c", 2, 2))
    assert list(run(state, now=1.0, **rules)) == ["a", "b", "c"]
    for one in list(state.running.values()):
        state.remove(one, "stop")
    state.add(sequence("d", 2, 3, arrival_time=10.0))
    assert run(state, now=14.9, **rules) == {}
    assert list(run(state, now=15.0, **rules)) == ["d"]


def test_nobody_joins_a_batch_that_runs_and_flush_waits_for_nobody():
    for batching in ("static", "dynamic"):
        state = state_of(("a", 2), ("b", 2), ("c", 2))
        rules = {"max_num_seqs": 2, "batching": batching, "flush": True}
        assert list(run(state, **rules)) == ["a", "b"]
        state.remove(state.running["a"], "stop")
        assert list(run(state, **rules)) == ["b"]
        state.remove(state.running["b"], "stop")
        assert list(run(state, **rules)) == ["c"]


def test_a_batch_whose_prompts_take_several_steps_is_still_one_batch():
    state = state_of(("a", 20), ("b", 20), ("c", 20))
    rules = {"max_num_seqs": 2, "batching": "static", "flush": True}
    assert run(state, **rules) == {"a": 16}
    assert run(state, **rules) == {"a": 4, "b": 12}
    assert run(state, **rules) == {"a": 1, "b": 8}
