# SPDX-License-Identifier: Apache-2.0
"""DPDK's testpmd, as a front-end (virtio-user) or as a back-end (vhost PMD)."""

import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from subprocess import PIPE

from tests.real.processes import Process
from tests.real.programs import Programs

COUNTS = re.compile(r"RX-packets: (\d+).*?TX-packets: (\d+)", re.DOTALL)
LAST_LINE = "Tx-pps:"
STATISTICS = re.compile(
    r"port stats|####|pps:|-packets:|-errors:|-nombuf:|Throughput|^ *$"
)
FOR_EVER = 0xFFFFFFFF
FILE = struct.Struct("=IHHiIII")
PACKET = struct.Struct("=IIII")


def vhost(path: Path, queues: int = 1) -> str:
    """A device that is a back-end."""
    return f"net_vhost0,iface={path},queues={queues}"


class PacketFiles:
    """A device on files: receives these packets, a list for each queue, and no more, or
    the same ones again and again if `endless`.

    Packets that are sent to it are kept in files, complete when testpmd has ended.
    """

    def __init__(
        self,
        folder: Path,
        queues: Sequence[Sequence[bytes]],
        *,
        endless: bool = False,
    ) -> None:
        folder.mkdir()
        self.packets = queues
        self._kept = [folder / f"sent-{i}.pcap" for i in range(len(queues))]
        words = ["net_pcap0", f"infinite_rx={int(endless)}"]
        for number, packets in enumerate(queues):
            source = folder / f"received-{number}.pcap"
            source.write_bytes(_in_pcap(packets))
            words.append(f"rx_pcap={source}")
        words += [f"tx_pcap={path}" for path in self._kept]
        self.device = ",".join(words)

    def kept(self) -> list[list[bytes]]:
        return [list(_from_pcap(path.read_bytes())) for path in self._kept]


class Testpmd(Process):
    """It forwards packets between its devices, and never drops one for lack of room."""

    __test__ = False  # pytest, this is no test

    def __init__(
        self,
        programs: Programs,
        log: Path,
        devices: Iterable[str],
        *,
        queues: int = 1,
        largest: int = 1514,
    ) -> None:
        devices = list(devices)
        # Each stream has a thread: one that waits for room must not keep others up.
        threads = queues * len(devices)
        cpus = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
        argv = programs(
            *("stdbuf", "-oL", programs.find("dpdk-testpmd")),
            *("--no-huge", "--in-memory", "-m", "256", "--no-pci", "--no-telemetry"),
            *("--lcores", f"(0-{threads})@({cpus})"),
            *(f"--vdev={device}" for device in devices),
            *("--", "-i", "--no-flush-rx", "--no-lsc-interrupt"),
            *(f"--rxq={queues}", f"--txq={queues}", f"--nb-cores={threads}"),
            *("--total-num-mbufs=8192", f"--max-pkt-len={largest + 4}"),
            *("--port-topology=chained", "--disable-link-check"),
            "--disable-device-start",
        )
        super().__init__(argv, log, stdin=PIPE)
        self.ports = len(devices)
        self._shown = 0
        if "virtio_user" in devices[0]:
            self("port config 0 rx_offload scatter on")  # packets in several buffers
        self("port start all")
        self(f"set burst tx delay 10 retry {FOR_EVER}")
        self("set fwd io retry")
        assert self.has_counted(*[(0, 0)] * self.ports), self.describe()
        assert "Fail" not in self.output(), self.describe()

    def __call__(self, command: str) -> None:
        """Let it run a command, after those before."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(command.encode() + b"\n")
        self.popen.stdin.flush()

    def tells(self, line: str) -> bool:
        """Statistics, asked for again and again, would push out all else."""
        return not STATISTICS.search(line)

    def counted(self) -> list[tuple[int, int]]:
        """The packets that each device has received, and those that it has sent.

        Prompts would not tell when it is done: messages come in the middle of them.
        """
        self("show port stats all")
        self._shown += self.ports
        self.wait_until(lambda: self.output().count(LAST_LINE) == self._shown, 60)
        found = re.findall(COUNTS, self.output())[-self.ports :]
        return [(int(received), int(sent)) for received, sent in found]

    def has_counted(self, *counts: tuple[int, int]) -> bool:
        return self.counted() == list(counts)

    def has_sent(self, count: int) -> bool:
        """Has its first device sent so many?"""
        return self.counted()[0][1] >= count

    def quit(self) -> None:
        self("stop")
        self("quit")
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        assert self.wait(timeout=20) == 0, self.describe()


def _in_pcap(packets: Iterable[bytes]) -> bytes:
    parts = [FILE.pack(0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)]
    for packet in packets:
        parts += [PACKET.pack(0, 0, len(packet), len(packet)), packet]
    return b"".join(parts)


def _from_pcap(content: bytes) -> Iterator[bytes]:
    at = FILE.size
    while at < len(content):
        _, _, kept, length = PACKET.unpack_from(content, at)
        assert kept == length
        at += PACKET.size + length
        yield content[at - length : at]
