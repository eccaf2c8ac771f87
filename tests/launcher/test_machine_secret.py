"""The secret of a user on one machine: made once, read by its user alone, and nothing that others lay there is used."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from hyperpodrun.launcher import machine_secret
from hyperpodrun.rendezvous.keys import derive_keys


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Two places, and the user's directory in each."""
    found = [tmp_path / "first", tmp_path / "second"]
    for place in found:
        place.mkdir()
    monkeypatch.setattr(machine_secret, "PLACES", tuple(map(str, found)))
    return [place / f"hyperpodrun-{os.geteuid()}" for place in found]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_made_on_first_use_for_its_user_alone_whatever_the_umask(places: list[Path]) -> None:
    before = os.umask(0)
    try:
        secret = machine_secret.machine_secret()
    finally:
        os.umask(before)
    assert (mode(places[0]), mode(places[0] / "secret")) == (0o700, 0o600)
    assert list(places[0].iterdir()) == [places[0] / "secret"]
    assert len(secret) == 64
    assert machine_secret.machine_secret() == secret
    assert derive_keys(secret, "job") == derive_keys(machine_secret.machine_secret(), "job")


def test_agents_that_start_at_once_have_the_same(places: list[Path]) -> None:
    found: list[bytes] = []
    gate = threading.Barrier(8)

    def read() -> None:
        gate.wait(10)
        found.append(machine_secret.machine_secret())

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 8
    assert len(set(found)) == 1


def _open_to_others(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o755)


def _link(directory: Path) -> None:
    (directory.parent / "elsewhere").mkdir(mode=0o700)
    directory.symlink_to("elsewhere")


def _readable_file(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    (directory / "secret").write_text("x" * 64)
    (directory / "secret").chmod(0o644)


def _linked_file(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    (directory / "secret").symlink_to("/etc/hostname")


def _empty_file(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    (directory / "secret").touch(mode=0o600)


def _pipe(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    os.mkfifo(directory / "secret", 0o600)


@pytest.mark.parametrize(
    "lay",
    [_open_to_others, _link, _readable_file, _linked_file, _empty_file, _pipe, Path.touch],
    ids=lambda f: f.__name__,
)
def test_what_others_could_have_laid_there_is_not_used(places: list[Path], lay) -> None:
    lay(places[0])
    secret = machine_secret.machine_secret()
    assert secret == (places[1] / "secret").read_bytes()


def test_a_directory_of_another_user_is_not_used(places: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.geteuid() + 1
    theirs = [place.with_name(f"hyperpodrun-{uid}") for place in places]
    theirs[0].mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    with pytest.raises(OSError, match="not a directory of this user alone"):
        machine_secret.machine_secret()
