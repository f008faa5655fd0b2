"""Keys as options give them: in the option itself, in a file, in a variable of the environment.

Called by config/ for each kind of key. No message shows a key.
"""

from __future__ import annotations

from octavo.errors import ConfigError


def all_keys(
    name: str, given: tuple[str, ...], path: str | None, variable: str | None
) -> tuple[str, ...]:
    """Returns the keys of an option, of its file and of its environment variable, each
    once.

    Raises ConfigError for a key that no client could send; its message never shows a key.
    """
    keys = [*given]
    if path is not None:
        keys += _keys_of_file(f"{name}_file", path)
    # An empty variable is how shells and Compose files spell an unset one.
    if variable:
        keys.append(variable)
    for key in keys:
        if not key.strip():
            message = f"{name} is empty; leave the option out to serve without keys"
            raise ConfigError(message, field=name)
        if key != key.strip() or not key.isprintable():
            message = f"a key in {name} has spaces around it or characters that cannot be sent"
            raise ConfigError(message, field=name)
    return tuple(dict.fromkeys(keys))


def _keys_of_file(name: str, path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            keys = [line.strip() for line in file.read().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} {path!r} cannot be read: {error}", field=name) from error
    if not keys:
        # Taken for no keys at all, it would open the server to everyone.
        raise ConfigError(f"{name} {path!r} holds no key", field=name)
    return keys
