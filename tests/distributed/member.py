"""A process of a group without JAX: `member.py PORT SIZE RANK TIMEOUT ACT...`."""

import atexit
import sys
import time

from jaxinfer.distributed.group import Group
from jaxinfer.distributed.rendezvous import Kind, Place, join

port, size, rank = map(int, sys.argv[1:4])
links, _ = join(Place("127.0.0.1", port, size, rank), 60.0)
group = Group(rank, size, links, float(sys.argv[4]))
atexit.register(group.end)
print("joined", flush=True)
for act in sys.argv[5:]:
    if act == "gather":
        print(group.gather({"rank": rank}), flush=True)
    elif act == "agree":
        group.agree({"one": 1, "mesh": f"tensor={rank}"})
    elif act == "fail":
        group.fail("no luck")
        print("failed", flush=True)
    elif act == "lead":
        group.send(Kind.COMMAND, b"hello")
    elif act == "follow":
        while True:
            print(group.receive().decode(), flush=True)
    elif act == "fill":  # more than the connection holds
        group.send(Kind.COMMAND, bytes(64 << 20))
    else:
        time.sleep(float(act))
