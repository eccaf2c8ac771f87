"""What the producer decides, driven by random events: no batch is lost, made in vain for ever, or kept without end."""

from __future__ import annotations

from hyperpodrun.dataloader.preparing.window import Limits, Window
from hypothesis import given, settings
from hypothesis import strategies as st

Position = tuple[int, int]


class Simulation:
    """The rest of the producer: makes what is asked for, in any order, and keeps what is there."""

    def __init__(self, limits: Limits, length: int) -> None:
        self.window = Window(limits)
        self.length = length
        self.making: list[Position] = []
        self.files: set[Position] = set()
        self.readers: dict[int, Position] = {}
        self.window.begin((0, 0), set())

    def dispatch(self, most: int = 4) -> None:
        while len(self.making) < most:
            position = self.window.next_wanted()
            if position is None:
                break
            if position[1] >= self.length:
                self.window.ended(position[0], self.length)
                continue
            self.window.asked(position)
            self.making.append(position)
        self.clean()

    def clean(self) -> None:
        for position in self.window.take_removals():
            self.files.discard(position)

    def finish(self, which: int) -> None:
        if self.making:
            position = self.making.pop(which % len(self.making))
            self.files.add(position)
            if not self.window.ready(position):
                self.files.remove(position)
            self.clean()

    def lose(self, which: int) -> None:
        if self.making:
            self.window.lost(self.making.pop(which % len(self.making)))

    def read(self, reader: int) -> bool:
        """The next batch, if it may be read: then its file must be there."""
        position = self.readers[reader]
        if position[1] >= self.length:
            position = (position[0] + 1, 0)
        if position >= self.window.until:
            self.readers[reader] = position
            return False
        assert position in self.files, (position, self.window.until, sorted(self.files))
        self.readers[reader] = (position[0], position[1] + 1)
        self.window.advance(reader, self.readers[reader])
        self.clean()
        return True

    def seek(self, reader: int, position: Position) -> None:
        self.readers[reader] = position
        self.window.seek(reader, position)
        self.clean()

    def check(self) -> None:
        limits = self.window.limits
        held = sorted(self.files)
        if self.readers:
            slowest = min(self.readers.values())
            ahead = [position for position in held if position >= slowest]
            assert len(ahead) <= limits.prefetch + 1  # the slowest may stand at the end of an epoch
            assert len(held) - len(ahead) <= limits.lookback + limits.prefetch  # less what is still being made behind


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("finish"), st.integers(0, 5)),
        st.tuples(st.just("finish"), st.integers(0, 5)),
        st.tuples(st.just("lose"), st.integers(0, 5)),
        st.tuples(st.just("read"), st.integers(0, 2)),
        st.tuples(st.just("read"), st.integers(0, 2)),
        st.tuples(st.just("read"), st.integers(0, 2)),
        st.tuples(st.just("seek"), st.integers(0, 2), st.integers(0, 3), st.integers(0, 6)),
        st.tuples(st.just("leave"), st.integers(0, 2)),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(EVENTS, st.integers(1, 6), st.integers(0, 4), st.integers(1, 7))
def test_any_sequence_of_events_keeps_the_promises_and_ends_well(events, prefetch, lookback, length):
    simulation = Simulation(Limits(prefetch, lookback), length)
    for event in events:
        match event:
            case ("finish", which):
                simulation.finish(which)
            case ("lose", which):
                simulation.lose(which)
            case ("read", reader):
                if reader in simulation.readers:
                    simulation.read(reader)
            case ("seek", reader, epoch, index):
                simulation.seek(reader, (epoch, index % length))
            case ("leave", reader):
                if simulation.readers.pop(reader, None) is not None:
                    simulation.window.leave(reader)
                    simulation.clean()
        simulation.dispatch()
        simulation.check()
    # Whatever has happened: a reader that goes on gets every batch, in order.
    for reader in list(simulation.readers):
        if reader:
            del simulation.readers[reader]
            simulation.window.leave(reader)
    if 0 not in simulation.readers:
        simulation.seek(0, (1, 0))
    for _ in range(3 * length):
        for _ in range(200):
            if simulation.read(0):
                break
            simulation.dispatch()
            simulation.finish(0)
        else:
            raise AssertionError(f"{simulation.readers[0]} is never ready")


def ready(window: Window, count: int) -> None:
    for _ in range(count):
        position = window.next_wanted()
        assert position is not None
        window.asked(position)
        window.ready(position)


def test_the_slowest_reader_holds_the_window():
    window = Window(Limits(prefetch=3, lookback=1))
    window.begin((0, 0), set())
    window.seek(1, (0, 0))
    window.seek(2, (0, 0))
    ready(window, 3)
    assert window.next_wanted() is None
    window.advance(1, (0, 3))
    assert window.next_wanted() is None
    window.advance(2, (0, 2))
    ready(window, 2)
    assert window.next_wanted() is None
    assert window.take_removals() == [(0, 0)]
    window.leave(2)
    assert window.anchor == (0, 3)


def test_a_reader_that_goes_back_within_the_lookback_finds_its_batches():
    window = Window(Limits(prefetch=3, lookback=2))
    window.begin((0, 10), set())
    window.seek(1, (0, 10))
    ready(window, 3)
    window.advance(1, (0, 12))
    window.seek(2, (0, 11))
    assert window.until == (0, 13)
    assert window.take_removals() == []


def test_a_reader_that_goes_further_back_gets_the_stream_from_there():
    window = Window(Limits(prefetch=3, lookback=0))
    window.begin((0, 10), set())
    window.seek(1, (0, 10))
    ready(window, 3)
    window.seek(1, (0, 4))
    assert window.take_removals() == [(0, 10), (0, 11), (0, 12)]
    assert window.next_wanted() == (0, 4)


def test_batches_after_a_checkpoint_are_kept_until_the_next():
    window = Window(Limits(prefetch=2, lookback=2, checkpoint_frequency=5), length=100)
    window.begin((0, 0), set())
    window.seek(1, (0, 0))
    gone = set()
    for step in range(12):
        ready(window, 1 if step else 2)
        window.advance(1, (0, step + 1))
        gone |= set(window.take_removals())
        if step == 8:
            assert {(0, 5), (0, 6)} & gone == set()
    assert {(0, 5), (0, 6)} <= gone
    window.seek(1, (0, 10))
    assert window.until > (0, 11)


def test_without_room_what_is_behind_goes_first_and_then_the_reader_is_told():
    window = Window(Limits(prefetch=3, lookback=2))
    window.begin((0, 0), set())
    window.seek(1, (0, 0))
    ready(window, 3)
    window.advance(1, (0, 1))
    window.asked((0, 3))
    assert window.no_room((0, 3)) is None  # two lie ready: wait
    assert window.next_wanted() is None
    window.advance(1, (0, 3))
    assert window.next_wanted() == (0, 3)  # one behind has gone
    window.asked((0, 3))
    assert window.no_room((0, 3)) is None  # the others behind go
    assert window.take_removals() == [(0, 0), (0, 1), (0, 2)]
    assert window.next_wanted() == (0, 3)
    window.asked((0, 3))
    assert window.no_room((0, 3)) == (0, 3)
    assert window.failed((0, 3))
    assert window.until == (0, 4)
    window.seek(1, (0, 3))  # asked for again
    assert window.next_wanted() == (0, 3)


def test_a_new_producer_uses_the_run_of_files_around_the_position():
    window = Window(Limits(prefetch=4, lookback=2))
    present = {(0, index) for index in (1, 2, 4, 5, 6, 7, 8, 9, 10, 14)}
    window.begin((0, 6), present)
    window.seek(1, (0, 6))
    assert sorted(window.take_removals()) == [(0, 1), (0, 2), (0, 10), (0, 14)]
    assert window.until == (0, 10)
    assert window.next_wanted() is None


def test_without_room_from_the_beginning_the_batch_that_is_waited_for_is_given_up():
    window = Window(Limits(prefetch=3, lookback=2))
    window.begin((0, 0), set())
    window.seek(1, (0, 0))
    for index in (0, 1):
        window.asked((0, index))
    assert window.no_room((0, 0)) is None  # another one is being made
    assert window.no_room((0, 1)) == (0, 0)


def test_a_later_batch_gives_way_to_the_one_that_is_waited_for():
    window = Window(Limits(prefetch=3, lookback=2))
    window.begin((0, 7), set())
    window.seek(1, (0, 7))
    for index in (7, 8):
        window.asked((0, index))
    assert window.no_room((0, 7)) is None
    assert window.ready((0, 8))
    assert window.next_wanted() == (0, 7)
    window.asked((0, 7))
    assert window.no_room((0, 7)) is None
    assert window.take_removals() == [(0, 8)]
    assert window.next_wanted() == (0, 7)
