"""The schedule as a value: what runs next, given who is there."""

import random

from pelton.config import SamplingParams
from pelton.engine.request import Request, Sequence, Status
from pelton.engine.scheduler import Budget, SchedulerState, schedule


def sequence(name: str, num_prompt_tokens: int) -> Sequence:
    prompt = tuple(range(100, 100 + num_prompt_tokens))
    return Sequence(Request(name, prompt, SamplingParams(), 0.0, 0, 1000, frozenset()))


def state_of(*prompts: tuple[str, int], num_blocks: int = 100, block_size: int = 4) -> SchedulerState:
    state = SchedulerState(num_blocks, block_size)
    for name, length in prompts:
        state.add(sequence(name, length))
    return state


def run(state: SchedulerState, max_num_seqs: int = 8, max_num_batched_tokens: int = 16) -> dict[str, int]:
    """Schedule a step and pretend that it ran; {request id: num_scheduled_tokens}."""
    planned = schedule(state, Budget(max_num_seqs, max_num_batched_tokens), now=1.0)
    for seq, scheduled in zip(planned.sequences, planned.batch.sequences, strict=True):
        seq.num_computed_tokens += len(scheduled.token_ids)
        if scheduled.sample is not None:
            seq.append(7, 1.0)
    state.check()
    return {s.request_id: len(s.token_ids) for s in planned.batch.sequences}


def test_waiting_requests_are_admitted_in_arrival_order_until_the_tokens_are_used_up():
    state = state_of(("a", 6), ("b", 6), ("c", 6))
    assert run(state) == {"a": 6, "b": 6, "c": 4}


def test_a_long_prompt_is_computed_in_chunks_and_only_the_last_chunk_samples():
    state = state_of(("a", 40))
    budget = Budget(8, 16)
    for start, length, samples in ((0, 16, False), (16, 16, False), (32, 8, True)):
        planned = schedule(state, budget, now=0.0)
        (scheduled,) = planned.batch.sequences
        assert scheduled.num_computed_tokens == start
        assert scheduled.token_ids == tuple(range(100 + start, 100 + start + length))
        assert (scheduled.sample is not None) == samples
        assert len(scheduled.block_ids) == (start + length) // 4
        planned.sequences[0].num_computed_tokens += length


def test_running_decodes_come_before_a_prefill_that_arrived_earlier():
    state = state_of(("long", 100), ("short", 1))
    run(state, max_num_batched_tokens=101)
    state.running["long"].num_computed_tokens = 0  # as if its prefill were still going on
    assert list(run(state).items()) == [("short", 1), ("long", 15)]


def test_decodes_and_a_prefill_chunk_share_a_step():
    state = state_of(("a", 3), ("b", 3))
    run(state)
    state.add(sequence("c", 30))
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
    assert list(state.waiting) == ["big", "small"]


def test_when_blocks_run_out_the_latest_arrival_is_preempted_and_goes_to_the_head_of_the_queue():
    state = state_of(("a", 4), ("b", 3), num_blocks=3)
    state.add(sequence("c", 4))
    assert run(state) == {"a": 4, "b": 3}
    assert run(state) == {"a": 1, "b": 1}  # a takes the third block
    late = state.running["b"]
    assert run(state) == {"a": 1}  # and nobody is admitted in a step that preempts
    assert late.status is Status.PREEMPTED
    assert (late.num_computed_tokens, late.block_ids, late.num_preemptions) == (0, (), 1)
    assert list(state.waiting) == ["b", "c"]


def test_the_output_of_a_preempted_request_is_part_of_what_is_recomputed():
    state = state_of(("a", 4), ("b", 3), num_blocks=3)
    run(state), run(state)
    late = state.running["b"]
    run(state)
    state.remove(state.running["a"], "stop")
    planned = schedule(state, Budget(8, 16), now=2.0)
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
        a = schedule(first, Budget(4, 8), now=0.0)
        b = schedule(second, Budget(4, 8), now=0.0)
        assert a.batch == b.batch
        assert [s.request_id for s in a.preempted] == [s.request_id for s in b.preempted]
        for planned in (a, b):
            for seq, scheduled in zip(planned.sequences, planned.batch.sequences, strict=True):
                seq.num_computed_tokens += len(scheduled.token_ids)
                if scheduled.sample is not None:
                    seq.append(7, 0.0)


def test_removing_a_waiting_request_leaves_the_others_in_order():
    state = state_of(("a", 1), ("b", 1), ("c", 1))
    state.remove(state.waiting["b"], "abort")
    assert list(run(state)) == ["a", "c"]
