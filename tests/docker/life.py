"""One life of Docker beside snatd, or without it: all that happens to it, and what was seen.

    python -m tests.docker.life SUITE TREE FOLDER BACKEND with|without

prints the steps and what snatd complained of, as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.docker.dockerd import IMAGE, call, callers
from tests.docker.world import World
from tests.lab.network import OUTSIDE

CONTAINERS = 100
# How long it takes to tell what Docker says and does without snatd.
_FEW = 10
# Since Docker 28 other hosts are refused. Its documentation: this flag, and the port published.
OPEN = ("--allow-direct-routing",), ("--publish=8090:80",)
# Asked a second time where no answer came: 1 container of 100 had none once, on a loaded machine.
# All calls are in the log of who is called, and none may have a wrong source.
_ASK = 'nc -w 10 "$0" 80 </request | grep yes'
_SHORT = f'{_ASK} || {_ASK}; nc -w 10 "$1" 8080 </request'


def main() -> None:
    suite, tree, folder, backend, how = sys.argv[1:]
    flags, options = OPEN if suite == "forky" else ((), ())
    # The whole of it with Debian 12's, the most of it with the newer ones.
    whole = suite == "bookworm"
    number = CONTAINERS if whole and how == "with" else _FEW
    with World(Path(tree), Path(folder), backend, with_snatd=how == "with") as world:
        world.start_neighbour(*flags, options=options)
        live(world, whole=whole, flags=flags, containers=number)
        complaints = [
            event
            for snatd in world.snatds
            for event in snatd.events()
            if event["level"] in ("warning", "error")
        ]
        exits = [snatd.stop() for snatd in world.snatds]
    steps = {name: asdict(step) for name, step in world.steps.items()}
    print(json.dumps({"steps": steps, "complaints": complaints, "exits": exits}))


def live(world: World, *, whole: bool, flags: tuple[str, ...], containers: int) -> None:
    """From the first start on. `flags`: what dockerd is always given."""
    node = world.node
    node.start(*flags)
    with world.step("Docker alone"):
        world.start_caller()
    for snatd in world.snatds:
        snatd.start()
    world.more_calls()
    with world.step("snatd after Docker"):
        pass
    node.stop()
    with world.step("Docker after snatd"):
        node.start(*flags)
    with world.step("restart"):
        node.restart(*flags)
    node.restart("--live-restore", *flags)
    with world.step("restart with live-restore") as more:
        before = node.pid_of("caller")
        node.stop()
        world.more_calls()
        node.start("--live-restore", *flags)
        more["went on"] = node.pid_of("caller") == before
    with world.step("kill -9"):
        node.kill()
        world.more_calls()
        node.start(*flags)
    with world.step("published ports") as more:
        more.update(_published(world))
    node.remove("shop")
    with world.step("network create") as more:
        more.update(_another_network(world))
    node.remove("other")
    node.docker("network", "rm", "other")
    with world.step("many containers") as more:
        more["started"], more["answered"] = containers, _many(world, containers)
    if not whole:
        return
    with world.step("--ip-masq=false"):
        node.restart("--ip-masq=false")
    with world.step("--iptables=false"):
        node.restart("--iptables=false")
    with world.step("Docker as before"):
        node.restart()
    node.stop()
    with world.step("another lease"):
        node.lease(23)
        world.route(world.neighbour, node)
        node.start()


def _published(world: World) -> dict[str, Any]:
    """Who a container with a published port is called by, from everywhere."""
    node, neighbour = world.node, world.neighbour
    log = node.serve("shop", "--publish=8081:80")
    from_where = {
        "outside": world.outside.pid,
        "the same node": node.host.pid,
        "a container of the same node": node.pid_of("caller"),
        "itself": node.pid_of("shop"),
        "the other node": neighbour.host.pid,
        "a container of the other node": neighbour.pid_of("web"),
    }
    found = {}
    for name, pid in from_where.items():
        begin = log.stat().st_size
        answer = call(pid, node.address, 8081)
        (one,) = callers(log.read_text()[begin:]) or ("nobody",)
        found[name] = f"{answer} to {one}"
    return found


def _another_network(world: World) -> dict[str, Any]:
    """A network of Docker's outside of the cluster's: as whom its containers are seen."""
    node = world.node
    node.docker("network", "create", "--subnet=172.31.77.0/24", "other")
    node.serve("other", "--network=other")
    pid = node.pid_of("other")
    begin = world.seen()
    answers = [call(pid, world.web, 80), call(pid, OUTSIDE, 8080)]
    web, _, bare = world.since(begin)
    return {"answers": answers, "as the node": web[node.address] > 0, "bare": bare}


def _many(world: World, number: int) -> int:
    """Containers that call as the first thing they do, and are gone; every fifth with a port. How
    many got an answer."""
    words = f"docker run --rm $publish {IMAGE} sh -c '{_SHORT}' {world.web} {OUTSIDE}"
    script = (
        "if [ $(($1 % 5)) = 0 ]; then publish=--publish=$((9000 + $1)):80; else publish=; fi; "
        f"{words}"
    )
    said = world.node.host.run(
        *("sh", "-c", 'seq "$1" | xargs -P 4 -n 1 sh -euc "$2" sh', "sh", str(number), script),
        timeout_s=300,
    )
    return said.count("yes")


if __name__ == "__main__":
    main()
