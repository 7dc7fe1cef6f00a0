"""A node with a real dockerd: a tree of Debian's as its root, and a network of its own.

Its processes die with its control groups, its mounts with its last process.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.lab.groups import INTO_GROUPS, anywhere, make_groups, start_reaper
from tests.lab.mounts import overlay
from tests.lab.netns import Namespace, network_of, until
from tests.lab.network import plug, write_lease
from tests.lab.process import Snatd

IMAGE = "calls"
# A caller never rests: ten calls at a time, half of them to another node's container.
_CALL = """\
#!/bin/sh
while :; do
    for one in 1 2 3 4 5; do
        nc -w 2 $1 80 </request >/dev/null 2>&1 &
        nc -w 1 $2 8080 </request >/dev/null 2>&1 &
    done
    wait
    sleep 0.05
done
"""
_SERVE = "exec httpd -f -vv -p 80 -h /www 2>>/log/calls"
_MAKE_IMAGE = """
cd "$1"
mkdir -p bin www
cp /bin/busybox bin
for one in sh nc httpd sleep; do ln bin/busybox bin/$one; done
echo yes >www/index.html
printf 'GET / HTTP/1.0\\r\\n\\r\\n' >request
chmod 755 call
tar -c . | docker import - "$2" >/dev/null
"""
_CALLER = re.compile(r"\[?(?:::ffff:)?([0-9.]+)\]?:[0-9]+: response:200")
_SAID = re.compile(r'level=(warning|error|fatal|panic) msg="((?:[^"\\]|\\.)*)"(.*)')
_CHANGING = re.compile(r"\b[0-9a-f]{12,64}\b|\bveth[0-9a-f]{7}\b|\b[0-9]+\b")


class Docker:
    """A node of the LAN, number 21 or 22, with dockerd by `start`."""

    def __init__(self, lan: Namespace, number: int, tree: Path, folder: Path, backend: str) -> None:
        self.number, self.folder = number, folder
        self.subnet = number
        self._name = f"snatd-docker-{os.getpid()}-{folder.parent.name}-{number}"
        groups = make_groups(self._name)
        # The daemons' first, or they start again a container that was killed.
        self._reaper = start_reaper([*groups, *anywhere(self._name)])
        self._daemon_groups = [group / "daemon" for group in groups]
        for group in self._daemon_groups:
            group.mkdir()
        self.host = Namespace(overlay([tree], folder / "tree"), folder.parent.parent)
        plug(lan, self.host, number)
        self.host.shell(
            f"for one in iptables ip6tables; do "
            f"update-alternatives --quiet --set $one /usr/sbin/$one-{backend}; done; "
            "echo 1 >/proc/sys/net/ipv4/ip_forward; ip route add default via 10.4.7.100"
        )
        self.log = folder / "dockerd.log"
        self.log.touch()
        (folder / "data").mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        # A service of its own, as in Debian: it goes on when dockerd is killed.
        self._containerd = self._popen("containerd", folder / "containerd.log")
        until(self.host.path("/run/containerd/containerd.sock").exists, "containerd", 30)

    def _popen(self, program: str, log: Path, *words: str) -> subprocess.Popen[bytes]:
        groups = map(str, self._daemon_groups)
        with log.open("ab") as output:
            return self.host.popen(
                *("sh", "-euc", INTO_GROUPS, "sh", *groups, "--", program, *words),
                stderr=output,
                stdout=output,
            )

    @property
    def address(self) -> str:
        return f"10.4.7.{self.number}"

    @property
    def gateway(self) -> str:
        return f"172.7.{self.subnet}.1/24"

    def lease(self, subnet: int | None = None) -> None:
        """What flanneld leased to this node, and dockerd is told from its next start on."""
        self.subnet = subnet or self.subnet
        write_lease(self.host, "172.7.0.0/16", self.gateway, ["FLANNEL_IPMASQ=false"])

    def start(self, *flags: str) -> None:
        """Starts dockerd and waits until it answers."""
        begin = self.log.stat().st_size
        self._process = self._popen(
            *("dockerd", self.log, f"--bip={self.gateway}", f"--data-root={self.folder}/data"),
            *("--containerd=/run/containerd/containerd.sock", "--storage-driver=overlay2"),
            *(f"--cgroup-parent=/{self._name}/containers", *flags),
            "--exec-opt=native.cgroupdriver=cgroupfs",
        )
        until(lambda: self._answers(begin), "dockerd", 60)

    def _answers(self, begin: int) -> bool:
        assert self._process is not None
        said = self._text(begin)
        if self._process.poll() is not None:
            raise AssertionError(f"dockerd ended: {said[-3000:]}")
        return "API listen on" in said

    def _text(self, begin: int = 0) -> str:
        return self.log.read_bytes()[begin:].decode(errors="replace")

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(60)

    def restart(self, *flags: str) -> None:
        self.stop()
        self.start(*flags)

    def said(self, begin: int = 0) -> Counter[tuple[str, str]]:
        """Its warnings and errors since some byte of its log, without what differs in each run."""
        lines = _SAID.findall(self._text(begin))
        return Counter((level, _CHANGING.sub("#", text + more)) for level, text, more in lines)

    def docker(self, *words: str) -> str:
        return self.host.run("docker", *words).strip()

    def make_image(self) -> None:
        folder = self.folder / "image"
        folder.mkdir()
        (folder / "call").write_text(_CALL)
        self.host.run("sh", "-euc", _MAKE_IMAGE, "sh", str(folder), IMAGE)

    def run(self, name: str, *options: str, command: Sequence[str]) -> None:
        """A container that goes on; its signal to stop is one that a shell as process 1 obeys."""
        self.docker(
            *("run", "--detach", "--name", name, "--stop-signal=KILL", *options, IMAGE, *command)
        )

    def serve(self, name: str, *options: str) -> Path:
        """A container with a web server; the file in which that notes who called."""
        log = self.folder / f"log-{name}"
        shutil.rmtree(log, ignore_errors=True)
        log.mkdir()
        (log / "calls").touch()
        volume = f"--volume={log}:/log"
        self.run(name, volume, *options, command=("sh", "-c", _SERVE))
        pid = self.pid_of(name)
        until(lambda: call(pid, "127.0.0.1", 80) == "yes", f"{name} listens")
        return log / "calls"

    def remove(self, *names: str) -> None:
        self.docker("rm", "--force", *names)

    def address_of(self, name: str) -> str:
        return self.docker(
            "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name
        )

    def pid_of(self, name: str) -> int:
        return int(self.docker("inspect", "-f", "{{.State.Pid}}", name))

    def rules(self) -> list[str]:
        """All rules and chains of its backend, without counters and what differs in each run."""
        saved = self.host.run("iptables-save").splitlines()
        lines = [one for one in saved if not one.startswith("#")]
        return [
            re.sub(r"\bbr-[0-9a-f]{12}\b", "br-#", re.sub(r" \[[0-9:]+\]$", "", one))
            for one in lines
        ]

    def narrowed(self) -> bool:
        """Whether the broad rule is narrowed."""
        subnet, rest = f"-A POSTROUTING -s 172.7.{self.subnet}.0/24", "! -o docker0"
        rules, comment = self.rules(), "-m comment --comment snatd -j MASQUERADE"
        return (
            f"{subnet} {rest} -j MASQUERADE" not in rules
            and rules.count(f"{subnet} ! -d 172.7.0.0/16 {rest} {comment}") == 1
        )

    def snatd(self) -> Snatd:
        """This checkout, run by the tree's own Python and libraries; to be started."""
        snatd = Snatd(self.host, self.folder / "snatd")
        code = f"PYTHONPATH={self.folder.parent.parent / 'code'}"
        snatd.program = ("env", code, "/usr/bin/python3", "-B", "-m", "snatd")
        return snatd

    def close(self) -> None:
        """Ends all that runs here, at once."""
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait(30)
        for one in (self._process, self._containerd):
            if one is not None:
                one.wait(10)
        self.host.close()
        subprocess.run(
            ["umount", "--lazy", str(self.folder / "tree/root")], check=False, capture_output=True
        )


def callers(text: str) -> Counter[str]:
    """Who called, by the log of a web server."""
    return Counter(_CALLER.findall(text))


def call(pid: int, address: str, port: int) -> str:
    """A call from a process' network: what was answered, in a word."""
    with network_of(pid):
        caller = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with caller:
        caller.settimeout(5)
        try:
            caller.connect((address, port))
            caller.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer = b""
            while chunk := caller.recv(1024):
                answer += chunk
        except OSError as error:
            return type(error).__name__
    return answer.decode().split()[-1] if answer else "nothing"
