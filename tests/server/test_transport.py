"""Writes that leave together."""

import asyncio

from jaxinfer.server.measure import Server
from jaxinfer.server.transport import MOST, CorkedTransport, Outbox


class Written:
    """A transport that remembers."""

    def __init__(self):
        self.sent, self.closed = [], False

    def write(self, data):
        self.sent.append(data)

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed


def test_a_turn_s_writes_leave_as_one():
    async def main():
        outbox, plain = Outbox(), [Written() for _ in range(3)]
        corked = [CorkedTransport(transport, outbox) for transport in plain]
        for round_ in (b"a", b"b"):
            for transport in corked[:2]:
                transport.write(round_)
        assert [transport.sent for transport in plain] == [[], [], []]
        corked[1].close()  # after what was written
        corked[1].write(b"lost")
        await asyncio.sleep(0)
        assert [transport.sent for transport in plain] == [[b"ab"], [b"ab"], []]
        corked[0].write(b"c")  # another turn
        await asyncio.sleep(0)
        assert plain[0].sent == [b"ab", b"c"]
        assert plain[1].closed
        assert not corked[0].is_closing()

    asyncio.run(main())


def test_many_writes_do_not_wait_for_each_other():
    async def main():
        outbox, plain = Outbox(), [Written() for _ in range(MOST + 1)]
        for transport in plain:
            CorkedTransport(transport, outbox).write(b"x")
        assert sum(transport.sent == [b"x"] for transport in plain) == MOST
        await asyncio.sleep(0)
        assert all(transport.sent == [b"x"] for transport in plain)

    asyncio.run(main())


def test_connections_are_kept(server):
    async def main():
        async with Server(server.url) as one:
            for _ in range(3):
                assert await one.model()
            (connection,) = one._idle
            body = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0.0, "stream": True}
            lines = [line async for line in one.lines("POST", "/v1/completions", body)]
            assert b"data: [DONE]" in lines
            assert one._idle == [connection]

    asyncio.run(main())
