# SPDX-License-Identifier: Apache-2.0
"""I1 with a real back-end: guest memory is nowhere in what its process holds."""

import secrets
from subprocess import PIPE

from tests.real.storage import Disk
from vhost_airlock.peers.scan import search


def test_back_end_has_no_guest_memory(serve, drive, folder, via):
    """A marker lies in the front-end's memory, on every page that has no request in it.

    Connected directly the back-end has it, which shows that the search works. Through
    the airlock only the airlock has.
    """
    image = folder / "disk.img"
    image.write_bytes(secrets.token_bytes(16 << 20))
    marker = secrets.token_bytes(8)
    served = serve(Disk(image))
    number = int.from_bytes(marker, "little")
    options = {"marker": f"{number:016x}", "bs": 1 << 20}
    with drive.start(served.front, "hold", stdin=PIPE, **options) as front_end:
        front_end.wait_until(lambda: "holding" in front_end.output())
        in_back_end = search(served.backend.pid, [marker])
        if via == "direct":
            assert len(in_back_end.found) == 256
            assert {found.holding.kind for found in in_back_end.found} == {"mapping"}
        else:
            assert in_back_end.found == ()
            assert in_back_end.searched > 1 << 20
            assert len(search(served.proxy.pid, [marker]).found) == 256
        front_end.popen.communicate()
        assert front_end.wait(timeout=10) == 0
