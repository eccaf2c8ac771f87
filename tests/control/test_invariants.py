"""Whatever happens, in whatever order, the rules of the design hold: random sequences of events.

The rules themselves are in `simulated_workers.py`. Hypothesis looks for short sequences that break one and shrinks
them; `test_long_lives` goes further from the beginning than Hypothesis would.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.job.state import JobConfig
from hyperpodrun.control.job.state import Phase as JobPhase
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from simulated_workers import Worker, World

EXIT_CODES = [-9, -9, -11, -15, 0, 1, 3, 143]
OPTIONS: dict[str, list[Any]] = {
    "world_size": [1, 2, 2, 3, 3, 4],
    "in_process": [True, True, True, True, False],
    "max_restarts": [0, 1, 3],
    "max_inprocess_restarts": [None, None, None, 0, 2],
    "shutdown_timeout": [0.0, 30.0, 30.0],
    "stall_limit": [3, 20, 20, 1],
    "pre_train": [False, False, True],
    "post_train": [False, True],
}

RANKS = st.integers(0, 3)
CONFIGS = st.builds(JobConfig, **{name: st.sampled_from(values) for name, values in OPTIONS.items()})


class Chaos:
    """What can be done to a world. Ranks are taken modulo the world size."""

    def __init__(self, config: JobConfig) -> None:
        self.world = World(config)

    def everybody_acts(self, *, go_on: bool) -> None:
        if self.world.hook:
            self.world.tell(ev.HookEnded(0))
        for worker in list(self.world.workers.values()):
            self.act(worker, go_on=go_on)
        self.world.deliver_all()

    def act(self, worker: Worker, *, healthy: bool = True, go_on: bool = True) -> None:
        worker.act(healthy=healthy, wrapped=self.world.config.in_process, go_on=go_on)

    def one_acts(self, rank: int, *, healthy: bool, go_on: bool, heard: bool) -> None:
        worker = self.worker(rank)
        if worker is not None:
            self.act(worker, healthy=healthy, go_on=go_on)
            if heard:
                self.hear_out(worker)

    def user_code_raises(self, rank: int, *, consequence: bool, heard: bool) -> None:
        worker = self.worker(rank)
        if worker is not None:
            worker.fault(consequence=consequence)
            if heard:
                self.hear_out(worker)

    def processes_die(self, ranks: set[int], code: int, heard: str) -> None:
        found = [self.worker(rank) for rank in sorted(ranks)]
        dying = [worker for worker in found if worker is not None and worker.alive]
        for worker in dying:
            worker.die(code)
        for worker in dying:
            if heard == "now":
                self.hear_out(worker)
            elif heard == "first":
                self.world.deliver(worker, exit_first=True)

    def one_message_arrives(self, rank: int) -> None:
        worker = self.worker(rank)
        if worker is not None:
            self.world.deliver(worker)

    def a_message_is_lost(self, rank: int) -> None:
        """Not a death, which the kernel tells. An arrival only where a deadline makes up for it."""
        worker = self.worker(rank)
        kept = ev.Exited if self.world.job.phase is JobPhase.RECOVERING else ev.Exited | ev.Arrived
        if worker is not None and worker.outbox and not isinstance(worker.outbox[0], kept):
            worker.outbox.popleft()

    def a_message_arrives_again(self, back: int) -> None:
        delivered = self.world.delivered
        if delivered:
            self.world.repeat(delivered[-1 - back % len(delivered)])

    def somebody_who_is_not_there_speaks(self, rank: int, incarnation: int, epoch: int, kind: int) -> None:
        worker = self.world.workers.get(rank)
        lives = worker is not None and worker.incarnation == incarnation and rank not in self.world.gone
        if lives and (kind in (0, 5) or epoch >= worker.epoch):
            return  # that could be itself
        self.world.tell_stale(
            [
                ev.Attached(rank, incarnation, 1.0),
                ev.Arrived(rank, incarnation, epoch, 1, 1000),
                ev.Faulted(rank, incarnation, epoch, "a ghost"),
                ev.Stepped(rank, incarnation, epoch, 1000),
                ev.Completed(rank, incarnation, epoch),
                ev.Exited(rank, incarnation, 0),
            ][kind]
        )

    def the_timer_fires_early(self) -> None:
        deadline = self.world.job.next_deadline()
        if deadline is None or deadline > self.world.now:
            self.world.repeat(ev.TimePassed())

    def finish(self) -> None:
        """The job comes to an end or to an epoch once everybody behaves, and it can be replayed."""
        self.world.behave()
        self.world.replay()

    def worker(self, rank: int) -> Worker | None:
        return self.world.workers.get(rank % self.world.config.world_size)

    def hear_out(self, worker: Worker) -> None:
        while worker.outbox:
            self.world.deliver(worker)


class AnythingHappens(RuleBasedStateMachine):
    """Workers act, fail, die, speak late, twice or not at all; the clock jumps; somebody sends signals."""

    chaos: Chaos

    @initialize(config=CONFIGS, start=st.sampled_from(["run", "run", "run", "begin", "nothing"]))
    def launch(self, config: JobConfig, start: str) -> None:
        self.chaos = Chaos(config)
        if start != "nothing":
            self.chaos.world.tell(ev.Begin())
        if start == "run" and config.in_process:
            self.chaos.world.behave()

    @rule(times=st.integers(1, 4), go_on=st.booleans())
    def everybody_acts(self, times: int, go_on: bool) -> None:
        for _ in range(times):
            self.chaos.everybody_acts(go_on=go_on)

    @rule(rank=RANKS, healthy=st.booleans(), go_on=st.booleans(), heard=st.booleans())
    def one_acts(self, rank: int, healthy: bool, go_on: bool, heard: bool) -> None:
        self.chaos.one_acts(rank, healthy=healthy, go_on=go_on, heard=heard)

    @rule(rank=RANKS, consequence=st.booleans(), heard=st.booleans())
    def user_code_raises(self, rank: int, consequence: bool, heard: bool) -> None:
        self.chaos.user_code_raises(rank, consequence=consequence, heard=heard)

    @rule(
        ranks=st.sets(RANKS, min_size=1),
        code=st.sampled_from(EXIT_CODES),
        heard=st.sampled_from(["now", "first", "later"]),
    )
    def processes_die(self, ranks: set[int], code: int, heard: str) -> None:
        self.chaos.processes_die(ranks, code, heard)

    @rule(rank=RANKS)
    def one_message_arrives(self, rank: int) -> None:
        self.chaos.one_message_arrives(rank)

    @rule(rank=RANKS)
    def a_message_is_lost(self, rank: int) -> None:
        self.chaos.a_message_is_lost(rank)

    @rule(back=st.integers(0, 40))
    def a_message_arrives_again(self, back: int) -> None:
        self.chaos.a_message_arrives_again(back)

    @rule(
        rank=st.integers(-1, 4),
        incarnation=st.integers(-1, 12),
        epoch=st.integers(-1, 8),
        kind=st.integers(0, 5),
    )
    def somebody_who_is_not_there_speaks(self, rank: int, incarnation: int, epoch: int, kind: int) -> None:
        self.chaos.somebody_who_is_not_there_speaks(rank, incarnation, epoch, kind)

    @rule(seconds=st.sampled_from([0.0, 0.5, 29.0, 60.0, 700.0]))
    def time_passes(self, seconds: float) -> None:
        self.chaos.world.pass_time(seconds)

    @rule()
    def the_timer_fires_early(self) -> None:
        self.chaos.the_timer_fires_early()

    @rule(signum=st.sampled_from([2, 15]), really=st.sampled_from([False] * 7 + [True]))
    def somebody_stops_the_job(self, signum: int, really: bool) -> None:
        if really:
            self.chaos.world.tell(ev.StopRequested(signum))

    @precondition(lambda self: self.chaos.world.hook)
    @rule(code=st.sampled_from([0, 0, 0, 1, -15]))
    def the_script_ends(self, code: int) -> None:
        self.chaos.world.tell(ev.HookEnded(code))

    def teardown(self) -> None:
        if hasattr(self, "chaos"):
            self.chaos.finish()


TestAnythingHappens = AnythingHappens.TestCase
TestAnythingHappens.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)


@pytest.mark.parametrize("tenth", range(10))
def test_long_lives(tenth: int) -> None:
    for seed in range(tenth * 300, (tenth + 1) * 300):
        try:
            live(random.Random(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error


def live(dice: random.Random) -> None:
    """One job from its beginning to a random point, or to its end."""
    config = JobConfig(**{name: dice.choice(values) for name, values in OPTIONS.items()})
    chaos = Chaos(config)
    chaos.world.tell(ev.Begin())
    calm = dice.random()  # some jobs mostly go on undisturbed, in others everything goes wrong
    for _ in range(dice.randrange(200)):
        if chaos.world.end is not None:
            break
        if dice.random() < calm:
            chaos.everybody_acts(go_on=dice.random() < 0.9)
        else:
            _one_of_everything(chaos, dice)
    chaos.finish()


def _one_of_everything(chaos: Chaos, dice: random.Random) -> None:
    rank, world = dice.randrange(4), chaos.world
    heard = dice.random() < 0.6
    match dice.randrange(40):
        case 0 if dice.random() < 0.3:
            world.tell(ev.StopRequested(dice.choice([2, 15])))
        case 1:
            world.pass_time(dice.choice([0.0, 29.0, 60.0, 700.0]))
        case 2 | 3 | 4:
            world.pass_time(dice.random())
        case 5:
            chaos.the_timer_fires_early()
        case 6 | 7 | 8 | 9:
            chaos.user_code_raises(rank, consequence=dice.random() < 0.5, heard=heard)
        case 10 | 11 | 12:
            chaos.processes_die({rank}, dice.choice(EXIT_CODES), dice.choice(["now", "first", "later"]))
        case 13:
            ranks = {rank, dice.randrange(4), dice.randrange(4)}
            chaos.processes_die(ranks, dice.choice(EXIT_CODES), dice.choice(["now", "first", "later"]))
        case 14:
            chaos.a_message_is_lost(rank)
        case 15 | 16 | 17 | 18:
            chaos.a_message_arrives_again(dice.randrange(60))
        case 19 | 20:
            incarnations = range(-1, len(world.incarnations) + 2)
            epoch = dice.randrange(-1, world.job.next_epoch + 2)
            kind = dice.randrange(6)
            chaos.somebody_who_is_not_there_speaks(rank, dice.choice(incarnations), epoch, kind)
        case 21 if world.hook:
            world.tell(ev.HookEnded(dice.choice([0, 1, -15])))
        case 22 | 23 | 24 | 25 | 26:
            chaos.one_message_arrives(rank)
        case _:
            chaos.one_acts(rank, healthy=dice.random() < 0.8, go_on=dice.random() < 0.9, heard=heard)
