# SPDX-License-Identifier: Apache-2.0
"""Which devices of a QEMU command get an airlock: whole command lines, and their parts.

The command lines are in the forms that users type and that libvirt 9 to 11 make.
"""

import json
import shlex
from typing import Any

import pytest

from tests.support.tables import each_row
from vhost_airlock.cli.qemu_plan import PROPERTY, Isolated, Plan
from vhost_airlock.errors import StartError, UsageError
from vhost_airlock.proxy.device_types import find_type

MEMORY = "-object memory-backend-memfd,id=ram,size=1G -M q35,memory-backend=ram"
DISK = "-chardev socket,id=c,path=b.sock -device vhost-user-blk-pci,chardev=c"


def plan(text: str) -> Plan:
    return Plan(["qemu", *shlex.split(text)])


def told(text: str) -> list[str]:
    """The warnings, of a guest with shared memory."""
    return plan(f"{MEMORY} {text}").warnings


def isolated(text: str) -> list[str]:
    return [device.name for device in plan(text).isolated]


def test_command_of_a_user():
    typed = f"{MEMORY} -smp 2 -chardev socket,id=net,path=n,,1.sock,reconnect-ms=500"
    typed += " -netdev vhost-user,id=n0,chardev=net -device virtio-net-pci,netdev=n0"
    typed += " -chardev stdio,id=console -serial chardev:console -append a,b=c -S"
    made = plan(f"{DISK},bootindex=1 {typed}")
    assert made.isolated == [
        Isolated("c", "b.sock", listens=False, may_come=False, kind="block"),
        Isolated("net", "n,1.sock", listens=False, may_come=True, kind="net"),
    ]
    assert made.warnings == []
    before = plan(f"{DISK},bootindex=1 {typed}").words
    after = made.command("/tmp/x,y")
    changed = {old: new for old, new in zip(before, after, strict=True) if old != new}
    assert changed == {
        "socket,id=c,path=b.sock": "backend=socket,id=c,path=/tmp/x,,y/c.sock",
        "socket,id=net,path=n,,1.sock,reconnect-ms=500": (
            "backend=socket,id=net,path=/tmp/x,,y/net.sock,reconnect-ms=500"
        ),
    }


def test_command_of_libvirt():
    """A disk, a folder, a network card on which QEMU listens, and one by passt."""
    folder = "/var/lib/libvirt/qemu/domain-1-vm"
    objects = {"qom-type": "memory-backend-memfd", "id": "pc.ram", "share": True}
    devices = [
        ("chr-vu-virtio-disk0", "vhost-user-blk-pci", {"bootindex": 1}),
        ("chr-vu-fs0", "vhost-user-fs-pci", {"tag": "share", "queue-size": 1024}),
    ]
    words = [
        *("/usr/bin/qemu-system-x86_64", "-name", "guest=vm,debug-threads=on", "-S"),
        *("-object", json.dumps({"qom-type": "secret", "id": "masterKey0"})),
        *("-machine", "pc-q35-10.0,usb=off,memory-backend=pc.ram,acpi=on"),
        *("-object", json.dumps(objects | {"size": 1 << 28})),
        *("-display", "none", "-no-user-config", "-nodefaults"),
        *("-chardev", "socket,id=charmonitor,fd=23,server=on,wait=off"),
        *("-mon", "chardev=charmonitor,id=monitor,mode=control"),
        *("-chardev", "socket,id=chr-vu-virtio-disk0,path=/run/d,reconnect-ms=10000"),
        *("-device", json.dumps({"driver": devices[0][1], "chardev": devices[0][0]})),
        *("-chardev", f"socket,id=chr-vu-fs0,path={folder}/fs0-fs.sock"),
        *("-device", json.dumps({"driver": devices[1][1], "chardev": devices[1][0]})),
        *("-chardev", "socket,id=charnet0,path=/tmp/vhost0.sock,server=on"),
        *("-netdev", '{"type":"vhost-user","chardev":"charnet0","id":"hostnet0"}'),
        *("-device", '{"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0"}'),
        *("-chardev", "socket,id=charnet1,path=/run/libvirt/qemu/passt/1-net1.socket"),
        *("-netdev", '{"type":"vhost-user","chardev":"charnet1","id":"hostnet1"}'),
        *("-device", '{"driver":"virtio-net-pci","netdev":"hostnet1","id":"net1"}'),
        *("-sandbox", "on,obsolete=deny,spawn=deny", "-msg", "timestamp=on"),
    ]
    made = Plan(words)
    assert made.isolated == [
        Isolated("chr-vu-virtio-disk0", "/run/d", False, True, "block"),
        Isolated("chr-vu-fs0", f"{folder}/fs0-fs.sock", False, False, "fs"),
        Isolated("charnet0", "/tmp/vhost0.sock", True, False, "net"),
        Isolated(
            "charnet1", "/run/libvirt/qemu/passt/1-net1.socket", False, False, "net"
        ),
    ]
    assert made.warnings == []
    after = made.command("/x")
    different = [i for i, word in enumerate(words) if after[i] != word]
    assert [words[i].partition(",path")[0] for i in different] == [
        f"socket,id={device.name}" for device in made.isolated
    ]


def test_inherited_sockets():
    """One is connected, one listens. Only the airlocks have them then."""
    made = plan(
        f"{MEMORY} -chardev socket,id=a,fd=5 -device vhost-user-blk-pci,chardev=a"
        " -chardev socket,id=b,server=on,fd=06,wait=off"
        " -netdev vhost-user,id=n,chardev=b -device virtio-net-pci,netdev=n"
    )
    assert made.isolated == [
        Isolated("a", "", listens=False, may_come=False, kind="block", fd=5),
        Isolated("b", "", listens=True, may_come=False, kind="net", fd=6),
    ]
    assert made.warnings == []
    assert [word for word in made.command("/x") if word.startswith("backend=")] == [
        "backend=socket,id=a,path=/x/a.sock",
        "backend=socket,id=b,server=on,wait=off,path=/x/b.sock",
    ]


PROBES = [
    "--version",
    "-help",
    "-device help",
    "-device vhost-user-blk-pci,help",
    "-S -no-user-config -nodefaults -nographic -machine none,accel=kvm:tcg"
    " -qmp unix:/var/lib/libvirt/qemu/q/qmp.monitor,server=on,wait=off"
    " -pidfile /var/lib/libvirt/qemu/q/qmp.pid -daemonize",
    "-m 1G -drive file=disk.img,if=virtio -netdev user,id=n -device e1000,netdev=n",
    "-chardev socket,id=c,path=b.sock -device virtserialport,chardev=c",
]


@each_row(PROBES)
def test_command_without_such_devices_is_left_alone(text):
    made = plan(text)
    assert made.words == ["qemu", *shlex.split(text)]
    assert made.isolated == []
    assert made.warnings == []


CHOICES = [
    ("a=, b=", ["a", "b"]),
    ("a=on, b=", ["a"]),
    ("a=, b=on", ["b"]),
    ("a=on, b=on", ["a", "b"]),
    ("a=off, b=", ["b"]),
    ("a=off, b=on", ["b"]),
    ("a=off, b=off", []),
]


@each_row(CHOICES)
def test_property_chooses_devices(wishes, expected):
    """In both forms, of a device and of a network card."""
    for form in ("plain", "json", "linked"):
        text = ""
        for each in wishes.split(", "):
            name, _, wish = each.partition("=")
            text += f" -chardev socket,id={name},path={name}.sock "
            text += device(form, name, wish)
        made = plan(text)
        assert [device.name for device in made.isolated] == expected
        assert PROPERTY not in " ".join(made.command("/x"))


def device(form: str, name: str, wish: str) -> str:
    if form == "json":
        content: dict[str, Any] = {"driver": "vhost-user-fs-pci", "chardev": name}
        if wish:
            content[PROPERTY] = wish == "on"
        return f"-device '{json.dumps(content)}'"
    suffix = f",{PROPERTY}={wish}" if wish else ""
    if form == "plain":
        return f"-device vhost-user-fs-pci,chardev={name}{suffix}"
    netdev = f"-netdev vhost-user,id=net{name},chardev={name}"
    return f"-device virtio-net-pci,netdev=net{name}{suffix} {netdev}"


TYPES = [
    ("-device vhost-user-blk-pci,chardev=c", "block"),
    ("-device vhost-user-blk-pci-non-transitional,chardev=c", "block"),
    ("-device vhost-user-scsi-pci-transitional,chardev=c", "scsi"),
    ("-device vhost-user-fs-ccw,chardev=c", "fs"),
    ("-device vhost-user-fs-device,chardev=c", "fs"),
    ("-device vhost-user-vsock-pci,chardev=c", "vsock"),
    ("-device vhost-user-snd-pci,chardev=c", "sound"),
    ("-device vhost-user-rng,chardev=c", "rng"),
    ("-device vhost-user-rtc-pci,chardev=c", ""),
    ("-device vhost-user-test-device-pci,chardev=c,virtio-id=26", "26"),
    ("-device vhost-user-device,chardev=c,virtio-id=1", "1"),
    ("-device vhost-user-device-pci,chardev=c", ""),
    ("-device vhost-user-test-device,chardev=c,virtio-id=99", ""),
    ("-netdev vhost-user,id=n,chardev=c", "net"),
    ("-nic vhost-user,chardev=c,model=virtio", "net"),
    ("-object cryptodev-vhost-user,id=o,chardev=c", "crypto"),
]


@each_row(TYPES)
def test_type_of_a_device(text, kind):
    made = plan(f"-chardev socket,id=c,path=b.sock {text}")
    assert [device.kind for device in made.isolated] == [kind]
    assert kind == "" or not find_type(kind).refused


UNFIT = [
    ("-device vhost-user-vga,chardev=c", "a gpu device can't be: its requests carry"),
    ("-device vhost-user-gpu-pci,chardev=c", "a gpu device can't be: its requests"),
    ("-device vhost-user-device,chardev=c,virtio-id=24", "a mem device can't be: "),
    ("-device vhost-user-blk-pci,chardev=d", "there is no -chardev with id=d"),
    ("-device vhost-user-blk-pci,chardev=p", "-chardev p is no socket"),
    ("-device vhost-user-blk-pci,chardev=f", "-chardev f has fd=back, which is no num"),
    ("-device vhost-user-blk-pci,chardev=t", "-chardev t has no path"),
    ("-device vhost-user-blk-pci,chardev=a", "-chardev a is an abstract socket"),
]
CHARDEVS = (
    "-chardev socket,id=c,path=b.sock -chardev pty,id=p -chardev socket,id=f,fd=back"
    " -chardev socket,id=t,host=h,port=1 -chardev socket,id=a,path=b,abstract=on"
)


@each_row(UNFIT)
def test_device_that_can_not_be_isolated(text, reason):
    """It is left alone with a warning, but not where isolation was asked for."""
    made = plan(f"{CHARDEVS} {text}")
    driver = text.partition(",")[0]
    assert made.isolated == []
    assert len(made.warnings) == 1
    assert made.warnings[0].startswith(f"{driver} is NOT isolated: {reason}")
    assert plan(f"{CHARDEVS} {text},{PROPERTY}=off").warnings == []
    with pytest.raises(StartError) as caught:
        plan(f"{CHARDEVS} {text},{PROPERTY}=on")
    assert str(caught.value).startswith(f"{driver}: {PROPERTY}=on, but {reason}")


REFUSED = [
    (StartError, f"-device e1000,{PROPERTY}=on", "it has no vhost-user back-end"),
    (StartError, f"-netdev user,id=n -device e1000,netdev=n,{PROPERTY}=on", "no vhost"),
    (StartError, f"{DISK} -device e1000,{PROPERTY}=on", "it has no vhost-user"),
    (UsageError, f"{DISK},{PROPERTY}=auto", f"{PROPERTY}=auto is neither on nor off"),
    (UsageError, f"{DISK} -global vhost-user-blk-pci.{PROPERTY}=on", "put memory-iso"),
    (UsageError, f"{DISK},id=d -set device.d.{PROPERTY}=on", "put memory-isolation in"),
    (UsageError, f"{DISK} -set chardev.c.path=/other", "put it in -chardev"),
    (UsageError, DISK.replace("b.sock", "b,server=maybe"), "server=maybe is neither"),
]


@each_row(REFUSED)
def test_command_that_is_refused(error, text, reason):
    with pytest.raises(error, match=reason):
        plan(text)


def test_off_for_another_device_does_no_harm():
    assert isolated(f"{DISK} -device e1000,{PROPERTY}=off") == ["c"]


MEMORIES = [
    (MEMORY, ""),
    ("-M q35 -m 1G", "neither -machine has a memory-backend nor -numa a memdev"),
    (
        "-object memory-backend-memfd,id=r,share=off -M q35,memory-backend=r",
        "memfd,id=r",
    ),
    ("-object memory-backend-file,id=r -M q35,memory-backend=r", "-file,id=r has no"),
    (
        "-object memory-backend-ram,id=r -numa node,memdev=r",
        "-ram,id=r has no share=on",
    ),
    ("-object memory-backend-file,id=r,share=on -machine q35,memory-backend=r", ""),
    ("-object memory-backend-shm,id=r -machine q35,memory-backend=r", ""),
    (
        "-object memory-backend-ram,id=other -object memory-backend-memfd,id=r"
        " -numa node,memdev=r",
        "",
    ),
    ("-readconfig vm.cfg", "devices in vm.cfg are NOT isolated"),
]


@each_row(MEMORIES)
def test_memory_that_is_not_shared_is_told(text, warning):
    warnings = plan(f"{DISK} {text}").warnings
    assert len(warnings) == bool(warning)
    assert all(warning in each for each in warnings)


def test_memory_matters_only_with_an_airlock():
    assert plan("-M q35 -m 1G").warnings == []
