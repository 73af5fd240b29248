"""What many clients ask for is worked out once."""

import asyncio

import pytest

from iqareward.serving.app import Shared
from iqareward.serving.requests import ServiceError


class Asked:
    """Counts how often it is asked, and waits until it may answer."""

    def __init__(self) -> None:
        self.times, self.may_answer, self.error = 0, asyncio.Event(), None

    async def __call__(self) -> int:
        self.times += 1
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return self.times


def test_one_question_for_all():
    """Whoever asks while a question is under way, or soon after, gets its answer; later it is asked anew."""

    async def scenario() -> None:
        asked = Asked()
        shared = Shared(asked, seconds=3600)
        waiting = [asyncio.ensure_future(shared()) for _ in range(50)]
        await asyncio.sleep(0)
        waiting.pop().cancel()  # a client that leaves
        asked.may_answer.set()
        assert await asyncio.gather(*waiting) == [1] * 49
        assert await shared() == 1
        shared.forget()
        assert await shared() == 2
        shared.seconds = 0.0
        await asyncio.sleep(0.01)
        assert await shared() == 3

    asyncio.run(scenario())


def test_errors_and_patience():
    """An error reaches all who ask, an answer that does not come is an error 503, and both are asked for anew."""

    async def scenario() -> None:
        asked = Asked()
        shared = Shared(asked, seconds=0.0, patience=0.05)
        for _ in range(2):
            with pytest.raises(ServiceError) as raised:
                await shared()
            assert raised.value.status == 503
        assert asked.times == 1
        asked.error = RuntimeError("lost")
        asked.may_answer.set()
        with pytest.raises(RuntimeError, match="lost"):
            await shared()
        asked.error = None
        await asyncio.sleep(0.01)
        assert await shared() == 2

    asyncio.run(scenario())
