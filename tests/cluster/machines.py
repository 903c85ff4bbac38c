"""Machines of a made-up network on this one: each has its own processes, network, user's home and, maybe, sshd."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

# Whatever ends the tests ends the machines.
ISOLATED = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net"]
UNSHARE = [*ISOLATED, *["--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]]
NEEDED = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "unshare", "nsenter", "setpriv", "mount")

SWITCH = "ip link add switch type bridge && ip link set switch up && echo ready && exec sleep infinity"
MACHINE = """
mount --bind {folder}/passwd /etc/passwd && mkdir -p /tmp/ray /run/sshd && mount --bind {folder}/ray /tmp/ray &&
hostname {name} && ip link set lo up && echo ready || exit
[ -z "{sshd}" ] || {sshd} -D -e -f {folder}/sshd_config &
wait
sleep infinity
"""  # the shell stays, for it buries the orphans of its processes
SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/.ssh/authorized_keys
PasswordAuthentication no
PermitRootLogin prohibit-password
StrictModes no
PidFile none
"""


def missing() -> str | None:
    """Why there can be no such machines here, or None."""
    absent = [name for name in NEEDED if _which(name) is None]
    if absent:
        return f"not installed here: {', '.join(absent)}"
    if os.geteuid() != 0:
        return "only root can make machines out of namespaces"
    network = "ip link add switch type bridge && ip link add one type veth peer name other"
    if subprocess.run([*UNSHARE, "sh", "-c", network], capture_output=True).returncode:
        return "this system lets nobody make namespaces with networks"
    return None


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Machine:
    """One machine. Its user is root, whose home is `home`.

    Args:
        folder: of all machines; the disk is shared, but /tmp/ray is each one's own.
        switch: process id of the network's switch.
        number: of the machine: its address is 10.66.0.NUMBER.
        name: of the machine.
        public_key: who may log in by ssh; no sshd where None.
    """

    def __init__(self, folder: Path, switch: int, number: int, name: str, public_key: str | None = None) -> None:
        self.home = folder / name
        self.address = f"10.66.0.{number}"
        for place in (".ssh", "ray"):
            (self.home / place).mkdir(parents=True)
        others = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
        (self.home / "passwd").write_text("\n".join([f"root:x:0:0:root:{self.home}:/bin/bash", *others, ""]))
        # Where this machine's Python 3.11 is; it has no network beyond the switch, and what it would install is there.
        (self.home / ".bashrc").write_text(f"export PATH={sys.base_prefix}/bin:$PATH\n")
        (self.home / ".config" / "pip").mkdir(parents=True)
        (self.home / ".config" / "pip" / "pip.conf").write_text(
            "[global]\nno-index = true\nno-build-isolation = false\n"
        )
        if public_key:
            (self.home / ".ssh" / "authorized_keys").write_text(public_key)
            (self.home / "sshd_config").write_text(SSHD.format(folder=self.home))
            key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.home / "host_key")]
            subprocess.run(key, check=True)
        script = MACHINE.format(folder=self.home, name=name, sshd=_which("sshd") if public_key else "")
        self._process = start([*UNSHARE, "sh", "-c", script], self.home / "sshd.log")
        (self.shell,) = psutil.Process(self._process.pid).children()
        link = f"ip link add to-{name} type veth peer name eth0 netns {self.shell.pid}"
        subprocess.run(
            ["nsenter", "-t", str(switch), "-n", "sh", "-ec", f"{link}; ip link set to-{name} master switch up"],
            check=True,
        )
        # A default route that leads nowhere: Ray finds its own address by asking for one.
        plug = f"ip addr add {self.address}/24 dev eth0; ip link set eth0 up; ip route add default dev eth0"
        self.run(["sh", "-ec", plug]).check_returncode()

    def command(self, command: list[str]) -> list[str]:
        """What runs a command on this machine, in the folder where we are, with a bare environment."""
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        environment = ["env", "-i", "-C", os.getcwd(), f"HOME={self.home}", f"PATH={path}", "LANG=C.UTF-8", "TERM=dumb"]
        return ["nsenter", "-t", str(self.shell.pid), "-m", "-p", "-n", "-u", *environment, *command]

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command on this machine."""
        return subprocess.run(self.command(command), capture_output=True, text=True, timeout=900)

    def processes(self) -> list[str]:
        """The command lines of all its processes."""
        found = []
        for process in self.shell.children(recursive=True):
            try:
                found.append(" ".join(process.cmdline()))
            except psutil.Error:  # has just ended
                continue
        return found

    def stop(self) -> None:
        """Pull the plug."""
        self._process.kill()
        self._process.wait()


def start(command: list[str], log: Path) -> subprocess.Popen[str]:
    """Start a process and wait until it says "ready"."""
    with open(log, "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout.readline() == "ready\n", log.read_text()
    return process


def switch(log: Path) -> subprocess.Popen[str]:
    """The network between the machines: the process in whose namespace it is."""
    return start([*ISOLATED, "sh", "-c", SWITCH], log)


def wait_until(condition, what: str, seconds: float = 300):
    """Wait for something that a cluster does in its own time."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"did not happen: {what}"
        time.sleep(0.5)
    return found
