import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from pelton import AsyncLLM, EngineConfig, PeltonError, SamplingParams
from pelton.async_answers import AsyncAnswers
from pelton.engine.engine import EngineOutput
from pelton.errors import RequestError
from pelton.metrics import RequestMetrics
from tests.helpers.fake_parts import EOS, FakeBuilt, FakeTokenizer, ids_of


def run(body, *args, config=None, **kwargs):
    """body(llm) in an event loop of its own; afterwards nothing of any request is left."""

    async def main():
        async with AsyncLLM.from_parts(FakeBuilt(*args, **kwargs), config) as llm:
            result = await asyncio.wait_for(body(llm), 20)
            for _ in range(200):
                if not llm._engine._engine.has_unfinished:
                    break
                await asyncio.sleep(0.01)
            assert not llm._streams and not llm._engine._unfinished
            llm._engine._engine.check()
            stats = llm.get_stats()
        assert stats.num_running == stats.num_waiting == 0
        return result

    return asyncio.run(main())


def test_many_callers_get_their_own_answers():
    async def body(llm):
        prompts = [f"prompt {i}" for i in range(40)]
        outputs = await asyncio.gather(*(llm.generate(prompt) for prompt in prompts))
        assert [o.outputs[0].text for o in outputs] == [p.upper() for p in prompts]
        assert all(o.finished and o.metrics.num_output_tokens == len(o.outputs[0].token_ids) for o in outputs)
        assert len({o.request_id for o in outputs}) == 40

    run(body)


def test_an_answer_whose_text_fails_fails_alone():
    class Fragile(FakeTokenizer):
        def detokenizer(self, skip_special_tokens=True, *, at_start=True):
            made = super().detokenizer(skip_special_tokens)
            add = made.add

            def add_or_fail(token_ids):
                if ids_of("X")[0] in token_ids:
                    raise KeyError("no such piece")
                return add(token_ids)

            made.add = add_or_fail
            return made

    async def body(llm):
        prompts = ["abc", "axc", "abd"]
        results = await asyncio.gather(*(llm.generate(prompt) for prompt in prompts), return_exceptions=True)
        assert isinstance(results[1], PeltonError) and "KeyError" in str(results[1])
        assert [results[i].outputs[0].text for i in (0, 2)] == ["ABC", "ABD"]

    run(body, tokenizer=Fragile())


def test_the_pieces_of_a_stream_make_up_the_whole():
    async def body(llm):
        pieces = [output async for output in llm.stream("abcdef", SamplingParams(n=2))]
        for index in range(2):
            mine = [p.outputs[0] for p in pieces if p.outputs[0].index == index]
            assert "".join(p.text for p in mine) == "ABCDEF"
            assert [t for p in mine for t in p.token_ids] == [*ids_of("ABCDEF"), 0]
            assert [p.finish_reason for p in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert [p.finished for p in pieces] == [False] * (len(pieces) - 1) + [True]

    run(body)


def test_a_slow_reader_gets_larger_pieces():
    async def body(llm):
        stream = llm.stream("a long answer")
        first = await anext(stream)
        await asyncio.sleep(0.5)
        rest = [piece async for piece in stream]
        assert first.outputs[0].text + "".join(p.outputs[0].text for p in rest) == "A LONG ANSWER"
        assert len(rest) <= 2

    run(body)


def test_a_stop_string_ends_the_request_with_its_stamps():
    async def body(llm):
        output = await llm.generate("one two three", SamplingParams(stop=[" TH"]))
        assert output.outputs[0].text == "ONE TWO"
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", " TH")
        assert output.metrics.ttft is not None

    run(body)


def test_who_leaves_or_is_cancelled_ends_the_request():
    async def body(llm):
        async for _ in llm.stream("x" * 100):
            break
        started = asyncio.Event()

        async def read():
            async for _ in llm.stream("y" * 200):
                started.set()
                await asyncio.sleep(3600)

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await llm.generate("hi")).outputs[0].text == "HI"

    run(body)


def test_a_request_ends_with_its_time():
    async def body(llm):
        output = await llm.generate("x" * 400, SamplingParams(max_tokens=None), timeout=0.0)
        assert (output.outputs[0].finish_reason, output.finished) == ("timeout", True)

    run(body)


def test_a_refused_request_raises_at_once_and_leaves_nothing():
    async def body(llm):
        for prompt, params in (("", None), ([10_000], None), ("x", SamplingParams(stop_token_ids=[10_000]))):
            with pytest.raises(RequestError):
                await llm.generate(prompt, params)

    run(body)


def test_a_failing_step_tells_everybody_and_the_engine_goes_on():
    async def body(llm):
        llm._parts.executor.fail_with = RuntimeError("broken kernel")
        results = await asyncio.gather(llm.generate("a"), llm.generate("b"), return_exceptions=True)
        failed = [r for r in results if isinstance(r, PeltonError)]
        assert failed and all("broken kernel" in str(error) for error in failed)
        assert (await llm.generate("hi")).outputs[0].text == "HI"

    run(body)


def test_a_bug_in_the_engine_leaves_nobody_waiting():
    async def main():
        llm = AsyncLLM.from_parts(FakeBuilt())
        engine = llm._engine._engine
        engine.check = engine.step = lambda **_: (_ for _ in ()).throw(SystemError("lost a block"))
        # A step that raises fails requests; books that are wrong end the engine.
        with pytest.raises(PeltonError, match="lost a block"):
            await llm.generate("a")
        for _ in range(300):
            if llm._engine.error is not None:
                break
            await asyncio.sleep(0.01)
        with pytest.raises(PeltonError, match="the engine has stopped"):
            await llm.generate("b")
        llm.close()

    asyncio.run(main())


def test_closing_ends_streams_and_threads():
    async def main():
        llm = AsyncLLM.from_parts(FakeBuilt(), EngineConfig())
        submit = llm._parts.executor.submit
        llm._parts.executor.submit = lambda batch: (time.sleep(0.01), submit(batch))[1]
        task = asyncio.create_task(llm.generate("x" * 200, SamplingParams(max_tokens=None)))
        await asyncio.sleep(0.05)
        llm.close()
        llm.close()
        with pytest.raises(RequestError, match="is closed"):
            await task
        with pytest.raises(RequestError, match="is closed"):
            await llm.generate("a")
        assert not any(t.name == "pelton-engine" for t in threading.enumerate())

    asyncio.run(main())


def test_batches_that_are_not_in_flight_start_without_being_full():
    async def body(llm):
        output = await llm.generate("hi")
        assert output.outputs[0].text == "HI"

    run(body, config=EngineConfig(batching="dynamic", batching_delay=0.05))


def test_a_stop_string_in_the_very_last_step_leaves_the_metrics_there():
    """Speculation brings several tokens at once: here the stop string, and the token behind it that ends the answer."""

    class Engine:
        def add_request(self, *given, **options):
            pass

        def finish(self, request_id, reason="abort"):
            raise AssertionError("it has ended")

    async def main():
        answers = AsyncAnswers(FakeTokenizer(), 100, None)
        answers._engine = Engine()
        stream = answers.open("ab", SamplingParams(stop=["D"]), lambda: None)
        metrics = RequestMetrics(0.0, 0.1, (0.2, 0.2, 0.2))
        sequence, ids = SimpleNamespace(metrics=lambda: metrics), (*ids_of("CDE"), EOS)
        output = EngineOutput(stream.answers[0].sequence_id, sequence, ids, (None,) * 4, "stop", None, metrics)
        answers._dispatch([output])
        assert stream.take().outputs[0].text == "C" and stream.ended
        return stream.output.metrics

    assert asyncio.run(main()) is not None
