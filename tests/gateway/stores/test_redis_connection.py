import asyncio
import shutil
import time

import pytest

from gateway.stores.limit_store import StoreAwayError
from gateway.stores.redis_connection import RedisConnection, Script
from tests.support.certificates import Authority
from tests.support.redis_server import RedisServer

SECRET = "hunter2hunter2"
ECHO = Script("return ARGV[1]")


async def test_a_script_is_sent_once_and_known_again_after_it_was_forgotten(tmp_path) -> None:
    with RedisServer(tmp_path) as server:
        connection = RedisConnection(server.url, "tag", timeout_s=10.0)
        for _ in range(3):
            assert await connection.run(ECHO, [], ["x"]) == b"x"
        assert server.command("INFO", "commandstats")["cmdstat_eval"]["calls"] == 1
        server.command("SCRIPT", "FLUSH")
        assert await connection.run(ECHO, [], ["y"]) == b"y"
        assert await connection.problems() == []
        server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        assert "noeviction" in (await connection.problems())[0]
        await connection.close()


async def test_after_a_call_that_was_cut_the_next_answer_is_its_own(tmp_path) -> None:
    with RedisServer(tmp_path) as server:
        connection = RedisConnection(server.url, "tag", timeout_s=0.2)
        assert await connection.call("PING")
        server.freeze()
        started_at = time.perf_counter()
        with pytest.raises(StoreAwayError, match="in time"):
            await connection.call("SET", "a", "old")
        assert time.perf_counter() - started_at < 5
        task = asyncio.ensure_future(connection.call("SET", "a", "older", timeout_s=5.0))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        server.thaw()
        assert await connection.call("ECHO", "mine", timeout_s=10.0) == b"mine"
        await connection.close()


@pytest.mark.parametrize("trouble", ["nobody", "password", "error"])
async def test_no_error_holds_the_address_or_the_password(tmp_path, trouble) -> None:
    with RedisServer(tmp_path) as server:
        url = server.url.replace("//", f"//user:{SECRET}@" if trouble == "password" else f"//:{SECRET}@")
        if trouble == "nobody":
            server.kill()
        if trouble == "error":
            server.command("CONFIG", "SET", "requirepass", SECRET)
        connection = RedisConnection(url, "tag", timeout_s=10.0)
        with pytest.raises(StoreAwayError) as caught:
            await connection.call(
                "HGET" if trouble == "error" else "PING", *(["a"] if trouble == "error" else [])
            )
        shown = f"{caught.value!r} {caught.value.__cause__!r} {connection!r}"
        assert SECRET not in shown
        assert "127.0.0.1" not in shown
        await connection.close()


async def test_tls_is_spoken_and_strangers_are_refused(tmp_path) -> None:
    authority, other = Authority(tmp_path, "Ours"), tmp_path / "other"
    other.mkdir()
    authority.server_context("IP:127.0.0.1")
    files = {"cert": tmp_path / "IP_127.0.0.1.pem", "key": tmp_path / "IP_127.0.0.1.key"}
    with RedisServer(
        tmp_path / "redis",
        is_tls=True,
        tls_cert_file=str(files["cert"]),
        tls_key_file=str(files["key"]),
        tls_ca_cert_file=authority.ca_file,
        tls_auth_clients="no",
    ) as server:
        trusting = RedisConnection(server.url, "tag", timeout_s=10.0, ca_file=authority.ca_file)
        assert await trusting.call("PING")
        await trusting.close()
        wary = RedisConnection(server.url, "tag", timeout_s=10.0, ca_file=Authority(other, "Others").ca_file)
        with pytest.raises(StoreAwayError):
            await wary.call("PING")
        await wary.close()
    shutil.rmtree(other)
