# SPDX-License-Identifier: Apache-2.0
"""A guest's network interface."""

import os
from pathlib import Path

from tests.guest.inside.agent import sh

SCRIPT = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip link set $interface mtu $mtu
ip route add default via $router dev $interface
echo $ip $router $mtu > /tmp/lease
"""


def configure() -> list[str]:
    """Get an address by DHCP: ours, the router's, and the MTU."""
    Path("/tmp/dhcp").write_text(SCRIPT)
    os.chmod("/tmp/dhcp", 0o755)
    sh("ip link set lo up; ip link set eth0 up")
    sh("udhcpc -O mtu -i eth0 -s /tmp/dhcp -n -q -t 20 -T 1")
    return Path("/tmp/lease").read_text().split()


def counters() -> dict[str, int]:
    folder = Path("/sys/class/net/eth0/statistics")
    return {path.name: int(path.read_text()) for path in folder.iterdir()}
