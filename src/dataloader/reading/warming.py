"""Which rank gives which of its batches to whom, when caches are cold: decided here, with no process group or file.

A node that replaces another one has an empty cache, and its producer must import, open the user's dataset and make the
first batch. Ranks of other nodes that read the same stream, pipeline-parallel ones, have these batches already. Every
rank of the group tells what it has (`Report`); from the same reports everybody draws the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from ...protocol.dataloader import Position

MOST_BATCHES = 16
MOST_BYTES = 128 << 20
"""What takes longer to carry, at the 100 MB/s of a slow network, than a producer takes to import torch and to make a
batch is not worth carrying. benchmarks/dataloader.py shows both."""


class Report(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one rank wants, and has. Ranks with equal `stream`, `digest`, `seed` and `asked` want the same batches."""

    stream: str
    digest: str
    seed: int
    asked: tuple[int | None, int]
    """(epoch, index) of the batch; epoch None: counted over all epochs."""
    place: Position | None
    """Where that is; None while this rank does not know."""
    sizes: tuple[int, ...]
    """Bytes of the batches that lie ready from there on, in one epoch; empty where the cache is cold."""


@dataclass(frozen=True)
class Transfer:
    """`source` gives `count` batches from `place` on to `target`; both are ranks of the group."""

    source: int
    target: int
    place: Position
    count: int


def plan(reports: Sequence[Report]) -> tuple[Transfer, ...]:
    """What is to be carried, in the order in which everybody does it. Holders take turns."""
    holders: dict[tuple[object, ...], list[int]] = {}
    for rank, report in enumerate(reports):
        if report.sizes and report.place is not None:
            holders.setdefault(_wish(report), []).append(rank)
    transfers: list[Transfer] = []
    for rank, report in enumerate(reports):
        have = holders.get(_wish(report), [])
        if report.sizes or not have:
            continue
        source = have[len(transfers) % len(have)]
        place, count = reports[source].place, _worth_carrying(reports[source].sizes)
        if count and place is not None:
            transfers.append(Transfer(source, rank, place, count))
    return tuple(transfers)


def _wish(report: Report) -> tuple[object, ...]:
    return report.stream, report.digest, report.seed, report.asked


def _worth_carrying(sizes: Sequence[int]) -> int:
    total, count = 0, 0
    for size in sizes[:MOST_BATCHES]:
        total += size
        if total > MOST_BYTES:
            break
        count += 1
    return count
