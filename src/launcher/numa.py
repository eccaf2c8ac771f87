"""`--numa-binding`: which cores each worker may run on. torch's modes and rules, from NVML and /sys, without torch.

node: the cores of the NUMA node its GPU is at. socket: those of all NUMA nodes of that socket. exclusive: an equal
share of the node's physical cores, none used by two workers. core-complex: the cores of one last-level cache.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import click


class Topology:
    """The machine as /sys shows it, limited to the cores that this process may use."""

    def __init__(self, gpu_addresses: list[str], sys: Path = Path("/sys"), allowed: set[int] | None = None) -> None:
        self._sys = sys
        self._allowed = os.sched_getaffinity(0) if allowed is None else allowed
        self._nodes = [self._node_of(address) for address in gpu_addresses]

    def cores(self, mode: str, gpu: int) -> set[int]:
        """The cores for the worker that uses GPU number `gpu`. Raises click.UsageError if there are none."""
        if gpu >= len(self._nodes):
            raise click.UsageError(f"--numa-binding: there is no GPU for local rank {gpu}")
        modes = {
            "node": self._node, "socket": self._socket, "exclusive": self._exclusive, "core-complex": self._complex
        }  # fmt: skip
        cores = modes[mode](gpu)
        if not cores:
            raise click.UsageError(f"--numa-binding {mode}: this process may use no core near GPU {gpu}")
        return cores

    def _node(self, gpu: int) -> set[int]:
        return self._of_node(self._nodes[gpu])

    def _socket(self, gpu: int) -> set[int]:
        socket = self._socket_of(self._nodes[gpu])
        nodes = parse_cores(self._read("devices/system/node/possible"))
        return {core for node in nodes if self._socket_of(node) == socket for core in self._of_node(node)}

    def _exclusive(self, gpu: int) -> set[int]:
        physical = _grouped(self._node(gpu), lambda core: min(self._cpu(core, "topology/thread_siblings_list")))
        place, number = self._place(gpu)
        share, extra = divmod(len(physical), number)
        if share < 1:
            raise click.UsageError(f"--numa-binding exclusive: {number} GPUs share {len(physical)} cores")
        first = place * share + min(place, extra)
        taken = [physical[key] for key in sorted(physical)][first : first + share + (place < extra)]
        return set().union(*taken)

    def _complex(self, gpu: int) -> set[int]:
        caches = _grouped(self._node(gpu), lambda core: min(self._last_level_cache(core)))
        ordered = sorted(caches.items(), key=lambda item: (-len(item[1]), item[0]))
        return ordered[self._place(gpu)[0] % len(ordered)][1] if ordered else set()

    def _place(self, gpu: int) -> tuple[int, int]:
        """Which of its NUMA node's GPUs this one is, and of how many."""
        neighbours = [other for other, node in enumerate(self._nodes) if node == self._nodes[gpu]]
        return neighbours.index(gpu), len(neighbours)

    def _last_level_cache(self, core: int) -> set[int]:
        """The cores that share the highest level of cache with this one."""
        best: tuple[int, set[int]] = (-1, {core})
        for index in sorted((self._sys / f"devices/system/cpu/cpu{core}/cache").glob("index[0-9]*")):
            if (index / "type").read_text().strip() in ("Unified", "Data"):
                level = int((index / "level").read_text())
                if level > best[0]:
                    best = level, parse_cores((index / "shared_cpu_list").read_text())
        return best[1]

    def _node_of(self, address: str) -> int:
        # A machine with one NUMA node often says -1.
        return max(int(self._read(f"bus/pci/devices/{address}/numa_node")), 0)

    def _of_node(self, node: int) -> set[int]:
        return parse_cores(self._read(f"devices/system/node/node{node}/cpulist")) & self._allowed

    def _socket_of(self, node: int) -> int:
        core = min(self._of_node(node), default=None)
        return -1 if core is None else int(self._read(f"devices/system/cpu/cpu{core}/topology/physical_package_id"))

    def _cpu(self, core: int, file: str) -> set[int]:
        return parse_cores(self._read(f"devices/system/cpu/cpu{core}/{file}"))

    def _read(self, file: str) -> str:
        try:
            return (self._sys / file).read_text()
        except OSError as error:
            raise click.UsageError(f"--numa-binding: {error.filename}: {error.strerror}") from None


def bind(mode: str, workers: int) -> tuple[str, ...]:
    """The cores of every local rank, as numactl takes them. Raises click.UsageError where that cannot be had."""
    if shutil.which("numactl") is None:
        raise click.UsageError("--numa-binding needs the command numactl, which is not installed")
    topology = Topology(_gpu_addresses())
    return tuple(format_cores(topology.cores(mode, rank)) for rank in range(workers))


def parse_cores(text: str) -> set[int]:
    """`0-2,4` as in /sys."""
    cores: set[int] = set()
    for item in filter(None, (item.strip() for item in text.split(","))):
        first, _, last = item.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def format_cores(cores: Iterable[int]) -> str:
    """The opposite: `0-2,4`."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _grouped(cores: Iterable[int], key: Callable[[int], int]) -> dict[int, set[int]]:
    groups: dict[int, set[int]] = {}
    for core in cores:
        groups.setdefault(key(core), set()).add(core)
    return groups


def _gpu_addresses() -> list[str]:
    """PCI addresses of the GPUs that workers see, in order, as /sys names them."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise click.UsageError(f"--numa-binding needs GPUs, and NVML finds none: {error}") from None
    try:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        if chosen is None:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        else:
            handles = [_handle(name.strip()) for name in chosen.split(",") if name.strip()]
        buses = [pynvml.nvmlDeviceGetPciInfo(handle) for handle in handles]
        return [f"{bus.domain:04x}:{bus.bus:02x}:{bus.device:02x}.0" for bus in buses]
    except pynvml.NVMLError as error:
        raise click.UsageError(f"--numa-binding: NVML does not know the GPUs of this node: {error}") from None
    finally:
        pynvml.nvmlShutdown()


def _handle(name: str) -> object:
    import pynvml

    if name.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name.encode())
