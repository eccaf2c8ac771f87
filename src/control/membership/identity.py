"""What an agent was started to run. Agents state it when they join: an endpoint that two jobs share by default must not
make one job of them. Pure values; `launcher/identity.py` makes them of a command line.
"""

from __future__ import annotations

import msgspec

MEANT = "may_differ"
"""The `--rdzv-conf` setting by which nodes of one job may run different scripts, with different options."""
OF_A_ROLE = "--nproc-per-node"
"""The one option in which roles may differ, beside their scripts."""
_SHOWN = 120
_REMEDY = "another job needs an endpoint of its own, such as another port; nodes of one job that are meant to differ "


class Identity(msgspec.Struct, frozen=True):
    """The digests are equal where the texts are."""

    script: str = ""
    """As it was named; for messages only, as the same script can have another path elsewhere."""
    text: str = ""
    """Digest of the script's text; empty where there is none to read."""
    arguments: str = ""
    """Digest of what follows the script."""
    options: tuple[tuple[str, str], ...] = ()
    """Those that are about the whole job, with their values."""
    may_differ: bool = False


def difference(own: Identity, other: Identity, *, same_role: bool) -> str:
    """In which way `other` is not what is run here; empty if it is the same. Roles run scripts of their own."""
    if same_role and own.text != other.text:
        return f"it runs {_named(other.script)}, and the job here {_named(own.script)}, whose text is another"
    if same_role and own.arguments != other.arguments:
        return f"it runs {_named(other.script)} with other arguments than the job here"
    ours, theirs = dict(own.options), dict(other.options)
    for name in [*ours, *(theirs.keys() - ours.keys())]:
        here, there = ours.get(name, "none"), theirs.get(name, "none")
        if here != there and (same_role or name != OF_A_ROLE):
            return f"it has {_shortened(name)}={_shortened(there)}, and the job here {_shortened(here)}"
    return ""


def why_another_job(own: Identity, other: Identity, *, same_role: bool) -> str:
    """A sentence; empty if they may be one job."""
    found = difference(own, other, same_role=same_role)
    if not found or (own.may_differ and other.may_differ):
        return ""
    return f"{found} ({_REMEDY}all need --rdzv-conf {MEANT}=1)"


def _named(script: str) -> str:
    return _shortened(script) or "another program"


def _shortened(text: str) -> str:
    """Of another agent's: no control characters, not too long."""
    printable = "".join(character if character.isprintable() else "?" for character in text[: _SHOWN + 1])
    return printable if len(printable) <= _SHOWN else f"{printable[:_SHOWN]}..."
