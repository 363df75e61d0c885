"""What programs do with redis-py, told twice: to the offloaded server and to a plain one. They hear the same.

With the parser in C (hiredis) and those in Python, RESP2 and RESP3, blocking sockets and asyncio.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from redis._parsers import (
    _AsyncHiredisParser,
    _AsyncRESP2Parser,
    _AsyncRESP3Parser,
    _HiredisParser,
    _RESP2Parser,
    _RESP3Parser,
)
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.redis.harness import Sut, eventually

pytestmark = pytest.mark.bpf

PARSERS: dict[tuple[str, int], tuple[Any, Any]] = {
    ("hiredis", 2): (_HiredisParser, _AsyncHiredisParser),
    ("hiredis", 3): (_HiredisParser, _AsyncHiredisParser),
    ("python", 2): (_RESP2Parser, _AsyncRESP2Parser),
    ("python", 3): (_RESP3Parser, _AsyncRESP3Parser),
}

Settings = dict[str, Any]
Made = Callable[..., Any]
"""Makes a client of the server that the story is told to."""


class Both:
    """Tells a story to both servers, with one parser and protocol."""

    def __init__(self, sut: Sut, plain: Sut, parser: str, protocol: int) -> None:
        self.sut, self.plain, self.protocol = sut, plain, protocol
        self.parser, self.async_parser = PARSERS[parser, protocol]

    def settings(self, server: Sut) -> Settings:
        return {
            "port": server.port,
            "protocol": self.protocol,
            "socket_timeout": 10,
            "retry": Retry(NoBackoff(), 3),
        }

    def pool(self, server: Sut, kind: Any = redis.ConnectionPool, **settings: Any) -> Any:
        settings = {"parser_class": self.parser, **self.settings(server), **settings}
        pool = kind(**settings)
        connection = pool.get_connection()
        # Not what redis-py falls back to by itself.
        assert type(connection._parser) is self.parser
        pool.release(connection)
        return pool

    def tell(self, story: Callable[[Made], list[Any]], serves: int = 0) -> list[Any]:
        """The story's results, the same from both; at least so many of its requests were served."""
        heard = []
        served = self.sut.served()
        for server in (self.sut, self.plain):
            pools: list[Any] = []

            def make(
                kind: Any = redis.ConnectionPool,
                server: Sut = server,
                pools: list[Any] = pools,
                **settings: Any,
            ) -> Any:
                pools.append(self.pool(server, kind, **settings))
                return redis.Redis(connection_pool=pools[-1])

            try:
                make().flushall()
                heard.append(story(make))
            finally:
                for pool in pools:
                    pool.disconnect()
        assert heard[0] == heard[1]
        if self.sut.offloaded:
            assert self.sut.served() - served >= serves
        return heard[0]

    def tell_async(self, story: Callable[[Made], Awaitable[list[Any]]], serves: int = 0) -> list[Any]:
        async def told(server: Sut) -> list[Any]:
            clients: list[Any] = []

            def make(kind: Any = redis.asyncio.BlockingConnectionPool, **settings: Any) -> Any:
                pool = kind(
                    parser_class=self.async_parser, **{**self.settings(server), "retry": None, **settings}
                )
                clients.append(redis.asyncio.Redis.from_pool(pool))
                return clients[-1]

            try:
                await make().flushall()
                return await story(make)
            finally:
                for client in clients:
                    await client.aclose()

        served = self.sut.served()
        heard = [asyncio.run(told(server)) for server in (self.sut, self.plain)]
        assert heard[0] == heard[1]
        if self.sut.offloaded:
            assert self.sut.served() - served >= serves
        return heard[0]


@pytest.fixture(params=list(PARSERS), ids=[f"{parser}-resp{protocol}" for parser, protocol in PARSERS])
def both(request: Any, sut: Sut, plain: Sut) -> Iterator[Both]:
    yield Both(sut, plain, *request.param)


def values() -> list[Any]:
    """What people store: text, numbers, bytes that look like the protocol, nothing, a lot."""
    return ["text", "ünïcode", 0, -17, 3.5, b"\x00\r\n$-1\r\n+OK\r\n", b"", "x" * 4096, "x" * 4097]


def test_values_of_every_kind(both: Both) -> None:
    def story(make: Made) -> list[Any]:
        client, texts = make(), make(decode_responses=True)
        out: list[Any] = []
        for _ in range(3):
            for number, value in enumerate(values()):
                out += [client.set(f"k{number}", value), client.get(f"k{number}"), client.get("none")]
            out += [texts.get("k0"), texts.get("k1"), client.mget("k0", "none", "k2")]
            out += [client.incr("k2"), client.get("k2"), client.append("k0", "!"), client.get("k0")]
        return out

    both.tell(story, serves=30)


def test_errors_are_raised_and_the_connection_stays(both: Both) -> None:
    def story(make: Made) -> list[Any]:
        client = make(max_connections=1)
        out: list[Any] = []
        client.rpush("list", "x")
        client.set("text", "x")
        for _ in range(3):
            for call in (
                lambda: client.get("list"),
                lambda: client.incr("text"),
                lambda: client.execute_command("NOSUCH"),
                lambda: client.execute_command("GET"),
                lambda: client.execute_command("SET", "a"),
            ):
                with pytest.raises(redis.ResponseError) as raised:
                    call()
                out += [str(raised.value), client.set("k", "v"), client.get("k")]
        return out

    both.tell(story)


@pytest.mark.parametrize("transaction", [True, False])
def test_pipelines(both: Both, transaction: bool) -> None:
    def story(make: Made) -> list[Any]:
        client = make()
        out: list[Any] = []
        for count in (1, 2, 5, 16, 32, 33, 100):
            with client.pipeline(transaction=transaction) as pipe:
                for number in range(count):
                    pipe.set(f"k{number}", f"{count}:{number}").get(f"k{number}")
                out.append(pipe.execute())
            with client.pipeline(transaction=transaction) as pipe:
                for number in range(count):
                    pipe.get(f"k{number}")
                pipe.incr("count")
                pipe.get("count").lpush("count", "wrong type").get("k0")
                out.append([str(each) for each in pipe.execute(raise_on_error=False)])
            out.append(client.get("count"))
        return out

    both.tell(story, serves=4)


def test_optimistic_transactions(both: Both) -> None:
    """client.transaction retries when another client has set a watched key, by whatever way it did."""

    def story(make: Made) -> list[Any]:
        client, rival = make(), make()
        out: list[Any] = []
        for disturb in range(6):
            client.set("k", disturb)
            rival.get("k")
            tries = []

            def change(pipe: Any, disturb: int = disturb, tries: list[Any] = tries) -> None:
                seen = int(pipe.get("k"))
                tries.append(seen)
                if len(tries) <= disturb % 3:
                    rival.set("k", seen + 100)
                pipe.multi()
                pipe.set("k", seen + 1)
                pipe.get("k")

            out += [client.transaction(change, "k"), tries, rival.get("k")]
        return out

    both.tell(story)


def test_scripts(both: Both) -> None:
    def story(make: Made) -> list[Any]:
        client = make()
        swap = client.register_script(
            "local was = redis.call('GET', KEYS[1]) redis.call('SET', KEYS[1], ARGV[1]) return was"
        )
        out: list[Any] = []
        for number in range(30):
            out += [client.set("k", number), swap(keys=["k"], args=[f"script {number}"]), client.get("k")]
            if number == 10:
                client.script_flush()
            if number % 10 == 0:
                with client.pipeline() as pipe:
                    swap(keys=["k"], args=["in a pipeline"], client=pipe)
                    pipe.get("k")
                    out.append(pipe.execute())
        return out

    both.tell(story, serves=10)


def test_a_lock_is_held_by_one(both: Both) -> None:
    """redis.lock: SET NX PX and scripts, around a counter that is read and set by GET and SET."""

    def story(make: Made) -> list[Any]:
        client = make(redis.BlockingConnectionPool, max_connections=8, timeout=20)
        client.set("count", 0)
        wrong: list[Any] = []

        def work() -> None:
            try:
                for _ in range(8):
                    with client.lock("lock", timeout=30, sleep=0.001, blocking_timeout=30):
                        client.set("count", int(client.get("count")) + 1)
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        out = [wrong, client.get("count"), client.exists("lock")]
        first = client.lock("lock", timeout=10)
        out += [first.acquire(blocking=False), first.owned(), first.extend(10)]
        out += [client.lock("lock").acquire(blocking=False), first.locked(), first.release(), first.locked()]
        return out

    heard = both.tell(story)
    assert heard[:3] == [[], b"32", 0]


def test_publish_and_subscribe_beside(both: Both) -> None:
    def story(make: Made) -> list[Any]:
        client = make()
        heard: list[Any] = []
        with client.pubsub(ignore_subscribe_messages=True) as sub:
            sub.subscribe("news", other=lambda message: heard.append(("handler", message["data"])))
            sub.psubscribe("new*")
            # Three confirmations, which are swallowed.
            for _ in range(3):
                sub.get_message(timeout=5)
            for number in range(20):
                client.set("k", number)
                heard.append((client.publish("news", f"{number}"), client.get("k")))
                client.publish("other", number)
                eventually(lambda: sub.get_message(timeout=1), what="a message")
                heard.append(sub.get_message(timeout=5))
                sub.get_message(timeout=5)
            sub.unsubscribe()
            sub.punsubscribe()
        return [*heard, client.get("k")]

    both.tell(story)


def test_a_killed_connection_is_made_again(both: Both) -> None:
    """CLIENT KILL between two commands: redis-py notices, connects again, and nothing is lost or doubled."""

    def story(make: Made) -> list[Any]:
        client, other = make(max_connections=1, client_name="victim"), make()
        out: list[Any] = []
        for number in range(10):
            out += [client.set("k", number), client.get("k")]
            victim = next(each for each in other.client_list() if each["name"] == "victim")
            out.append(other.client_kill_filter(_id=victim["id"]))
            out += [client.get("k"), client.incr("n"), client.set("k", "after"), client.get("k")]
        return out

    assert both.tell(story)[-3] == 10


def test_a_blocking_pool_smaller_than_its_threads(both: Both) -> None:
    def story(make: Made) -> list[Any]:
        client = make(redis.BlockingConnectionPool, max_connections=3, timeout=20)
        wrong: list[Any] = []

        def work(name: int) -> None:
            try:
                for number in range(60):
                    client.set(f"k{name}", number)
                    got = client.get(f"k{name}")
                    if got != b"%d" % number:
                        wrong.append((name, number, got))
                    if number % 20 == 19:
                        client.incr("total")
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(each,)) for each in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return [wrong, client.get("total"), client.mget(*(f"k{each}" for each in range(8)))]

    heard = both.tell(story, serves=50)
    assert heard == [[], b"24", [b"59"] * 8]


def test_asyncio(both: Both) -> None:
    async def story(make: Made) -> list[Any]:
        client = make(max_connections=6, timeout=20)
        texts = make(decode_responses=True, max_connections=1, timeout=20)

        async def work(name: int) -> list[Any]:
            out: list[Any] = []
            for number in range(30):
                out += [await client.set(f"k{name}", number), await client.get(f"k{name}")]
                if number % 5 == 0:
                    async with client.pipeline(transaction=number % 2 == 0) as pipe:
                        pipe.incr(f"k{name}").get(f"k{name}").get("none")
                        out.append(await pipe.execute())
            return out

        out = list(await asyncio.gather(*(work(name) for name in range(10))))
        with pytest.raises(redis.ResponseError):
            await client.lpush("k0", "x")
        swap = client.register_script("redis.call('SET', KEYS[1], ARGV[1]) return redis.call('GET', KEYS[1])")
        out.append([await swap(keys=["k0"], args=["script"]), await client.get("k0"), await texts.get("k0")])
        async with client.lock("lock", timeout=10):
            out.append([await client.exists("lock")])
        async with client.pubsub() as sub:
            await sub.subscribe("news")
            await sub.get_message(timeout=5)
            out.append([await client.publish("news", "x")])
            message = await sub.get_message(timeout=5)
            out.append([message["data"] if message else None])
        return out

    both.tell_async(story, serves=100)


def test_asyncio_requests_that_are_given_up(both: Both) -> None:
    """A cancelled request takes its connection with it: no later one gets its reply."""

    async def story(make: Made) -> list[Any]:
        client = make(max_connections=2, timeout=20)
        await client.set("k", "right")
        for _ in range(20):
            task = asyncio.create_task(client.blpop("nothing", timeout=5))
            await asyncio.sleep(0)
            await asyncio.gather(client.get("k"), client.set("other", "x"), return_exceptions=False)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            impatient = asyncio.create_task(client.get("k"))
            await asyncio.sleep(0)
            impatient.cancel()
            await asyncio.gather(impatient, return_exceptions=True)
            assert await client.get("k") == b"right"
            assert await client.get("other") == b"x"
        return [await client.get("k")]

    both.tell_async(story)
