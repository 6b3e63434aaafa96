"""What goes through the relay arrives; that the far end is gone does not."""

import socket

import pytest

from jaxinfer.distributed.relay import Relay


def test_a_broken_connection_is_not_passed_on():
    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = Relay(server.getsockname())
        with socket.create_connection(("127.0.0.1", relay.port), timeout=20) as near:
            far, _ = server.accept()
            near.sendall(b"question")
            assert far.recv(100) == b"question"
            far.sendall(b"answer")
            assert near.recv(100) == b"answer"
            far.close()
            near.settimeout(0.5)
            with pytest.raises(TimeoutError):
                near.recv(100)
            near.sendall(b"is anybody there?")
            with pytest.raises(TimeoutError):
                near.recv(100)


def test_the_near_end_may_end():
    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = Relay(server.getsockname())
        with socket.create_connection(("127.0.0.1", relay.port), timeout=20):
            far, _ = server.accept()
            far.settimeout(20)
        assert far.recv(100) == b""
        far.close()
