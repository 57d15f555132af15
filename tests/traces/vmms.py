# SPDX-License-Identifier: Apache-2.0
"""The messages of real front-ends, phase by phase, each from its own source.

QEMU is the measure. It sets rings up in the order NUM, BASE, ADDR, KICK, enables them
all at the end, stops them by ENABLE 0 and GET_VRING_BASE, and goes on with the base
that it got. The others differ from it in this:

| front-end | what it does differently |
| --- | --- |
| QEMU's other devices | fs: CALL after ENABLE; net: CALL after KICK |
| Cloud Hypervisor | asks for an ack to every message; all NUM first, BASE after ADDR; the base is the available index; a pause only disables; a table, though it could add regions |
| Cloud Hypervisor before July 2022 | a reset only disables the rings, and the next start begins with NUM |
| crosvm | never asks for an ack; no region is added or removed; NUM, ADDR, BASE, CALL, KICK, ENABLE; the table again after each pause |
| crosvm before February 2026 | SET_FEATURES twice, as the driver writes its two words: the first time without VERSION_1 |
| Firecracker | CONFIG is all it negotiates; each ring is enabled as soon as it is set up; no reset |
| libkrun | SET_OWNER and the table come with each start, before SET_FEATURES; a reset only disables the rings, and the base is 0 again |
| alioth | asks for an ack to every message, SET_PROTOCOL_FEATURES too; ERR before SET_OWNER; KICK for all rings before anything else of them; a reset only disables the rings; no GET_VRING_BASE at all |
| OpenVMM | table before SET_FEATURES, and only once; ADDR before BASE, KICK before CALL; RESET_DEVICE with a reset |
| Dragonball | SET_FEATURES before SET_PROTOCOL_FEATURES; CALL twice; message by message for all rings; no BASE after a reconnect, for the back-end shall know it from the ring |
| virtio-user (DPDK) | CALL creates the rings, before SET_FEATURES; SET_STATUS for each step; rings are disabled while the table changes; a reconnect begins with ENABLE 0 and GET_VRING_BASE, has no SET_OWNER, and BASE 0 though the ring is in use |
| libblkio | SET_FEATURES before SET_PROTOCOL_FEATURES; asks for acks; CALL after KICK; a region for each buffer; it never stops a ring, but hangs up |

No trace has what a front-end says only of devices of one type (RARP, MTU), of shared
memory, of migration, or of an IOMMU.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass

from vhost_airlock.vhost.wire import Feature, ProtocolFeature

P = ProtocolFeature

NONE = P(0)
NOTHING = Feature(0)
MODERN = P.MQ | P.REPLY_ACK | P.CONFIG | P.CONFIGURE_MEM_SLOTS


@dataclass(frozen=True, slots=True)
class Vmm:
    """The messages of one front-end; an empty text where it has no such phase.

    notation.py says what the texts mean, and player.py in which order they are played.
    Wherever they leave the rings running, the guest works.
    """

    name: str
    protocol: ProtocolFeature
    """The protocol features that it wants."""
    connect: str
    """From the connection to the device being there for the guest's driver."""
    start: str
    """The driver is ready. Played after a reset of the guest too."""
    reset: str = ""
    """The driver resets the device: the guest's rings begin anew."""
    pause: str = ""
    resume: str = ""
    plug: str = ""
    """The guest gets more memory, while it runs."""
    unplug: str = ""
    reconnect: str = ""
    """There is a new connection after one was lost. The guest knows nothing of it."""
    close: str = ""
    """Its messages before it hangs up."""

    acks: bool = False
    """Does it ask for an ack to every message? Otherwise only where a `!` says so."""
    required: ProtocolFeature = NONE
    """Without these it refuses a back-end."""
    kinds: tuple[str, ...] = ("blk", "fs", "net")
    """Devices that it can have."""
    without: Feature = NOTHING
    """Features that its devices don't have."""
    offers_again: bool = False
    """Does its base after a reconnect let the back-end find what the guest offered
    meanwhile?"""
    kicks: bool = False
    """Does the eventfd of a KICK have a count of 1 already?"""
    remembers: bool = False
    """Does it take the protocol features for negotiated when it connects again?"""


# QEMU: hw/virtio/vhost.c (vhost_dev_init, vhost_dev_start, vhost_virtqueue_start,
# vhost_dev_stop), vhost-user.c, hw/block/vhost-user-blk.c (vhost_user_blk_start: the
# inflight region, and the unmasking of CALL), vhost-user-fs.c (vuf_start),
# hw/net/vhost_net.c. 10.2.2, and observed with 11.1.3 (Debian, 2026-11).

_QEMU_PROTOCOL = (
    MODERN
    | P.BACKEND_REQ
    | P.INFLIGHT_SHMFD
    | P.RESET_DEVICE
    | P.STATUS
    | P.DEVICE_STATE
)
_QEMU_CONNECT = """
    GET_FEATURES GET_PROTOCOL_FEATURES SET_PROTOCOL_FEATURES GET_QUEUE_NUM
    GET_MAX_MEM_SLOTS SET_BACKEND_REQ_FD! SET_OWNER GET_FEATURES
    [CALL=masked! ERR!] GET_CONFIG RESET_DEVICE RESET_DEVICE RESET_DEVICE
"""


def _qemu_start(base: str) -> str:
    """vhost-user-blk: the driver's CALL comes before the rings."""
    return f"""
        SET_FEATURES GET_STATUS SET_STATUS=+8 GET_INFLIGHT_FD SET_INFLIGHT_FD
        (CALL!) SET_FEATURES GET_STATUS SET_STATUS=+8 ADD_MEM_REG|SET_MEM_TABLE!
        (NUM BASE{base} ADDR KICK!) [ENABLE=1!] GET_STATUS SET_STATUS=+7
    """


def _qemu_start_fs(base: str) -> str:
    return f"""
        SET_FEATURES GET_STATUS SET_STATUS=+8 ADD_MEM_REG|SET_MEM_TABLE!
        (NUM BASE{base} ADDR KICK!) [ENABLE=1!] GET_STATUS SET_STATUS=+7 (CALL!)
    """


def _qemu_start_net(base: str) -> str:
    return f"""
        SET_FEATURES GET_STATUS SET_STATUS=+8 ADD_MEM_REG|SET_MEM_TABLE!
        (NUM BASE{base} ADDR KICK! CALL!) GET_STATUS SET_STATUS=+7 [ENABLE=1!]
    """


_QEMU_STOP = "[ENABLE=0!] (GET_VRING_BASE) SET_STATUS=0"
_QEMU_RESET = f"{_QEMU_STOP} RESET_DEVICE"

QEMU = Vmm(
    "QEMU",
    _QEMU_PROTOCOL,
    connect=_QEMU_CONNECT,
    start=_qemu_start("=told"),
    reset=_QEMU_RESET,
    pause=_QEMU_STOP,
    resume=_qemu_start("=told"),
    plug="ADD_MEM_REG|SET_MEM_TABLE!",
    unplug="REM_MEM_REG|SET_MEM_TABLE!",
    reconnect=_QEMU_CONNECT + _qemu_start("=used"),
    close=_QEMU_STOP,
    kicks=True,
    offers_again=True,
)
# It has no code to connect again.
QEMU_FS = Vmm(
    "QEMU-fs",
    _QEMU_PROTOCOL & ~P.INFLIGHT_SHMFD,
    connect=_QEMU_CONNECT,
    start=_qemu_start_fs("=told"),
    reset=_QEMU_RESET,
    pause=_QEMU_STOP,
    resume=_qemu_start_fs("=told"),
    plug="ADD_MEM_REG|SET_MEM_TABLE!",
    unplug="REM_MEM_REG|SET_MEM_TABLE!",
    close=_QEMU_STOP,
    kicks=True,
)
QEMU_NET = Vmm(
    "QEMU-net",
    _QEMU_PROTOCOL & ~(P.INFLIGHT_SHMFD | P.CONFIG),
    connect=_QEMU_CONNECT,
    start=_qemu_start_net("=told"),
    reset=_QEMU_RESET,
    pause=_QEMU_STOP,
    resume=_qemu_start_net("=told"),
    plug="ADD_MEM_REG|SET_MEM_TABLE!",
    unplug="REM_MEM_REG|SET_MEM_TABLE!",
    reconnect=_QEMU_CONNECT + _qemu_start_net("=used"),
    close=_QEMU_STOP,
    kicks=True,
    offers_again=True,
)

# Cloud Hypervisor: virtio-devices/src/vhost_user/vu_common_ctrl.rs (connect_vhost_user,
# negotiate_features_vhost_user, setup_vhost_user, reset_vhost_user, pause_vhost_user,
# reinitialize_vhost_user), mod.rs (reconnect_inner). ae44c2971, 2026-08-22. Its reset
# without GET_VRING_BASE: before 5f9871047, 2022-07-21.

_CH_START = """
    SET_FEATURES SET_MEM_TABLE (NUM) GET_INFLIGHT_FD SET_INFLIGHT_FD
    (ADDR BASE=avail CALL KICK) (ENABLE=1)
"""

CLOUD_HYPERVISOR = Vmm(
    "Cloud-Hypervisor",
    MODERN | P.INFLIGHT_SHMFD | P.DEVICE_STATE,
    connect="""
        SET_OWNER GET_FEATURES GET_PROTOCOL_FEATURES SET_PROTOCOL_FEATURES
        GET_QUEUE_NUM GET_CONFIG
    """,
    start=_CH_START,
    reset="(ENABLE=0 GET_VRING_BASE)",
    pause="(ENABLE=0)",
    resume="(ENABLE=1)",
    plug="ADD_MEM_REG|SET_MEM_TABLE",
    reconnect="SET_OWNER GET_FEATURES SET_PROTOCOL_FEATURES " + _CH_START,
    close="(ENABLE=0 GET_VRING_BASE)",
    acks=True,
)
# A snapshot stops the rings that a pause has disabled; they go on with those bases.
CLOUD_HYPERVISOR_SNAPSHOT = Vmm(
    "Cloud-Hypervisor-snapshot",
    CLOUD_HYPERVISOR.protocol,
    connect=CLOUD_HYPERVISOR.connect,
    start=_CH_START,
    pause="(ENABLE=0) (GET_VRING_BASE)",
    resume=_CH_START.replace("avail", "told"),
    acks=True,
)
CLOUD_HYPERVISOR_2021 = Vmm(
    "Cloud-Hypervisor-2021",
    MODERN,
    connect=CLOUD_HYPERVISOR.connect,
    start=_CH_START,
    reset="(ENABLE=0)",
    pause="(ENABLE=0)",
    resume="(ENABLE=1)",
    acks=True,
)

# crosvm: devices/src/virtio/vhost_user_frontend/mod.rs (new, activate, activate_vring,
# deactivate_vring, virtio_sleep, virtio_wake). f1e797a68, 2026-08-21. Until 18ba2061e,
# 2026-02-12, ack_features sent SET_FEATURES: virtio-pci calls it for each 32 bits.

_CROSVM_CONNECT = """
    SET_OWNER GET_FEATURES GET_PROTOCOL_FEATURES SET_PROTOCOL_FEATURES
    SET_BACKEND_REQ_FD GET_QUEUE_NUM GET_CONFIG
"""


def _crosvm_activate(base: str) -> str:
    return f"SET_MEM_TABLE (NUM ADDR BASE{base} CALL KICK ENABLE=1)"


CROSVM = Vmm(
    "crosvm",
    P.MQ | P.CONFIG | P.BACKEND_REQ | P.DEVICE_STATE | P.REPLY_ACK,
    connect=_CROSVM_CONNECT,
    start="SET_FEATURES=once " + _crosvm_activate(""),
    reset="(ENABLE=0 GET_VRING_BASE)",
    pause="(ENABLE=0 GET_VRING_BASE)",
    resume=_crosvm_activate("=told"),
)
CROSVM_2025 = Vmm(
    "crosvm-2025",
    CROSVM.protocol,
    connect=_CROSVM_CONNECT,
    start="SET_FEATURES=low SET_FEATURES " + _crosvm_activate(""),
    reset="(ENABLE=0 GET_VRING_BASE)",
    pause="(ENABLE=0 GET_VRING_BASE)",
    resume=_crosvm_activate("=told"),
)

# Firecracker: src/vmm/src/devices/virtio/vhost_user.rs (new, negotiate_features,
# setup_backend), block/vhost_user/device.rs (new, activate). 81b38b9da, 2026-08-21.

FIRECRACKER = Vmm(
    "Firecracker",
    P.CONFIG,
    connect="""
        SET_OWNER GET_FEATURES GET_PROTOCOL_FEATURES SET_PROTOCOL_FEATURES GET_CONFIG
    """,
    start="SET_FEATURES SET_MEM_TABLE (NUM) (ADDR BASE=avail CALL KICK ENABLE=1)",
    # A pause says nothing, but a PATCH of the drive reads its configuration again.
    pause="GET_CONFIG",
    without=Feature.INDIRECT_DESC,
)

# libkrun: src/devices/src/virtio/vhost_user/device.rs (new, activate_vhost_user,
# reset). 6ed74fac, 2026-06-12.

LIBKRUN = Vmm(
    "libkrun",
    P.CONFIG | P.MQ,
    connect="""
        GET_FEATURES GET_PROTOCOL_FEATURES SET_PROTOCOL_FEATURES GET_QUEUE_NUM
        GET_CONFIG
    """,
    start="""
        SET_OWNER SET_MEM_TABLE SET_FEATURES (NUM BASE ADDR KICK CALL ENABLE=1)
    """,
    reset="[ENABLE=0]",
)

# alioth: alioth/src/virtio/vu/frontend.rs (new, activate, reset, ram_added), conn.rs
# (send, which waits for a reply to everything). c78f8bd, 2026-08-02.

ALIOTH = Vmm(
    "alioth",
    MODERN | P.STATUS,
    connect="""
        GET_FEATURES GET_PROTOCOL_FEATURES SET_PROTOCOL_FEATURES! GET_QUEUE_NUM
        [ERR] SET_OWNER ADD_MEM_REG GET_CONFIG
    """,
    start="SET_FEATURES [KICK] (CALL NUM BASE ADDR ENABLE=1) SET_STATUS=f",
    reset="[ENABLE=0] SET_STATUS=0",
    plug="ADD_MEM_REG",
    unplug="REM_MEM_REG",
    acks=True,
    required=P.MQ | P.REPLY_ACK | P.CONFIGURE_MEM_SLOTS,
)

# OpenVMM: vm/devices/virtio/vhost_user_frontend/src/lib.rs (from_socket, start_queue,
# stop_queue, reset). 1488a37b7, 2026-08-21.

OPENVMM = Vmm(
    "OpenVMM",
    P.MQ | P.REPLY_ACK | P.CONFIG | P.RESET_DEVICE,
    connect="""
        GET_FEATURES GET_PROTOCOL_FEATURES SET_PROTOCOL_FEATURES SET_OWNER
        GET_QUEUE_NUM GET_CONFIG
    """,
    start="SET_MEM_TABLE=once SET_FEATURES (NUM ADDR BASE KICK CALL ENABLE=1)",
    reset="(ENABLE=0 GET_VRING_BASE) RESET_DEVICE",
    pause="(ENABLE=0 GET_VRING_BASE)",
    resume="(NUM ADDR BASE=told KICK CALL ENABLE=1)",
    acks=True,
)

# Dragonball: src/dragonball/crates/dbs_virtio_devices/src/vhost/vhost_user/ in
# kata-containers: connection.rs (initialize, negotiate, update_memory, reconnect),
# net.rs (activate_slave, handle_connect). 57f416134c, 2026-07-16.

_DRAGONBALL_NEGOTIATE = """
    SET_OWNER GET_FEATURES SET_FEATURES GET_PROTOCOL_FEATURES SET_PROTOCOL_FEATURES
    GET_QUEUE_NUM (CALL) SET_MEM_TABLE (NUM) {base} (ADDR) (KICK) (CALL) (ENABLE=1)
"""

DRAGONBALL = Vmm(
    "Dragonball",
    P.MQ,
    connect="GET_FEATURES",
    start=_DRAGONBALL_NEGOTIATE.format(base="(BASE)"),
    plug="SET_MEM_TABLE",
    reconnect="GET_FEATURES" + _DRAGONBALL_NEGOTIATE.format(base=""),
    required=P.MQ,
    offers_again=True,
)

# virtio-user: drivers/net/virtio/virtio_user/virtio_user_dev.c (virtio_user_dev_init,
# virtio_user_dev_set_features, virtio_user_start_device, virtio_user_stop_device,
# virtio_user_mem_event_cb, virtio_user_dev_server_reconnect), vhost_user.c,
# ../virtio_user_ethdev.c (virtio_user_set_status). 38f72e500b, 2026-07-23.

_DPDK_INIT = "SET_STATUS=0! GET_STATUS SET_STATUS=1! SET_STATUS=3!"
_DPDK_FEATURES = "(CALL) SET_FEATURES SET_STATUS=b! GET_STATUS"
_DPDK_GET_FEATURES = "GET_FEATURES GET_PROTOCOL_FEATURES SET_PROTOCOL_FEATURES"
_DPDK_START = "SET_MEM_TABLE! (NUM BASE ADDR KICK) (ENABLE=1) SET_STATUS=f!"
_DPDK_STOP = "(ENABLE=0) (GET_VRING_BASE)"

VIRTIO_USER = Vmm(
    "virtio-user",
    P.MQ | P.REPLY_ACK | P.STATUS,
    connect=f"SET_OWNER {_DPDK_GET_FEATURES} {_DPDK_INIT} {_DPDK_FEATURES}",
    start=_DPDK_START,
    reset=f"{_DPDK_STOP} {_DPDK_INIT} {_DPDK_FEATURES}",
    plug="(ENABLE=0) SET_MEM_TABLE! (ENABLE=1)",
    unplug="(ENABLE=0) SET_MEM_TABLE! (ENABLE=1)",
    reconnect=f"""
        {_DPDK_STOP} {_DPDK_INIT} {_DPDK_GET_FEATURES} {_DPDK_FEATURES} {_DPDK_START}
    """,
    close=f"{_DPDK_STOP} SET_STATUS=0!",
    required=P.MQ,
    offers_again=True,
    remembers=True,
)

# libblkio: the crate virtio-driver, src/virtio/vhost_user (VhostUser::new,
# setup_queues, map_mem_region). Mirror of March 2024.

LIBBLKIO = Vmm(
    "libblkio",
    MODERN,
    connect="""
        SET_OWNER GET_FEATURES SET_FEATURES GET_PROTOCOL_FEATURES SET_PROTOCOL_FEATURES
        GET_QUEUE_NUM GET_CONFIG GET_CONFIG GET_CONFIG GET_CONFIG GET_MAX_MEM_SLOTS
    """,
    start="ADD_MEM_REG (NUM BASE ADDR KICK CALL ENABLE=1)",
    plug="ADD_MEM_REG",
    unplug="REM_MEM_REG",
    acks=True,
    required=P.REPLY_ACK | P.CONFIG | P.CONFIGURE_MEM_SLOTS,
    kinds=("blk",),
    without=Feature.INDIRECT_DESC,
)

VMMS = (
    QEMU,
    QEMU_FS,
    QEMU_NET,
    CLOUD_HYPERVISOR,
    CLOUD_HYPERVISOR_SNAPSHOT,
    CLOUD_HYPERVISOR_2021,
    CROSVM,
    CROSVM_2025,
    FIRECRACKER,
    LIBKRUN,
    ALIOTH,
    OPENVMM,
    DRAGONBALL,
    VIRTIO_USER,
    LIBBLKIO,
)
