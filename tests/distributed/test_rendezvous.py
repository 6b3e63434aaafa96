"""Processes find each other, or say in one line why not. Here they are threads, and JAX is not started."""

import contextlib
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxinfer.distributed import rendezvous
from jaxinfer.distributed.links import Link
from jaxinfer.distributed.rendezvous import Place, find_place, join, on_tpu_pod

NESTED = b"\x02\x00\x00\xc3\x50" + b"[" * 50_000  # as JSON


def free_port():
    """One that connections don't take by themselves, as they do from 32768 on."""
    while True:
        port = random.randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def places(size, host="127.0.0.1"):
    port = free_port()
    return [Place(host, port, size, rank) for rank in range(size)]


@contextlib.contextmanager
def joined(them, timeout=20.0):
    """What each one gets: links and a port, or its error."""

    def outcome(member):
        try:
            return join(member, timeout)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(them)) as pool:
        results = list(pool.map(outcome, them))
    yield results
    for links, _ in (result for result in results if isinstance(result, tuple)):
        for link in links.values():
            link.close()


def errors_of(them, timeout=20.0):
    with joined(them, timeout) as results:
        return results


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_all_find_process_0(host):
    with joined(places(3, host)[::-1]) as results:
        (links, port), *others = results[::-1]
        assert sorted(links) == [1, 2]
        for rank, (own, same) in enumerate(others, 1):
            assert same == port
            assert list(own) == [0]
            links[rank].send(9, b"to ", str(rank).encode())
            assert own[0].read() == [(9, b"to %d" % rank)]


def test_a_frame_comes_in_pieces():
    payload = os.urandom(3 << 20)
    with joined(places(2)) as ((links, _), (own, _)), ThreadPoolExecutor(1) as pool:
        sent = pool.submit(links[1].send, 9, payload)
        frames = []
        while not frames:
            frames = own[0].read()
        sent.result()
    assert frames == [(9, payload)]


def test_what_follows_the_welcome_is_kept(monkeypatch):
    """Process 0 goes on at once, and more than one frame may come with its last word."""
    read = Link.read_one

    def late(link, *arguments):
        time.sleep(0.3)
        return read(link, *arguments)

    first, second = places(2)
    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(join, first, 20.0)
        leader.add_done_callback(lambda done: done.result()[0][1].send(9, b"more"))
        monkeypatch.setattr(Link, "read_one", late)
        links, _ = join(second, 20.0)
        assert links[0].read() == [(9, b"more")]
        links[0].close()
        leader.result()[0][1].close()


def test_a_missing_process():
    first, second, _ = places(3)
    began = time.monotonic()
    errors = errors_of([first, second], timeout=1.0)
    assert time.monotonic() - began < 10
    for error in errors:
        assert isinstance(error, TimeoutError | ValueError)
        assert f"process 2 of 3 did not connect to {first.coordinator} within 1 s" in str(error)


def test_a_coordinator_that_is_not_there():
    error = errors_of([places(2)[1]], timeout=0.5)[0]
    assert isinstance(error, TimeoutError)
    assert "was not reached within 0.5 s (" in str(error)
    assert "is process 0 running, and is this its address?" in str(error)


def test_an_id_that_is_there_twice():
    first, second, _ = places(3)
    errors = errors_of([first, second, second])
    assert all("process_id 1 is that of two processes, one of them at 127.0.0.1" in str(error) for error in errors)


def test_another_number_of_processes():
    first, second = places(2)
    for error in errors_of([first, second._replace(size=3, rank=2)]):
        assert str(error).startswith("num_processes is 3 in process 2, at 127.0.0.1, and 2 in process 0: start")


def test_another_version(monkeypatch):
    facts = rendezvous._facts
    monkeypatch.setattr(
        rendezvous, "_facts", lambda member: facts(member) | ({"the version of jax": "0.1"} if member.rank else {})
    )
    for error in errors_of(places(2)):
        assert str(error).startswith("the version of jax is 0.1 in process 1, at 127.0.0.1, and 0.")


def test_two_of_process_0():
    first, _ = places(2)
    messages = sorted(str(error) for error in errors_of([first, first], timeout=1.0))
    assert "process 0 can't listen on that port (" in messages[0]
    assert "process 1 of 2 did not connect" in messages[1]


def test_strangers_are_sent_away(caplog):
    """One that says nothing, one that says something else, one with another secret: the process that belongs here
    comes all the same."""
    first, second = places(2)
    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(join, first, 30.0)
        for message in (b"GET / HTTP/1.1\r\n\r\n", b"\x02\x00\x00\x00\x02{}", b"\x02\xff\xff\xff\xff", NESTED, b""):
            with connected(first) as stranger:
                stranger.sendall(message)
        links, _ = join(second, 30.0)
        (own,) = links.values()
        assert list(leader.result()[0]) == [1]
        own.close()
        leader.result()[0][1].close()
    assert "a connection that was no process of this program was closed" in caplog.text


def test_who_drips_bytes_keeps_nobody_waiting(caplog, monkeypatch):
    """Each has one deadline for all that it says, and process 0 hears the others meanwhile."""
    monkeypatch.setattr(rendezvous, "HANDSHAKE", 1.0)
    first, second, third = places(3)
    gone = {}

    def drip(stranger, began):
        try:
            stranger.sendall(b"\x02\x00\x00\xea\x60")
            while True:
                stranger.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            gone[stranger] = time.monotonic() - began

    with ThreadPoolExecutor(6) as pool, contextlib.ExitStack() as stack:
        leader = pool.submit(join, first, 20.0)
        strangers = [stack.enter_context(connected(first)) for _ in range(4)]
        for stranger in strangers:
            pool.submit(drip, stranger, time.monotonic())
        time.sleep(0.2)
        began = time.monotonic()
        links = [pool.submit(join, second, 20.0)]
        while len(gone) < 4:
            assert time.monotonic() - began < 10
            time.sleep(0.05)
        assert max(gone.values()) < 5
        links.append(pool.submit(join, third, 20.0))
        assert sorted(leader.result()[0]) == [1, 2]
        for link in [*leader.result()[0].values(), *(future.result()[0][0] for future in links)]:
            link.close()
    assert "it did not say who it is within 1 s" in caplog.text


def test_process_0_keeps_its_own_time():
    """Also while somebody is at it."""
    first, _ = places(2)
    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(join, first, 1.0)
        with connected(first) as stranger:
            began = time.monotonic()
            while not leader.done():
                with contextlib.suppress(OSError):
                    stranger.sendall(b"\x02")
                time.sleep(0.2)
                assert time.monotonic() - began < 10
        with pytest.raises(TimeoutError, match="process 1 of 2 did not connect"):
            leader.result()


def test_more_strangers_than_there_is_room_for(monkeypatch, caplog):
    monkeypatch.setattr(rendezvous, "CALLERS", 3)
    first, second = places(2)
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        leader = pool.submit(join, first, 30.0)
        for _ in range(8):
            stack.enter_context(connected(first))
        links, _ = join(second, 30.0)
        links[0].close()
        leader.result()[0][1].close()
    assert caplog.text.count("there are too many others") >= 5


def test_a_follower_keeps_its_own_time(monkeypatch):
    """Where something that never comes to an end answers in place of process 0."""
    monkeypatch.setattr(rendezvous, "HANDSHAKE", 0.5)
    for message in (b"", b'\x01\x00\x00\x00\x0d{"nonce":"a"}'):  # no hello, and no welcome
        with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
            follower = pool.submit(join, Place("127.0.0.1", server.getsockname()[1], 2, 1), 0.5)
            connection, _ = server.accept()
            began = time.monotonic()
            with connection:
                connection.sendall(message + b"\x03\x00\x00\xff\xff" if message else b"\x01\x00\x00\xff\xff")
                while not follower.done() and time.monotonic() - began < 10:
                    with contextlib.suppress(OSError):
                        connection.sendall(b" ")
                    time.sleep(0.05)
            assert time.monotonic() - began < 5
            with pytest.raises(TimeoutError, match=r"was not reached within 0\.5 s|did not go on"):
                follower.result()


def test_a_welcome_without_a_proof():
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        port = server.getsockname()[1]
        follower = pool.submit(join, Place("127.0.0.1", port, 2, 1), 10.0)
        connection, _ = server.accept()
        with connection:
            connection.sendall(b'\x01\x00\x00\x00\x0d{"nonce":"a"}\x03\x00\x00\x00\x0a{"port":7}')
            with pytest.raises(ValueError, match="what answers there is not process 0"):
                follower.result()


@contextlib.contextmanager
def connected(address):
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            connection = socket.create_connection((address.host, address.port))
            break
        time.sleep(0.01)
    with connection:
        yield connection


def test_a_secret_keeps_others_out(monkeypatch, caplog):
    first, second = places(2)
    proof = rendezvous._proof
    monkeypatch.setenv("JAXINFER_SECRET", "ours")
    mine = threading.get_ident()

    def proof_of(what, *nonces):
        if threading.get_ident() != mine:
            return proof(what, *nonces)
        with monkeypatch.context() as patch:
            patch.setenv("JAXINFER_SECRET", "theirs")
            return proof(what, *nonces)

    monkeypatch.setattr(rendezvous, "_proof", proof_of)
    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(join, first, 1.0)
        with pytest.raises(ValueError, match=r"^JAXINFER_SECRET is not that of process 0: set the same on every host"):
            join(second, 10.0)
        with pytest.raises(TimeoutError, match="process 1 of 2 did not connect"):
            leader.result()
    assert "a process at 127.0.0.1, which has another JAXINFER_SECRET, was refused" in caplog.text


def test_process_0_has_to_know_the_secret(monkeypatch):
    proof = rendezvous._proof
    count = iter(range(9))  # another guess each time
    monkeypatch.setattr(
        rendezvous, "_proof", lambda what, *nonces: f"{next(count)}" if what == "leads" else proof(what, *nonces)
    )
    _, error = errors_of(places(2))
    assert str(error).startswith("JAXINFER_SECRET is not that of process 0, at 127.0.0.1:")


def test_something_else_answers():
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        port = server.getsockname()[1]
        follower = pool.submit(join, Place("127.0.0.1", port, 2, 1), 10.0)
        connection, _ = server.accept()
        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        with pytest.raises(ValueError, match=rf"^coordinator 127.0.0.1:{port}: what answers there is not process 0"):
            follower.result()
        connection.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("here", 2, 0), r"^coordinator is 'here': it must be HOST:PORT of process 0, such as 10.0.0.2:8476$"),
        (("here:0", 2, 0), "^coordinator is 'here:0': it must be"),
        (("here:1", 2, 2), "^process_id is 2: with num_processes 2 it must be from 0 to 1$"),
        (("here:1", 2, -1), "^process_id is -1: it must be an integer from 0"),
        (("here:1", 0, 0), "^num_processes is 0: it must be an integer from 1"),
        (("here:1", None, 0), "^num_processes is missing: give coordinator, num_processes and process_id"),
        (("here:1", 2, None), "^process_id is missing"),
        ((None, 2, 1), "^coordinator is missing"),
    ],
)
def test_places_that_can_not_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_place(*arguments, timeout=1.0)


def test_places():
    assert find_place("[::1]:80", 2, 1, 1.0) == Place("::1", 80, 2, 1)
    assert find_place("a-host:80", 1, 0, 1.0) is None
    assert find_place(None, None, None, 1.0) is None


def test_slurm_is_found_as_jax_finds_it(monkeypatch):
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[001-002]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    assert find_place(None, None, None, 1.0) == Place("node001", 61447, 2, 1, [0])


def test_tpu_pods(monkeypatch):
    assert not on_tpu_pod()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one,two")
    assert not on_tpu_pod()  # JAX_PLATFORMS is cpu
    monkeypatch.delenv("JAX_PLATFORMS")
    assert on_tpu_pod()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one")
    assert not on_tpu_pod()
