"""Are the numbers of a run with faults those of the run without? Many runs, seeded, every one compared bit for bit.

    scripts/bench exactness [--runs 200] [--first SEED] [--hsdp] [--at-once 2]

Each run has one to three faults of random kind, rank and moment: in the forward pass, in the middle of the bucketed
all-reduce, between it and the optimizer, inside the optimizer's step, after it, at the end of the pass, and during the
restore that an earlier fault made necessary (who receives dies, who sends dies, on either way the bytes may take).
With --hsdp the model is sharded over pairs and every shard is held twice.
A run fails that ends otherwise than the undisturbed one, has state from elsewhere than the memory of the training
processes, or in which not every fault has fired.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

WORKERS = Path(__file__).parents[1] / "tests" / "checkpointless" / "workers"
KINDS = ("raise", "kill", "exit")
MOMENTS = ("forward", "allreduce", "before", "begin", "inside", "after", "between")
RESTORE_MOMENTS = ("restore", "receiving", "sending", "source")
WORLD_SIZE = 4
STEPS = 12
ACCUMULATE = "--accumulate=3"
HSDP_STEPS = 10
NO_REPLICAS_OF_EACH_OTHER = ("0", "1", "2", "3", "0+1", "0+3", "1+2", "2+3")


@dataclass(frozen=True)
class Plan:
    """One run: its worker with its options, and its faults in order."""

    worker: str
    options: tuple[str, ...]
    faults: tuple[str, ...]
    world_size: int = WORLD_SIZE

    @property
    def undisturbed(self) -> Plan:
        """The run to compare with: what does not matter for the numbers is left out."""
        matter = ("--accumulate", "--steps", "--zero")
        options = tuple(option for option in self.options if option.startswith(matter))
        return Plan(self.worker, options, (), self.world_size)

    def __str__(self) -> str:
        return " ".join((f"{self.world_size} {self.worker}", *self.options, *self.faults))


def plan(seed: int) -> Plan:
    """The faults of a seed for data parallel training. Never so many at once that nobody would hold the state."""
    dice = random.Random(seed)
    options = [option for option in ("--rebuild", "--checksum", ACCUMULATE, "--stream") if dice.random() < 0.3]
    faults: list[str] = []
    for step in _rising_steps(dice, 3 if ACCUMULATE in options else 1):
        if faults and _leaves_a_receiver(faults[-1]) and dice.random() < 0.4:
            faults.append(_in_the_restore(dice, faults[-1], "--stream" in options))
        else:
            faults.append(f"{dice.choice(KINDS)}:{dice.randrange(WORLD_SIZE)}:{step}:{dice.choice(MOMENTS)}")
    return Plan("exact.py", (f"--steps={STEPS}", *options), tuple(faults))


def plan_hsdp(seed: int) -> Plan:
    """The same for HSDP 2x2; two ranks may be lost at once if another one has the shard of each."""
    dice = random.Random(seed)
    options = [option for option in ("--offload",) if dice.random() < 0.3]
    faults = [
        f"{dice.choice(('raise', 'kill'))}:{dice.choice(NO_REPLICAS_OF_EACH_OTHER)}:{step}:"
        f"{dice.choice(('forward', 'before', 'inside', 'between'))}"
        for step in _rising_steps(dice, 1)
    ]
    return Plan("hsdp.py", (f"--steps={HSDP_STEPS}", "--rollback", *options), tuple(faults))


def _rising_steps(dice: random.Random, window: int) -> list[int]:
    """One to three passes, each after the one before it; the last pass of an accumulation window, which updates.

    Not the very first pass: with two faults in the restores after it the job would be one that makes no progress.
    """
    windows = sorted(dice.sample(range(STEPS // window - 2), dice.randint(1, 2 if window > 1 else 3)))
    return [(number + 1) * window - 1 + (window == 1) for number in windows]


def _leaves_a_receiver(fault: str) -> bool:
    """Whether its rank has lost its state for sure, and all others have theirs, so that the next restore is known."""
    kind, _, _, moment = fault.split(":")
    return kind != "raise" and (moment in MOMENTS or moment == "receiving")


def _in_the_restore(dice: random.Random, before: str, stream: bool) -> str:
    """A fault in the restore after the fault `before`: of the rank that receives, or of the lowest, which gives."""
    receiver = int(before.split(":")[1])
    giver = 1 if receiver == 0 else 0
    moment = dice.choice(("restore", "sending") if stream else ("restore", "receiving", "source"))
    kind = "kill" if moment == "source" else dice.choice(KINDS)
    rank = giver if moment == "sending" else receiver if moment != "restore" else dice.choice((giver, receiver))
    return f"{kind}:{rank}::{moment}"


@dataclass(frozen=True)
class Ended:
    """A run that is over."""

    exit_code: int
    digest: str | None
    fired: int
    recoveries: tuple[dict[str, object], ...]
    stderr: str

    def wrong(self, wanted: Plan, digest: str | None) -> str | None:
        """What is not as it should be."""
        if self.exit_code or self.digest is None:
            return f"exit code {self.exit_code}"
        if digest is None or self.digest != digest:
            return f"it ends with {self.digest}, the undisturbed run with {digest}"
        if self.fired != len(wanted.faults):
            return f"{self.fired} of {len(wanted.faults)} faults have fired"
        for row in self.recoveries:
            if row.get("state") not in (None, "memory"):
                return f"state from {row['state']}"
        return None


def launch(wanted: Plan) -> Ended:
    """One job under hyperpodrun."""
    words = [word for fault in wanted.faults for word in ("--fault", fault)]
    with tempfile.TemporaryDirectory() as logs:
        finished = subprocess.run(
            [
                *(sys.executable, "-m", "hyperpodrun", f"--nproc-per-node={wanted.world_size}", "--inprocess-restart"),
                *(f"--log-dir={logs}", str(WORKERS / wanted.worker), *wanted.options, *words),
            ],
            capture_output=True,
            text=True,
            timeout=300,
        )
        rows = Path(logs) / "recoveries.jsonl"
        recoveries = tuple(json.loads(line) for line in rows.read_text().splitlines()) if rows.exists() else ()
    digests = [line.split()[1] for line in finished.stdout.splitlines() if line.startswith("digest ")]
    return Ended(
        finished.returncode,
        digests[0] if len(digests) == 1 else None,
        len({line.split()[1] for line in finished.stderr.splitlines() if line.startswith("fault ")}),
        recoveries,
        finished.stderr,
    )


class Runs:
    """Jobs, so many at the same time; what has been begun once is not run again."""

    def __init__(self, at_once: int) -> None:
        self._pool = ThreadPoolExecutor(at_once)
        self._begun: dict[Plan, Future[Ended]] = {}

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, wanted: Plan) -> Future[Ended]:
        """This one, and the undisturbed run that it will be compared with."""
        for plan in (wanted.undisturbed, wanted):
            if plan not in self._begun:
                self._begun[plan] = self._pool.submit(launch, plan)
        return self._begun[wanted]

    def ended(self, wanted: Plan) -> Ended:
        return self.begin(wanted).result()

    def wrong(self, wanted: Plan) -> str | None:
        """None if the run ends like the undisturbed one, else what happened."""
        ended = self.ended(wanted)
        wrong = ended.wrong(wanted, self.ended(wanted.undisturbed).digest)
        return None if wrong is None else f"{wanted}: {wrong}\n{ended.stderr[-4000:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Bit for bit: runs with faults beside runs without.")
    parser.add_argument("--runs", type=int, default=25, help="about seven seconds each (default: 25)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--hsdp", action="store_true", help="FSDP2, sharded over pairs, every shard twice")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="so many runs at the same time")
    args = parser.parse_args()
    make, failed, began = plan_hsdp if args.hsdp else plan, 0, time.monotonic()
    plans = {seed: make(seed) for seed in range(args.first, args.first + args.runs)}
    with Runs(args.at_once) as runs:
        for wanted in plans.values():
            runs.begin(wanted)
        for seed, wanted in plans.items():
            wrong = runs.wrong(wanted)
            if wrong is not None:
                failed += 1
                print(f"seed {seed}, {wrong}", flush=True)
    moments = Counter(fault.split(":")[3] for wanted in plans.values() for fault in wanted.faults)
    print("faults:", ", ".join(f"{count} {moment}" for moment, count in moments.most_common()))
    print(
        f"{args.runs - failed} of {args.runs} runs bit for bit equal, none of them through snapshot or disk, "
        f"in {time.monotonic() - began:.0f} s"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
