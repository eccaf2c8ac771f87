"""One endpoint as it is written on the command line. Apart, as both `rendezvous` and `discovery` read them."""

from __future__ import annotations

import re

import click


def parse_endpoint(endpoint: str, default_port: int | None) -> tuple[str, int]:
    """`HOST[:PORT]`, with brackets around an IPv6 address. Raises click.UsageError."""
    text = endpoint.strip()
    host, separator, port_text = (text, "", "") if re.fullmatch(r"\[.*\]", text) else _split(text)
    if re.fullmatch(r"\[.+\]", host):
        host = host[1:-1]
    port = default_port
    if separator:
        port = int(port_text) if re.fullmatch(r"[0-9]{1,5}", port_text) else -1
    if port is None:
        raise click.UsageError(f"--rdzv-endpoint {endpoint}: the static backend needs its port")
    if not 0 <= port < 1 << 16 or (text and not re.fullmatch(r"[\w.:-]+", host)):
        raise click.UsageError(f"{endpoint!r} is not an endpoint HOST:PORT")
    return host or "localhost", port


def _split(text: str) -> tuple[str, str, str]:
    host, separator, port = text.rpartition(":")
    return (host, separator, port) if separator else (port, "", "")
