"""`make gpu` on a machine with Python and torch alone: stand-ins for the other packages, and then `gpu`.

What trains needs of the others no more than configurations that hold their values. Those are checked by the
rules that tie them together, not one by one. All else that is missing is a mock, which does nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import MagicMock

MOCKED = ("numpy", "pandas", "PIL", "filelock", "psutil", "yaml", "tqdm", "IPython", "IPython.display")

FREE_BYTES = 2**31
"""Memory that a stack on a CPU may count on where nobody says how much is free."""


class Field:
    """A value that a field has when none is given; its limits are not kept."""

    def __init__(self, default: Any = ..., default_factory: Any = None, **limits: Any) -> None:
        self.default, self.default_factory = default, default_factory


class BaseModel:
    """A configuration as pydantic makes it of what is valid, with the same values in `model_dump`."""

    model_fields: ClassVar[dict[str, Field]] = {}

    def __init_subclass__(cls) -> None:
        own = {name: cls.__dict__.get(name, ...) for name in cls.__annotations__}
        fields = {name: value if isinstance(value, Field) else Field(value) for name, value in own.items()}
        cls.model_fields = {**cls.model_fields, **fields}

    def __init__(self, **values: Any) -> None:
        if unknown := values.keys() - self.model_fields.keys():
            raise ValueError(f"{min(unknown)}: no such parameter, allowed: {', '.join(self.model_fields)}")
        for name, field in self.model_fields.items():
            value = values.get(name, field.default)
            if name not in values and field.default_factory is not None:
                value = field.default_factory(self.__dict__)
            if value is ...:
                raise ValueError(f"{name}: it is missing")
            # As where a float is declared.
            self.__dict__[name] = float(value) if isinstance(field.default, float) else value
        for kind in reversed(type(self).__mro__):
            for check in vars(kind).values():
                if getattr(check, "validates", False):
                    check(self)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.items()))

    def model_copy(self, update: dict[str, Any]) -> BaseModel:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__ | update)
        return copy

    def model_dump(self) -> dict[str, Any]:
        return dict(self.__dict__)


class ValidationError(ValueError):
    """What pydantic raises for a value that is not allowed; here nothing does."""


def model_validator(mode: str) -> Callable[[Any], Any]:
    """Marks a check of a whole configuration."""

    def marked(check: Any) -> Any:
        check.validates = True
        return check

    return marked


@contextmanager
def provided() -> Iterator[None]:
    """What is imported in here finds stand-ins in the places of packages that are missing."""
    # It looks for some of them itself.
    import torch  # noqa: F401

    names = [name for name in MOCKED if find_spec(name.partition(".")[0]) is None]
    stand_ins: dict[str, Any] = {name: MagicMock() for name in names}
    if "psutil" in names:
        stand_ins["psutil"].virtual_memory.return_value.available = FREE_BYTES
    if find_spec("pydantic") is None:
        own = (BaseModel, Field, ValidationError, model_validator)
        stand_ins["pydantic"] = SimpleNamespace(**{part.__name__: part for part in own}, ConfigDict=dict)
    sys.modules.update(stand_ins)
    yield
    # What torch imports later may get on without a package better than with a mock.
    for name in stand_ins:
        del sys.modules[name]


if __name__ == "__main__":
    with provided():
        from lib.experiments.gpu import main

    sys.exit(main())
