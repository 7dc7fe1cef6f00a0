"""What each mutation does to the kernel and to the model: one transaction, and both or neither."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from snatd.core.model import Backend, Family
from tests.lab.netns import until
from tests.soak.model import POSTROUTING, Table, is_own_chain
from tests.soak.rivals import once
from tests.soak.rules import (
    CHAINS,
    SIDES,
    Side,
    broads,
    foreign,
    hand_made,
    is_ours,
    jump,
    native,
    stale,
)
from tests.soak.world import (
    KEYS,
    LONGEST_PASS_S,
    NETWORKS,
    SUBNETS,
    Key,
    Violation,
    World,
    locked,
)

_MOST_RULES = 30
_PRIORITIES = (-198, 90, 100, 101, 110, 200)


@dataclass(frozen=True)
class Op:
    """One mutation: who, what, and two numbers that choose among what is there when it is done.

    So every part of a sequence is a sequence that can be done.
    """

    who: str
    what: str
    a: int = 0
    b: int = 0

    def __str__(self) -> str:
        return f"{self.who} {self.what} {self.a} {self.b}"


def do(world: World, op: Op) -> None:
    """Raises Violation where the kernel refuses what the model says must be possible."""
    world.tally["mutations"] += 1
    if op.who == "nft":
        with world.native_lock:
            NFT[op.what](world, op.a, op.b)
    elif op.who == "node":
        NODE[op.what](world, op.a)
    else:
        backend = Backend(op.who.removeprefix("iptables-"))
        key = (backend, tuple(Family)[op.a % 2])
        with world.backend_lock[backend]:
            IPTABLES[op.what](_Rival(world, key), op.a // 2, op.b)


@dataclass
class _Rival:
    """A writer to one nat table of iptables."""

    world: World
    key: Key

    @property
    def table(self) -> Table:
        return self.world.tables[self.key]

    @property
    def side(self) -> Side:
        return SIDES[self.key[1]]

    @property
    def subnet(self) -> str:
        return self.world.subnet(self.key[1])

    @property
    def command(self) -> str:
        return f"{self.key[1].command}-{self.key[0].value}"

    def try_(self, *lines: str) -> bool:
        said = self.world.restores[self.key].commit(*lines)
        self.world.trace.append(f"{self.command}: {'; '.join(lines)}{' (refused)' * bool(said)}")
        self.world.tally["rules changed"] += len(lines) * (not said)
        return not said

    def write(self, *lines: str, refused: str | None = None) -> bool:
        """False where it was refused in these words, which is then no violation."""
        said = self.world.restores[self.key].commit(*lines)
        self.world.trace.append(f"{self.command}: {'; '.join(lines)}{' (refused)' * bool(said)}")
        if said and not (refused and refused in said):
            raise Violation(f"{self.command} could not {'; '.join(lines)}: {said}")
        self.world.tally["refused by number" if said else "rules changed"] += len(lines)
        return not said

    def pick(self, number: int, names: Sequence[str]) -> str | None:
        return names[number % len(names)] if names else None


def _add(rival: _Rival, a: int, b: int) -> None:
    chain = rival.pick(a, [*rival.table.chains])
    assert chain is not None
    if len(rival.table.chains[chain]) >= _MOST_RULES:
        return _delete(rival, a, b)
    rule = foreign(rival.side, b)
    rival.write(f"-A {chain} {rule}")
    rival.table.append(chain, rule)
    return None


def _insert(rival: _Rival, a: int, b: int) -> None:
    """At the head of POSTROUTING, anywhere in a chain of the rivals' own."""
    chain = rival.pick(a, [*rival.table.chains])
    assert chain is not None
    rules = rival.table.chains[chain]
    if len(rules) >= _MOST_RULES:
        return _delete(rival, a, b)
    place = 0 if chain == POSTROUTING else b % (len(rules) + 1)
    rule = foreign(rival.side, b)
    rival.write(f"-I {chain} {place + 1} {rule}")
    rival.table.insert(chain, place, rule)
    return None


def _insert_between(rival: _Rival, a: int, b: int) -> None:
    """By number in POSTROUTING. Where that is depends on how many of snatd's are there just then,
    so the place is read back; all else must be as it was.

    iptables-nft has no lock: where snatd replaces the rule of that number between its look and its
    write, the kernel refuses the write, and it says so (once in 467,597 mutations)."""
    rules = rival.table.chains[POSTROUTING]
    rule = foreign(rival.side, b)
    if len(rules) >= _MOST_RULES or rule in rules:
        return
    line = f"-I {POSTROUTING} {a % (len(rules) + 1) + 1} {rule}"
    if not rival.write(line, refused="RULE_INSERT failed (No such file or directory)"):
        return
    actual = rival.world.listing(rival.key)
    for place in range(len(rules) + 1):
        rival.table.insert(POSTROUTING, place, rule)
        if not rival.table.difference(actual):
            return
        del rules[place]
    raise Violation(f"{rival.command}: {rule!r} was inserted, and there is {actual}")


def _deletable(rival: _Rival, number: int) -> tuple[str, str] | None:
    """A chain and a rule in it; not the one that may be the only egress rule."""
    egress = hand_made(rival.side, rival.subnet)
    some = [
        (chain, rule)
        for chain, rules in rival.table.chains.items()
        for rule in rules
        if rule != egress and not is_own_chain(chain)
    ]
    return some[number % len(some)] if some else None


def _delete(rival: _Rival, a: int, b: int) -> None:
    found = _deletable(rival, a ^ b)
    if found is not None:
        rival.write(f"-D {found[0]} {found[1]}")
        rival.table.remove(*found)


def _move(rival: _Rival, a: int, b: int) -> None:
    found = _deletable(rival, a)
    if found is None:
        return
    chain, rule = found
    rival.write(f"-D {chain} {rule}", f"-I {chain} 1 {rule}" if b % 2 else f"-A {chain} {rule}")
    rival.table.remove(chain, rule)
    rival.table.insert(chain, 0 if b % 2 else len(rival.table.chains[chain]), rule)


def _replace(rival: _Rival, a: int, b: int) -> None:
    chain = rival.pick(
        a, [name for name, rules in rival.table.chains.items() if rules and name in CHAINS]
    )
    if chain is not None:
        rules = rival.table.chains[chain]
        place, rule = b % len(rules), foreign(rival.side, a)
        rival.write(f"-R {chain} {place + 1} {rule}")
        rules[place] = rule


def _new_chain(rival: _Rival, a: int, b: int) -> None:
    """A chain with rules, and a jump to it, at once."""
    name = rival.pick(a, [one for one in CHAINS if one not in rival.table.chains])
    if name is None:
        return
    rules = [foreign(rival.side, b + number) for number in range(b % 8)]
    rule = jump(rival.side, b, name)
    rival.write(f"-N {name}", *(f"-A {name} {one}" for one in rules), f"-A {POSTROUTING} {rule}")
    rival.table.chains[name] = rules
    rival.table.append(POSTROUTING, rule)


def _jump(rival: _Rival, a: int, b: int) -> None:
    name = rival.pick(a, [one for one in CHAINS if one in rival.table.chains])
    if name is not None and len(rival.table.chains[POSTROUTING]) < _MOST_RULES:
        rule = jump(rival.side, b, name)
        rival.write(f"-I {POSTROUTING} 1 {rule}")
        rival.table.insert(POSTROUTING, 0, rule)


def _drop_chain(rival: _Rival, a: int, _: int) -> None:
    name = rival.pick(a, [one for one in rival.table.unused() if one in CHAINS])
    if name is not None:
        rival.write(f"-F {name}", f"-X {name}")
        del rival.table.chains[name]


def _empty_chain(rival: _Rival, a: int, _: int) -> None:
    name = rival.pick(a, [one for one in CHAINS if one in rival.table.chains])
    if name is not None:
        rival.write(f"-F {name}")
        rival.table.chains[name] = []


def _fill(rival: _Rival, a: int, b: int) -> None:
    """Many rules at once, as kube-proxy does."""
    chain = rival.pick(a, [*rival.table.chains])
    assert chain is not None
    room = _MOST_RULES - len(rival.table.chains[chain])
    rules = [foreign(rival.side, b + number) for number in range(min(room, 3 + b % 17))]
    if rules:
        rival.write(*(f"-A {chain} {rule}" for rule in rules))
        for rule in rules:
            rival.table.append(chain, rule)


def _broad(rival: _Rival, a: int, b: int) -> None:
    """Docker's, at the head, or an operator's, at the end."""
    some = broads(rival.side, rival.subnet)
    rule = some[b % len(some)]
    rival.write(f"-I {POSTROUTING} 1 {rule}" if a % 4 else f"-A {POSTROUTING} {rule}")
    rival.table.insert(POSTROUTING, 0 if a % 4 else len(rival.table.chains[POSTROUTING]), rule)


def _zero(rival: _Rival, _: int, __: int) -> None:
    rival.try_(f"-Z {POSTROUTING}")  # there is no chain where -X of everything took it


# What takes away rules of snatd's, or the egress.


def _flush(rival: _Rival, _: int, __: int) -> None:
    rival.world.foreign_is_right(rival.key)
    rival.write(f"-F {POSTROUTING}")
    rival.table.chains[POSTROUTING] = []


def _clear(rival: _Rival, _: int, __: int) -> None:
    rival.world.foreign_is_right(rival.key)
    rival.write("-F", "-X")
    rival.table.flush()


def _save(rival: _Rival, _: int, __: int) -> None:
    """What `iptables-save` prints now, for a restore some time later."""
    backend, family = rival.key
    output = rival.world.host.run(f"{family.command}-{backend.value}-save", "-t", "nat")
    kept = {name: [*rules] for name, rules in rival.table.chains.items()}
    rival.world.saves[rival.key] = (output.split("\n"), kept)


def _restore(rival: _Rival, _: int, __: int) -> None:
    """A save of some time ago, with what was snatd's then, in place of everything."""
    if rival.key not in rival.world.saves:
        return
    rival.world.foreign_is_right(rival.key)
    lines, kept = rival.world.saves[rival.key]
    wait = " -w 15" if rival.key[0] is Backend.LEGACY else ""
    rival.world.trace.append(f"{rival.command}-restore: {'; '.join(lines)}")
    rival.world.tally["rules changed"] += sum(line.startswith("-A") for line in lines)
    said = once(rival.world.host, f"{rival.command}-restore{wait}", lines)
    if said:
        raise Violation(f"{rival.command}-restore: {said}")
    rival.table.chains = {name: [*rules] for name, rules in kept.items()}


def _ours(rival: _Rival, number: int) -> str | None:
    rules = rival.world.listing(rival.key).get(POSTROUTING, [])
    return rival.pick(number, [rule for rule in rules if is_ours(rule)])


def _delete_ours(rival: _Rival, a: int, _: int) -> None:
    rule = _ours(rival, a)
    if rule is not None and rival.try_(f"-D {POSTROUTING} {rule}"):
        rival.table.remove(POSTROUTING, rule)


def _move_ours(rival: _Rival, a: int, b: int) -> None:
    rule = _ours(rival, a)
    where = f"-I {POSTROUTING} 1" if b % 2 else f"-A {POSTROUTING}"
    if rule is not None and rival.try_(f"-D {POSTROUTING} {rule}", f"{where} {rule}"):
        rival.table.remove(POSTROUTING, rule)
        rival.table.insert(POSTROUTING, 0 if b % 2 else len(rival.table.chains[POSTROUTING]), rule)


def _copy_ours(rival: _Rival, a: int, _: int) -> None:
    rule = _ours(rival, a)
    if rule is not None and rival.try_(f"-A {POSTROUTING} {rule}"):
        rival.table.append(POSTROUTING, rule)


def _stale(rival: _Rival, a: int, _: int) -> None:
    rule = stale(rival.side, a)
    rival.write(f"-I {POSTROUTING} 1 {rule}")
    rival.table.insert(POSTROUTING, 0, rule)


def _break_own_chain(rival: _Rival, a: int, b: int) -> None:
    """There is one only where one `! -d` does not say it all."""
    if not rival.table.frozen:
        rule = foreign(rival.side, b)
        lines = ("-F SNATD-POSTROUTING", f"-I SNATD-POSTROUTING 1 {rule}", "-N SNATD-JUNK")
        rival.try_(lines[a % len(lines)])


def _use_own_chain(rival: _Rival, a: int, _: int) -> None:
    rule = jump(rival.side, a, "SNATD-POSTROUTING")
    if not rival.table.frozen and rival.try_(f"-I {POSTROUTING} 1 {rule}"):
        rival.table.insert(POSTROUTING, 0, rule)


def _delete_broad(rival: _Rival, _: int, b: int) -> None:
    """Docker's own clean-up, which finds its rule only as long as it is broad."""
    some = broads(rival.side, rival.subnet)
    rule = some[b % len(some)]
    if rival.try_(f"-D {POSTROUTING} {rule}"):
        rival.table.remove(POSTROUTING, rule)


def _hand_made(rival: _Rival, _: int, __: int) -> None:
    rule = hand_made(rival.side, rival.subnet)
    if rule in rival.table.chains[POSTROUTING]:
        rival.write(f"-D {POSTROUTING} {rule}")
        rival.table.remove(POSTROUTING, rule)
    else:
        rival.write(f"-A {POSTROUTING} {rule}")
        rival.table.append(POSTROUTING, rule)


IPTABLES: dict[str, Callable[[_Rival, int, int], None]] = {
    one.__name__[1:]: one
    for one in (
        *(_add, _insert, _insert_between, _delete, _move, _replace, _new_chain, _jump),
        *(_drop_chain, _empty_chain, _fill, _broad, _zero, _save),
        *(_flush, _clear, _restore, _delete_ours, _move_ours, _copy_ours, _stale),
        *(_break_own_chain, _use_own_chain, _delete_broad, _hand_made),
    )
}
ROUGH = (
    *("flush", "clear", "restore", "delete_ours", "move_ours", "copy_ours", "stale"),
    *("break_own_chain", "use_own_chain", "delete_broad", "hand_made"),
)


# nft's own tables, and the guard.


def _nft(world: World, *commands: str) -> None:
    said = world.nft.run(*commands)
    world.trace.append(f"nft: {'; '.join(commands)}")
    world.tally["rules changed"] += len(commands)
    if said:
        raise Violation(f"nft could not {'; '.join(commands)}: {said}")


def _family(number: int) -> str:
    return ("ip", "ip6", "inet")[number % 3]


def _build(world: World, a: int, b: int) -> None:
    """Deletes and makes a table at once, as Docker 29 and firewalld do."""
    ip = _family(a)
    rules = [native(ip, b + number) for number in range(b % 12)]
    hook = f"{{ type nat hook postrouting priority {_PRIORITIES[a % len(_PRIORITIES)]}; }}"
    _nft(
        world,
        f"add table {ip} rival",
        f"delete table {ip} rival",
        f"add table {ip} rival",
        f"add chain {ip} rival post {hook}",
        f"add chain {ip} rival side",
        *(f"add rule {ip} rival post {rule}" for rule in rules),
    )
    world.natives[ip] = {"post": rules, "side": []}


def _chain_of(world: World, a: int) -> tuple[str, str, list[str]] | None:
    some = [(ip, chain, rules) for ip, of in world.natives.items() for chain, rules in of.items()]
    return some[a % len(some)] if some else None


def _nft_add(world: World, a: int, b: int) -> None:
    found = _chain_of(world, a)
    if found is None:
        return _build(world, a, b)
    ip, chain, rules = found
    if len(rules) >= _MOST_RULES:
        return _nft_delete(world, a, b)
    rule = native(ip, b)
    _nft(world, f"{'insert' if a % 2 else 'add'} rule {ip} rival {chain} {rule}")
    rules.insert(0 if a % 2 else len(rules), rule)
    return None


def _nft_jump(world: World, a: int, b: int) -> None:
    found = _chain_of(world, a)
    if found is not None and found[1] == "post" and len(found[2]) < _MOST_RULES:
        ip, chain, rules = found
        source = (
            f"ip6 saddr 2001:db8:5::{b % 99 + 1:x}" if ip == "ip6" else f"ip saddr 192.0.2.{b % 99}"
        )
        rule = f"{source} jump side"
        _nft(world, f"add rule {ip} rival {chain} {rule}")
        rules.append(rule)


def _nft_delete(world: World, a: int, b: int) -> None:
    found = _chain_of(world, a)
    if found is None or not found[2]:
        return
    ip, chain, rules = found
    place = b % len(rules)
    handle = world.nft.rules(ip, "rival", chain)[place][1]
    _nft(world, f"delete rule {ip} rival {chain} handle {handle}")
    del rules[place]


def _nft_move(world: World, a: int, b: int) -> None:
    found = _chain_of(world, a)
    if found is None or not found[2]:
        return
    ip, chain, rules = found
    rule, handle = world.nft.rules(ip, "rival", chain)[b % len(rules)]
    _nft(
        world,
        f"delete rule {ip} rival {chain} handle {handle}",
        f"insert rule {ip} rival {chain} {rule}",
    )
    rules.insert(0, rules.pop(b % len(rules)))


def _nft_flush(world: World, a: int, _: int) -> None:
    found = _chain_of(world, a)
    if found is not None:
        world.natives_are_right()
        _nft(world, f"flush chain {found[0]} rival {found[1]}")
        found[2].clear()


def _nft_drop(world: World, a: int, _: int) -> None:
    ip = _family(a)
    if ip in world.natives:
        world.natives_are_right()
        _nft(world, f"delete table {ip} rival")
        del world.natives[ip]


def _native_in_nat(world: World, a: int, _: int) -> None:
    """A native rule in iptables-nft's own table, which it then cannot print; and out again."""
    family = tuple(Family)[a % 2]
    ip = ("ip", "ip6")[a % 2]
    with world.backend_lock[Backend.NFT]:
        handle = world.nft.added(f"add rule {ip} nat {POSTROUTING} oifname x9 masquerade")
        if handle is None:
            return  # nobody has made the table yet
        with world.node.container.entered():
            for _ in range(5):
                world.cluster_is_right(family)
        _nft(world, f"delete rule {ip} nat {POSTROUTING} handle {handle}")
        world.foreign_is_right((Backend.NFT, family))


def _guard(world: World, number: int, *commands: str) -> None:
    """Whatever is left of the guard after the last attack."""
    world.guard_attacked = True
    world.nft.run(*(one.format(ip=("ip", "ip6")[number % 2]) for one in commands))
    world.trace.append(f"nft ({number}): {'; '.join(commands)}")
    world.tally["attacks on the guard"] += 1


def _delete_guard(world: World, a: int, _: int) -> None:
    _guard(world, a, "delete table {ip} snatd")


def _flush_guard(world: World, a: int, b: int) -> None:
    _guard(world, a, "flush table {ip} snatd" if b % 2 else "flush chain {ip} snatd postrouting")


def _switch_off_guard(world: World, a: int, _: int) -> None:
    _guard(world, a, "add table {ip} snatd {{ flags dormant; }}")


def _spoil_guard(world: World, a: int, b: int) -> None:
    rules = ("accept", "return", "masquerade", "ip daddr 10.0.0.0/8 return")
    verb = "insert" if b % 2 else "add"
    _guard(world, a, f"{verb} rule {{ip}} snatd postrouting {rules[b % len(rules)]}")


def _flush_ruleset(world: World, _: int, __: int) -> None:
    with world.backend_lock[Backend.NFT]:
        for key in KEYS:
            if key[0] is Backend.NFT:
                world.foreign_is_right(key)
        world.natives_are_right()
        _guard(world, 0, "flush ruleset")
        for key in KEYS:
            if key[0] is Backend.NFT:
                world.tables[key].flush()
        world.natives = {}


NFT: dict[str, Callable[[World, int, int], None]] = {
    **{"build": _build, "add": _nft_add, "jump": _nft_jump, "delete": _nft_delete},
    **{"move": _nft_move, "flush": _nft_flush, "drop": _nft_drop, "in_nat": _native_in_nat},
    **{"delete_guard": _delete_guard, "flush_guard": _flush_guard},
    **{"switch_off_guard": _switch_off_guard, "spoil_guard": _spoil_guard},
    "flush_ruleset": _flush_ruleset,
}
ON_THE_GUARD = (
    *("delete_guard", "flush_guard", "switch_off_guard", "spoil_guard", "flush_ruleset"),
)


# The node itself.


def _network(world: World, a: int) -> None:
    """flannel's network changes; both of the probes' subnets are in the old and in the new."""
    world.network = NETWORKS[a % len(NETWORKS)]
    world.trace.append(f"FLANNEL_NETWORK={world.network}")
    world.write_lease()


NODE: dict[str, Callable[[World, int], None]] = {"network": _network}


def move_lease(world: World) -> None:
    """The other subnet is leased. What was saved before is of another lease."""
    world.lease = 1 - world.lease
    world.saves = {}
    world.trace.append(f"FLANNEL_SUBNET={SUBNETS[world.lease]}.1/24")
    world.write_lease()


BROKEN: tuple[bytes | None, ...] = (
    *(b"", b"\0", b"garbage\n", b"FLANNEL_SUBNET=172.7.21.1/24", b"FLANNEL_NETWORK=172.7.0.0/16\n"),
    b"FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=172.7.21.1/24\n",
    b"FLANNEL_SUBNET=172.7.21.1/33\n",
    b"FLANNEL_SUBNET=172.7.21.1/24\nFLANNEL_SUBNET=172.7.23.1/24\n",
    b"#" * 70_000 + b"\n",
    None,
)


def break_lease(world: World, number: int) -> None:
    """subnet.env as it must not be: bytes, or something else than a file, or nothing."""
    folder = world.host.path("/run/flannel")
    path = folder / "subnet.env"
    number %= len(BROKEN) + 3
    content = BROKEN[number] if number < len(BROKEN) else None
    world.trace.append(f"subnet.env broken, way {number}: {content[:80] if content else None!r}")
    if content is not None:
        path.write_bytes(content)
    elif number == len(BROKEN):
        shutil.rmtree(folder)
    else:
        path.unlink()
        if number == len(BROKEN) + 1:
            os.mkfifo(path)
        elif number == len(BROKEN) + 2:
            path.mkdir()


def mend_lease(world: World) -> None:
    path = world.host.path("/run/flannel/subnet.env")
    if path.is_dir():
        path.rmdir()
    world.write_lease()


def take_bridge(world: World, number: int) -> None:
    way = (
        f"ip addr del {SUBNETS[world.lease]}.1/24 dev docker0; "
        "ip addr del fd00:7:21::1/64 dev docker0",
        "ip link del docker0",
    )[number % 2]
    world.trace.append(way)
    world.host.shell(way)


def freeze(world: World) -> None:
    """Waits until snatd holds, and from then on expects it to leave everything alone."""
    try:
        until(lambda: world.status()["waiting_for"], "a hold", within_s=LONGEST_PASS_S)
    except AssertionError as error:
        raise Violation(str(error)) from None
    with locked(*world.backend_lock.values()):
        for key, table in world.tables.items():
            table.chains, table.frozen = world.listing(key), True
    world.saves = {}


def thaw(world: World) -> None:
    """What snatd left alone until now is looked at once more, then it may be changed again."""
    with locked(*world.backend_lock.values()):
        for key, table in world.tables.items():
            world.foreign_is_right(key)
            table.frozen = False
            table.chains = {
                name: [rule for rule in rules if table.is_kept(rule)]
                for name, rules in table.chains.items()
                if not is_own_chain(name)
            }
    world.saves = {}
