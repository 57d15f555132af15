# SPDX-License-Identifier: Apache-2.0
"""Classes that are little more than their fields, for all that runs with a guest.

They are used, and checked by type checkers, as dataclasses are. But the dataclasses of
the standard library write and compile source text for each class, and load the tools
for that: together a quarter of an airlock's time to start, and a tenth of its memory.
Here all classes share the same few functions.
"""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """A class whose objects never change, and are equal if all fields are.

    Its fields are its annotations that are no ClassVar, in their order; a value in the
    class is the default.
    """
    _give(cls, __setattr__=_refuse, __delattr__=_refuse, __hash__=_hash)
    return _with_fields(cls)


@dataclass_transform()
def changeable(cls: type[T]) -> type[T]:
    """The same for objects that may change, and can't be keys."""
    _give(cls, __hash__=None)
    return _with_fields(cls)


def fields(of: object) -> tuple[str, ...]:
    """Return the names of a record's fields, or of those of a class of records."""
    names: tuple[str, ...] = of.__match_args__  # type: ignore[attr-defined]
    return names


def values(of: object) -> tuple[Any, ...]:
    """Return the values of a record's fields."""
    return tuple(getattr(of, name) for name in fields(of))


def replaced(of: T, **changes: object) -> T:
    """Return a record like this one, but for these fields."""
    return type(of)(**{**dict(zip(fields(of), values(of), strict=True)), **changes})


def _with_fields(cls: type[T]) -> type[T]:
    names = tuple(
        name
        for name, kind in cls.__annotations__.items()
        if not str(kind).startswith(("ClassVar", "typing.ClassVar"))
    )
    defaults = {name: vars(cls)[name] for name in names if name in vars(cls)}
    _give(cls, __match_args__=names, _defaults=defaults)
    _give(cls, __init__=_init, __repr__=_repr, __eq__=_equal)
    return cls


def _give(cls: type, **members: object) -> None:
    """Give a class these members, but none that it has of its own."""
    for name, member in members.items():
        if name not in cls.__dict__:
            setattr(cls, name, member)


def _init(self: object, *args: object, **named: object) -> None:
    names = fields(self)
    found = dict(zip(names, args, strict=False))
    twice = found.keys() & named
    found.update(named)
    # The defaults become the object's own: a function must not become a method.
    found = {**self._defaults, **found}  # type: ignore[attr-defined]
    if len(args) > len(names) or twice or found.keys() != set(names):
        raise TypeError(
            f"{type(self).__name__}({', '.join(names)}) got {len(args)} values and"
            f" {', '.join(named) or 'no names'}"
        )
    self.__dict__.update(found)


def _repr(self: object) -> str:
    told = ", ".join(
        f"{name}={value!r}"
        for name, value in zip(fields(self), values(self), strict=True)
    )
    return f"{type(self).__name__}({told})"


def _equal(self: object, other: object) -> bool:
    if type(other) is not type(self):
        return False
    return values(self) == values(other)


def _hash(self: object) -> int:
    return hash(values(self))


def _refuse(self: object, name: str, *_: object) -> NoReturn:
    raise AttributeError(f"{type(self).__name__}.{name} never changes")
