"""Aborts break what belongs to the failed epoch and touch nothing else."""

from __future__ import annotations

import os
import select
import socket
import threading

import pytest
from hyperpodrun.inprocess.aborts.abort import Abort, AbortState, Compose
from hyperpodrun.inprocess.aborts.data_loaders import AbortDataLoaders
from hyperpodrun.inprocess.aborts.gloo import AbortGloo, release_connections
from hyperpodrun.protocol.messages import MAX_LISTENERS


def state(*listeners: tuple[str, int]) -> AbortState:
    return AbortState(epoch=1, gloo_listeners=frozenset(listeners), timeout=10.0)


def connected_pair(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    return client, server


def test_gloo_sockets_are_shut_down_and_listeners_and_strangers_live_on():
    with socket.create_server(("127.0.0.1", 0)) as gloo, socket.create_server(("127.0.0.1", 0)) as other:
        mine, strangers = connected_pair(gloo), connected_pair(other)
        unix = socket.socketpair()
        AbortGloo()(state(gloo.getsockname()))
        for end in mine:
            assert end.recv(1) == b"", "shut down"
        strangers[0].send(b"x")
        assert strangers[1].recv(1) == b"x"
        unix[0].send(b"x")
        assert unix[1].recv(1) == b"x"
        again = connected_pair(gloo)  # the listener listens
        for end in (*mine, *strangers, *unix, *again):
            end.close()


def test_a_thread_blocked_in_recv_is_freed():
    with socket.create_server(("127.0.0.1", 0)) as gloo:
        client, server = connected_pair(gloo)
        freed = threading.Event()
        thread = threading.Thread(target=lambda: (client.recv(1), freed.set()))
        thread.start()
        AbortGloo()(state(gloo.getsockname()))
        assert freed.wait(10)
        thread.join()
        client.close()
        server.close()


def test_the_peer_can_go_on_writing_until_every_rank_is_out():
    """A write that failed before the end of the stream was seen would make gloo wait for ever."""
    with socket.create_server(("127.0.0.1", 0)) as gloo:
        client, server = connected_pair(gloo)
        AbortGloo()(state(gloo.getsockname()))
        assert client.recv(1) == b""
        client.close()  # as gloo does, when it has seen the end
        server.sendall(b"late")
        release_connections()
        server.close()


def test_gloo_abort_leaves_no_descriptor_behind():
    with socket.create_server(("127.0.0.1", 0)) as gloo:
        pair = connected_pair(gloo)
        before = len(os.listdir("/proc/self/fd"))
        AbortGloo()(state(gloo.getsockname()))
        release_connections()
        assert len(os.listdir("/proc/self/fd")) == before
        for end in pair:
            end.close()


def test_what_gloo_has_connected_since_is_shut_down_the_next_time():
    with socket.create_server(("127.0.0.1", 0)) as gloo:
        before = len(os.listdir("/proc/self/fd"))
        abort = Compose(AbortGloo())
        first = connected_pair(gloo)
        abort(state(gloo.getsockname()))
        second = connected_pair(gloo)
        for _ in range(3):
            abort.again(state(gloo.getsockname()))
        for end in (*first, *second):
            assert end.recv(1) == b"", "shut down"
        assert len(os.listdir("/proc/self/fd")) == before + 8, "each is held once"
        release_connections()
        for end in (*first, *second):
            end.close()


def test_compose_runs_the_last_listed_first_and_goes_on_past_errors():
    order: list[str] = []

    class Named(Abort):
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, state: AbortState) -> None:
            order.append(self.name)
            if self.name == "second":
                raise ValueError("second failed")

    with pytest.raises(RuntimeError, match="second failed"):
        Compose(Named("first"), Compose(Named("second"), Named("third")))(state())
    assert order == ["third", "second", "first"]


def test_killed_data_loader_workers_raise_nothing_in_the_main_thread():
    import torch

    class Slow(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int):
            threading.Event().wait(3600 if index >= 4 else 0)
            return index

    iterator = iter(torch.utils.data.DataLoader(Slow(), num_workers=2, batch_size=1))
    next(iterator)
    workers = list(iterator._workers)
    AbortDataLoaders()(state())
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == -9
    del iterator  # would take seconds with live, busy workers


def test_torch_still_has_what_the_data_loader_abort_relies_on():
    from torch.utils.data import dataloader

    assert hasattr(dataloader, "_MultiProcessingDataLoaderIter")
    assert callable(dataloader._utils.signal_handling._remove_worker_pids)


@pytest.mark.parametrize("here", [False, True], ids=["several nodes", "one node, a list that is cut"])
def test_a_connection_to_another_nodes_listener_is_known_by_the_event_loop_it_shares_with_ones_own(
    here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is told of its own node's listeners only, of the others there can be any number; and of so many."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4" if here else "2")
    told = [("127.0.0.2", port) for port in range(1, MAX_LISTENERS)] if here else []
    with socket.create_server(("127.0.0.1", 0)) as own, socket.create_server(("127.0.0.1", 0)) as elsewhere:
        dialled, strangers = connected_pair(elsewhere), connected_pair(elsewhere)
        with select.epoll() as loop, select.epoll() as another:
            loop.register(own)
            loop.register(dialled[0])
            another.register(strangers[0])
            AbortGloo()(state(own.getsockname(), *told))
            assert dialled[0].recv(1) == b"", "shut down"
            strangers[1].send(b"x")
            assert strangers[0].recv(1) == b"x"
            again = connected_pair(own)  # the listener listens
        release_connections()
        for end in (*dialled, *strangers, *again):
            end.close()
