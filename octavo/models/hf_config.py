"""Typed access to a Hugging Face config.json: absent, null and wrong values each have an answer.

Used by the family files and what they share. It knows no field by name; it never imports torch or
transformers. Defaults are those of `config_classes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from octavo.errors import UnsupportedModelError
from octavo.models.config_classes import ConfigClass

NOTHING_KNOWN = ConfigClass()
MOST_COUNTED = 10_000


class HFConfig:
    """Typed access to the fields of one JSON object.

    Absent means the default of transformers' config class; null means null, in the few fields where
    the class lets it be, and is refused in all others.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        where: str = "config.json",
        config_class: ConfigClass = NOTHING_KNOWN,
    ) -> None:
        self.fields = fields
        self.where = where
        self._class = config_class

    def refuse(self, name: str, known: str) -> NoReturn:
        """Raises UnsupportedModelError naming the field, its value and what is known."""
        name = self._spelling(name)
        if name in self.fields:
            value = self.fields[name]
            shown = "is null, its value is missing" if value is None else f"is {value!r}"
        else:
            default = self._class.defaults.get(name)
            shown = "is missing" + ("" if default is None else f", which means {default!r}")
        raise UnsupportedModelError(f"{self.where}: {name} {shown}; known: {known}")

    def value(self, name: str) -> Any:
        """Returns the field, or its default where it is absent; None where null is allowed, or
        where the field is missing and has no default."""
        found = self._spelling(name)
        if found not in self.fields:
            return self._class.defaults.get(name)
        value = self.fields[found]
        if value is None and name not in self._class.nullable:
            self.refuse(name, "any value but null; leave it out for the default")
        return value

    def _spelling(self, name: str) -> str:
        alias = self._class.aliases.get(name)
        return name if alias is None or alias not in self.fields else alias

    def integer(self, name: str, *, least: int = 1) -> int:
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.refuse(name, f"an integer of at least {least}")
        return value

    def count(self, name: str) -> int:
        """Returns a number of things that are gone through one by one, layers or experts."""
        found = self.integer(name)
        if found > MOST_COUNTED:
            self.refuse(name, f"at most {MOST_COUNTED}")
        return found

    def optional_integer(self, name: str) -> int | None:
        return None if self.value(name) is None else self.integer(name)

    def number(self, name: str) -> float:
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(name, "a number above 0")
        if not 0 < value < math.inf:
            self.refuse(name, "a number above 0")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.value(name) is None else self.number(name)

    def boolean(self, name: str) -> bool:
        value = self.value(name)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def text(self, name: str) -> str:
        value = self.value(name)
        if not isinstance(value, str):
            self.refuse(name, "a string")
        return value

    def optional_integers(self, name: str) -> tuple[int, ...]:
        value = self.value(name)
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)) or not all(type(item) is int for item in value):
            self.refuse(name, "a list of integers")
        return tuple(value)

    def inner(self, name: str, config_class: ConfigClass) -> HFConfig:
        """Returns the object in field `name`."""
        value = self.value(name)
        if not isinstance(value, Mapping):
            self.refuse(name, "an object")
        return HFConfig(value, f"{self.where}: {name}", config_class)

    def must_be_off(self, name: str) -> None:
        """Refuses a feature that Octavo does not have when the config turns it on."""
        if self.value(name) not in (None, False, 0):
            self.refuse(name, "only null or false")
