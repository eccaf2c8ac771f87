"""From arguments as argparse reads them to arguments as click reads them.

torchrun parses with argparse, and scripts rely on its habits: an option by a unique beginning of its name, `-r3`, the
underscore spelling, a value that may begin with a minus sign only if it is a number or contains a space, everything
after the script being the script's. Options are declared once, with click; this file only rewrites a command line to
the full names, `--name=value` each, and knows nothing of their meaning.

A beginning that names one option of torchrun's means that one, whatever other options there are here: a command line
that torchrun accepts must not become ambiguous because hyperpodrun has more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import click

_NUMBER = re.compile(r"^-\d+$|^-\d*\.\d+$")


class Arguments:
    """The spellings of a command's options."""

    def __init__(self, options: Iterable[click.Option], torchrun_names: Iterable[str]) -> None:
        self._options: dict[str, click.Option] = {}
        for option in options:
            for name in option.opts:
                self._options[name] = option
                if name.startswith("--"):
                    self._options["--" + name[2:].replace("-", "_")] = option
        self._torchruns = frozenset(torchrun_names)

    def normalise(self, arguments: Sequence[str]) -> list[str]:
        """The same command line with full names. Raises click.UsageError for what argparse would not take."""
        rest = list(arguments)
        result: list[str] = []
        while rest and rest[0] != "--":
            found = self._read(rest[0])
            if found is None:
                break
            name, value = found
            del rest[0]
            while self._options[name].is_flag:
                result.append(_full_name(self._options[name]))
                if value is None:
                    break
                following = f"-{value[:1]}"  # -mr3 is -m -r3
                if name.startswith("--") or following not in self._options:
                    raise click.UsageError(f"{name} takes no value, and was given {value!r}")
                name, value = following, value[1:] or None
            else:
                if value is None:
                    if not rest or not self._is_value(rest[0]):
                        raise click.UsageError(f"{name} needs a value")
                    value = rest.pop(0)
                result.append(f"{_full_name(self._options[name])}={value}")
        return [*result, *_script(rest)]

    def _read(self, token: str) -> tuple[str, str | None] | None:
        """A known spelling and the value after its `=`, or None if the token is no option."""
        if token in ("", "-") or token[0] != "-":
            return None
        if token in self._options:
            return token, None
        name, separator, value = token.partition("=")
        given = value if separator else None
        if separator and name in self._options:
            return name, given
        if token.startswith("--"):
            match = self._by_beginning(name)
            if match is not None:
                return match, given
        elif token[:2] in self._options:
            return token[:2], token[2:]
        if _NUMBER.match(token) or " " in token:
            return None
        raise click.NoSuchOption(name)

    def _by_beginning(self, beginning: str) -> str | None:
        names = [name for name in self._options if name.startswith(beginning)]
        torchruns = [name for name in names if _full_name(self._options[name]) in self._torchruns]
        full_names = sorted({_full_name(self._options[name]) for name in torchruns or names})
        if len(full_names) > 1:
            raise click.UsageError(f"{beginning} could be {', '.join(full_names[:-1])} or {full_names[-1]}")
        return full_names[0] if full_names else None

    def _is_value(self, token: str) -> bool:
        if token == "--":
            return False
        try:
            return self._read(token) is None
        except click.UsageError:
            return False


def _full_name(option: click.Option) -> str:
    return max(option.opts, key=len)


def _script(rest: list[str]) -> list[str]:
    """The script and all that is its own. One `--` before the script, or else right after it, is the launcher's."""
    if rest[:1] != ["--"]:
        rest = [*rest[:1], *rest[2 if rest[1:2] == ["--"] else 1 :]]
        return ["--", *rest] if rest else []
    return rest if len(rest) > 1 else []
