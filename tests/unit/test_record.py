# SPDX-License-Identifier: Apache-2.0
"""Records behave as the dataclasses do that they stand for."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from vhost_airlock.record import changeable, fields, record, replaced, values
from vhost_airlock.vhost.wire import Config, CryptoSession


class Base:
    __slots__ = ()


@record
class Point(Base):
    UNIT: ClassVar = "m"

    x: int
    y: int = 0
    """Up."""

    @property
    def flat(self) -> bool:
        return self.y == 0


@dataclasses.dataclass(frozen=True)
class Model(Base):
    UNIT: ClassVar = "m"

    x: int
    y: int = 0


def twice(number: int) -> int:
    return 2 * number


@record
class Way:
    go: Callable[[int], int] = twice


@changeable
class Box:
    name: str
    size: int = 1


CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((1,), {}),
    ((1, 2), {}),
    ((1,), {"y": 2}),
    ((), {"y": 2, "x": 1}),
    ((), {}),
    ((1, 2, 3), {}),
    ((1,), {"x": 1}),
    ((1,), {"z": 1}),
    ((), {"y": 1}),
]


@pytest.mark.parametrize(("args", "named"), CALLS)
def test_they_are_made_as_dataclasses_are(args, named):
    try:
        model = Model(*args, **named)
    except TypeError:
        with pytest.raises(TypeError, match=r"Point\(x, y\) got"):
            Point(*args, **named)
        return
    point = Point(*args, **named)
    assert values(point) == dataclasses.astuple(model)
    assert repr(point) == repr(model).replace("Model", "Point")
    assert point.flat == (model.y == 0)


def test_fields_are_in_their_order_and_constants_are_none():
    model = tuple(field.name for field in dataclasses.fields(Model))
    assert fields(Point) == fields(Point(1)) == model == ("x", "y")
    assert Point(1).UNIT == "m"
    match Point(3, 4):
        case Point(x, y):
            assert (x, y) == (3, 4)


def test_a_function_stays_a_function():
    assert Way().go(2) == Way(go=lambda number: number + 2).go(2) == 4


def test_records_never_change():
    point = Point(1)
    for change in (
        lambda: setattr(point, "x", 2),
        lambda: setattr(point, "other", 2),
        lambda: delattr(point, "x"),
    ):
        with pytest.raises(AttributeError, match=r"Point\.(x|other) never changes"):
            change()
    assert point == Point(1)


def test_records_are_equal_if_all_fields_are():
    assert Point(1) == Point(1, 0)
    others: list[object] = [Point(1, 1), Model(1), (1, 0)]
    assert Point(1) not in others
    assert len({Point(1), Point(1, 0), Point(2)}) == 2


def test_changeable_ones_change_and_are_no_keys():
    box = Box("a")
    box.size = 3
    assert box == Box("a", size=3)
    other = Box("b")
    Box.size = 5
    assert other.size == 1, "a default was taken when the object was made"
    with pytest.raises(TypeError, match="unhashable"):
        hash(box)


def test_replaced_is_another_one():
    point = Point(1, 2)
    assert replaced(point, y=5) == Point(1, 5)
    assert point == Point(1, 2)
    with pytest.raises(TypeError):
        replaced(point, z=1)


def test_what_a_class_has_of_its_own_stays():
    """No log has a device's configuration, or a key."""
    assert repr(Config(1, 2, data=b"secret")) == "Config(offset=1, size=2, flags=0)"
    assert repr(CryptoSession(b"secret12")) == "CryptoSession()"
