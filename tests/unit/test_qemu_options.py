# SPDX-License-Identifier: Apache-2.0
"""The syntax of QEMU's command line: read, changed and written anew."""

import pytest

from tests.support.tables import each_row
from vhost_airlock.cli.qemu_options import Parameters, is_on, options, texts
from vhost_airlock.errors import UsageError

VALUES = [
    ("chardev", "socket,id=a,path=/run/b.sock", "backend", "socket"),
    ("chardev", "socket,id=a,path=/run/b.sock", "path", "/run/b.sock"),
    ("chardev", "socket,id=a,path=/run/b,,c.sock,wait=off", "path", "/run/b,c.sock"),
    ("chardev", "socket,id=a,path=b,,", "path", "b,"),
    ("chardev", "socket,id=a,path=b,,,wait=off", "path", "b,"),
    ("chardev", "socket,id=a,path=b=c", "path", "b=c"),
    ("chardev", "socket,id=a,path=", "path", ""),
    ("chardev", "socket,id=a,id=b", "id", "b"),
    ("chardev", "id=a,backend=socket", "backend", "socket"),
    ("chardev", "socket,server,nowait", "server", "on"),
    ("chardev", "socket,server,nowait", "wait", "off"),
    ("chardev", "socket,server=on", "wait", None),
    ("chardev", "", "backend", None),
    ("device", "vhost-user-blk-pci,chardev=a", "driver", "vhost-user-blk-pci"),
    ("device", '{"driver": "vhost-user-fs-pci", "tag": "a,b"}', "tag", "a,b"),
    ("device", '{"driver": "x", "ats": true}', "ats", "on"),
    ("device", '{"driver": "x", "ats": false}', "ats", "off"),
    ("device", '{"driver": "x", "addr": 5}', "addr", "5"),
    ("device", '{"driver": "x"}', "id", None),
    ("netdev", "vhost-user,id=n,chardev=a", "type", "vhost-user"),
    ("object", "memory-backend-memfd,id=ram", "qom-type", "memory-backend-memfd"),
    ("machine", "q35,memory-backend=ram", "memory-backend", "ram"),
]


@each_row(VALUES)
def test_value_of_a_parameter(option, text, name, value):
    assert Parameters(option, text).get(name) == value


CHANGES = [
    ("chardev", "socket,id=a,path=b,wait=off", "path", "c"),
    ("chardev", "socket,id=a,path=b,,b,server", "path", "c,d"),
    ("device", '{"driver": "x", "path": "b"}', "path", "c,d"),
]
CHANGED = [
    "backend=socket,id=a,path=c,wait=off",
    "backend=socket,id=a,path=c,,d,server",
    '{"driver": "x", "path": "c,d"}',
]


def test_parameter_with_another_value():
    for (option, text, name, value), expected in zip(CHANGES, CHANGED, strict=True):
        parameters = Parameters(option, text)
        parameters.set(name, value)
        assert str(parameters) == expected
        assert Parameters(option, str(parameters)).get(name) == value


TAKEN = [
    ("x,id=a,memory-isolation=on", "on", "driver=x,id=a"),
    ("x,memory-isolation=off,id=a", "off", "driver=x,id=a"),
    ("x,memory-isolation,id=a,b", "on", "driver=x,id=a,b"),
    ("x,nomemory-isolation,id=a", "off", "driver=x,id=a"),
    ("x,id=a", None, "driver=x,id=a"),
    ('{"driver": "x", "memory-isolation": true}', "on", '{"driver": "x"}'),
    ('{"driver": "x", "n": [{"m": 1}]}', None, '{"driver": "x", "n": [{"m": 1}]}'),
]


@each_row(TAKEN)
def test_parameter_is_taken_out(text, value, rest):
    parameters = Parameters("device", text)
    assert parameters.take("memory-isolation") == value
    assert str(parameters) == rest


def test_options_of_a_command():
    """Parameters that look like an option are none, and an option may be the last."""
    words = ["taskset", "-c", "1", "qemu", "-S", "--chardev", "socket,id=a", "-netdev"]
    words += ["-device", "-device", "x", "-chardev-x", "y", "-display", "none"]
    found = [(each.name, each.place) for each in options([*words, "-device"])]
    assert found == [("chardev", 6), ("netdev", 8), ("device", 10)]


def test_words_after_an_option():
    words = ["qemu", "-set", "a.b.c=d", "--set", "e", "-settle", "f", "-set"]
    assert texts(words, "set") == ["a.b.c=d", "e"]


def test_switches():
    assert all(is_on("device", "x", word) for word in ("on", "yes", "true", "y"))
    assert not any(is_on("device", "x", word) for word in ("off", "no", "false", "n"))
    with pytest.raises(UsageError, match="-device: x=auto is neither on nor off"):
        is_on("device", "x", "auto")


def test_json_that_can_not_be_read():
    with pytest.raises(UsageError, match=r"-device \{'driver': .*JSON"):
        Parameters("device", "{'driver': 'vhost-user-blk-pci'}")
