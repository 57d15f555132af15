# SPDX-License-Identifier: Apache-2.0
"""libblkio's vhost-user-blk driver and QEMU's tools on a real back-end."""

from pathlib import Path

import pytest

from tests.real.processes import run
from tests.real.storage import Disk

pytestmark = pytest.mark.long

MIB = 1 << 20


def make_image(folder: Path, size: int) -> Path:
    image = folder / "disk.img"
    image.write_bytes(bytes(size))
    return image


@pytest.mark.parametrize(
    ("direct", "queues", "queue_size"),
    [(False, 1, 128), (False, 4, 1024), (True, 1, 1024), (True, 4, 128)],
)
def test_file_keeps_what_is_written(serve, drive, folder, direct, queues, queue_size):
    image = make_image(folder, 48 * MIB)
    served = serve(Disk(image, queues=queues, direct=direct))
    for seed in (1, 2):
        options = {"queues": queues, "queue_size": queue_size, "seed": seed}
        result = drive.run(served.front, "verify", qd=12, **options)
        assert min(result[key] for key in ("reads", "writes", "zeroes", "flushes")) > 0
        assert result["max_segments"] == 126


def test_buffers_come_and_go(serve, drive, folder):
    """Requests get other memory now and then, while the others go on with theirs.

    Often it has the addresses of memory that was just removed.
    """
    served = serve(Disk(make_image(folder, 32 * MIB), queues=4), "--workers=2")
    options = {"queues": 4, "qd": 4, "remap": 3, "passes": 4}
    result = drive.run(served.front, "verify", max=128 << 10, **options)
    assert result["remaps"] > 200


@pytest.mark.parametrize(("queues", "queue_size"), [(1, 128), (4, 1024)])
def test_null_device_reads_zeroes(serve, drive, queues, queue_size):
    """Read buffers hold something else before, so that zeroes must have been copied."""
    served = serve(Disk(size=64 * MIB, queues=queues))
    options = {"queues": queues, "queue_size": queue_size}
    drive.run(served.front, "verify", qd=12, null=1, **options)
    for mode in ("randread", "randwrite"):
        assert drive.run(served.front, mode, qd=32, **options)["ios"] > 1000


def test_wrong_data_is_noticed(serve, drive):
    """The verifying program on a device that forgets what is written."""
    served = serve(Disk(size=16 * MIB))
    drive.run(served.front, "verify", status=4)


def test_many_segments(serve, drive, folder):
    served = serve(Disk(make_image(folder, 16 * MIB)))
    options = {"bs": 504 * 1024, "segment": 4096 + 512}
    for mode in ("randwrite", "randread"):
        result = drive.run(served.front, mode, qd=4, ms=300, **options)
        assert result["ios"] > 0


def test_polling_front_end(serve, drive, folder):
    served = serve(Disk(make_image(folder, 16 * MIB)))
    drive.run(served.front, "verify", qd=4, poll=1)


def test_qemu_tools(serve, programs, folder, same_as_direct):
    """qemu-img copies an image in and out; qemu-io writes and reads patterns."""
    image = make_image(folder, 32 * MIB)
    served = serve(Disk(image))
    device = f"driver=virtio-blk-vhost-user,path={served.front},cache.direct=on"
    log = folder / "tool.log"
    content = folder / "content.img"
    block = bytes(range(256)) * 256
    content.write_bytes(b"".join(bytes([i]) * 4096 + block for i in range(256)))
    content_options = f"driver=raw,file.driver=file,file.filename={content}"
    size = content.stat().st_size

    convert = ("qemu-img", "convert", "-n", "--image-opts", "--target-image-opts")
    run(programs(*convert, content_options, device), log)
    assert image.read_bytes()[:size] == content.read_bytes()

    back = folder / "back.img"
    run(
        programs("qemu-img", "convert", "--image-opts", "-O", "raw", device, str(back)),
        log,
    )
    assert back.read_bytes() == image.read_bytes()

    commands = [
        "write -P 0x5a 1M 65k",
        "aio_write -P 0xa5 2M 512k",
        "aio_flush",
        "write -z 1044k 8k",
        "read -P 0x5a 1M 20k",
        "read -P 0 1044k 8k",
        "read -P 0xa5 2M 512k",
        "flush",
    ]
    words = [word for command in commands for word in ("-c", command)]
    said = run(programs("qemu-io", "--image-opts", device, *words), log)
    assert "verification failed" not in said
    data = image.read_bytes()
    assert data[MIB : MIB + 20 * 1024] == b"\x5a" * 20 * 1024
    assert data[1044 * 1024 : 1052 * 1024] == bytes(8 * 1024)
    same_as_direct(data)
