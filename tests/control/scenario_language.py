"""The language of `tests/scenarios/*.txt`: what happens to a job, line by line, and below it its answers.

    # Lines like this are comments.
    config ranks=2 in-process max-restarts=1        # first; the names are those of JobConfig
    config nodes=2 workers=1 max-nodes=2 in-process # on many nodes: so many at first, with so many ranks each
    config nodes=2 roles=trainer,reader             # and roles, in turn

    begin
        open epoch 0
        spawn rank 0: process 0, epoch 0
        spawn rank 1: process 1, epoch 0

    all arrive
        start epoch 0

WHO is `all` (every rank that has a process), `rank 1` or `ranks 1 2`; their events come one after the other.
What they say is about their present process and its epoch, unless the line says otherwise:
`rank 1 (process 0, epoch 0) raises ValueError: boom`.

    begin                               the launcher asks for the job
    hook ends 0 [on 1]                  the running pre- or post-train script ended (negative: by that signal)
    node 2 joins [workers=1] [epoch=7] [role=reader]    a node has become a member
    node 1 lost TEXT                    and is none any more
    nodes agree [quorum=2]              a majority knows who the members are
    node 1 opens 3                      a node has confirmed the number of an epoch
    WHO attach [abort-timeout=5]        a process has reached its first wrapped function
    WHO arrive [step=20] [call=2] [unhealthy]
    WHO arrive [shard=a] [holds=20,19 or holds=,19] [snapshots=0:16,1:16] [disk=10]      with a CheckpointManager
    WHO register SHARD                  the rank has said which shard it holds
    WHO raise TEXT                      user code raised
    WHO feel TEXT                       user code raised because a connection broke: a consequence
    WHO step 21                         the first optimizer step of the epoch is done
    WHO complete [TEXT]                 the wrapped function returned; TEXT: how its loop was left before its end
    WHO wait 2 / WHO go 2               it waits in torch.distributed, or no more; so many had returned when it looked
    WHO exit 3 / WHO killed by signal 9
    WHO condemned TEXT                  the node has found the process unfit
    time passes 60                      seconds; every deadline on the way is kept
    signal 15                           somebody stops the launcher
    state                               show phase, epochs, slots

Verbs may have an `s`. An answer without commands is `nothing`, or `dropped` when the event was stale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from filed import check_files
from hyperpodrun.control.job import causes
from hyperpodrun.control.job import commands as cmd
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.job.job import Job
from hyperpodrun.control.job.places import NodeState
from hyperpodrun.control.job.state import JobConfig
from hyperpodrun.protocol.plan import Holding, Origin, RestorePlan

INDENT = "    "

_LINE = re.compile(r"(?P<who>all|ranks? [\d ]*\d)(?: \((?P<of>[^)]*)\))? (?P<verb>[a-z]+)(?: (?P<rest>.*))?$")
_VERBS = {
    name + s: name
    for name in (
        "attach",
        "arrive",
        "register",
        "raise",
        "feel",
        "refuse",
        "hold",
        "step",
        "complete",
        "wait",
        "go",
        "exit",
    )
    for s in ("", "s")
}
_VERBS |= {"goes": "go", "attaches": "attach", "killed": "killed", "condemned": "condemned"}


class ScenarioError(Exception):
    """A line that is not in the language."""


class Answers(Protocol):
    """A scenario that has begun."""

    def answer(self, line: str) -> list[str]: ...


def play(text: str) -> str:
    """The scenario with the answers that the job gives now."""
    return replay(text, lambda line: Scenario(*_config(line)))


def replay(text: str, begin: Callable[[str], Answers]) -> str:
    """A text with the answers that are given to its lines now; `begin` makes the scenario of the first."""
    scenario: Answers | None = None
    out: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith((" ", "\t")):
            continue  # an answer of an earlier run
        if not line or line.startswith("#"):
            if line or (out and out[-1]):
                out.append(line)
            continue
        try:
            if scenario is None:
                scenario = begin(line)
                out.append(line)
                continue
            answers = scenario.answer(line)
        except (ScenarioError, ValueError, KeyError) as error:
            raise ScenarioError(f"line {number}: {line!r}: {error}") from error
        out += [line, *(INDENT + answer for answer in answers)]
    return "\n".join(out).rstrip() + "\n"


class Scenario:
    """One job, its clock, and the sentences about it."""

    def __init__(self, config: JobConfig, nodes: dict[int, NodeState] | None = None) -> None:
        self.job = Job(config, nodes)
        self.now = 0.0

    def answer(self, line: str) -> list[str]:
        words = line.split()
        match words:
            case ["begin"]:
                return self._tell([ev.Begin()])
            case ["hook", "ends", code]:
                return self._tell([ev.HookEnded(int(code))])
            case ["hook", "ends", code, "on", node]:
                return self._tell([ev.HookEnded(int(code), int(node))])
            case ["node", node, "joins", *options]:
                values = {name: value for name, value in (option.split("=") for option in options)}
                numbers = {name: int(value) for name, value in values.items() if name != "role"}
                role = values.get("role", "default")
                return self._tell([ev.NodeJoined(int(node), **{"workers": 1, **numbers}, role=role)])
            case ["node", node, "lost", *why]:
                return self._tell([ev.NodeLost(int(node), f"node {node} {' '.join(why)}")])
            case ["nodes", "agree", *quorum]:
                return self._tell([ev.NodesAgreed(int(quorum[0].removeprefix("quorum=")) if quorum else 0)])
            case ["node", node, "opens", epoch]:
                return self._tell([ev.Opened(int(node), int(epoch))])
            case ["signal", signum]:
                return self._tell([ev.StopRequested(int(signum))])
            case ["time", "passes", seconds]:
                return self._pass_time(float(seconds))
            case ["state"]:
                return list(self._show())
        return self._tell(list(self._worker_events(line)))

    def _tell(self, events: list[ev.Event]) -> list[str]:
        lines: list[str] = []
        for event in events:
            dropped = self.job.dropped.total()
            lines += [describe(command) for command in self.job.handle(event, self.now)]
            check_files(self.job.state)
            if self.job.dropped.total() > dropped:
                lines.append(f"dropped from rank {event.rank}" if len(events) > 1 else "dropped")  # type: ignore[union-attr]
        return lines or ["nothing"]

    def _pass_time(self, seconds: float) -> list[str]:
        until = self.now + seconds
        lines: list[str] = []
        while (deadline := self.job.next_deadline()) is not None and deadline <= until:
            self.now = max(self.now, deadline)
            lines += [describe(command) for command in self.job.handle(ev.TimePassed(), self.now)]
            if self.job.next_deadline() == deadline:
                raise ScenarioError("a deadline has passed and is still there")
        self.now = until
        return lines or ["nothing"]

    def _worker_events(self, line: str) -> Iterator[ev.Event]:
        parsed = _LINE.match(line)
        if parsed is None or parsed["verb"] not in _VERBS:
            raise ScenarioError("not in the language (see scenario_language.py)")
        of = dict(item.split() for item in parsed["of"].split(", ")) if parsed["of"] else {}
        make = _EVENTS[_VERBS[parsed["verb"]]]
        for rank in self._ranks(parsed["who"]):
            slot = self.job.state.slots[rank] if rank < len(self.job.state.slots) else None
            incarnation = int(of.get("process", slot.incarnation if slot else 0))
            epoch = int(of.get("epoch", slot.epoch if slot else 0))
            yield make(self.job, rank, incarnation, epoch, parsed["rest"] or "")

    def _ranks(self, who: str) -> list[int]:
        if who == "all":
            return [slot.rank for slot in self.job.state.slots if not slot.gone]
        return [int(word) for word in who.split()[1:]]

    def _show(self) -> Iterator[str]:
        state = self.job.state
        yield f"{state.phase.value}, epoch {state.epoch}, next {state.next_epoch}"
        for slot in state.slots:
            due = f", due in {slot.due - self.now:g} s" if slot.due is not None else ""
            where = f" on node {slot.node}" if len(state.nodes) > 1 else ""
            yield f"rank {slot.rank} {slot.state.value}{where}: process {slot.incarnation}, step {slot.step}{due}"
        if state.stop_due is not None:
            yield f"stop due in {state.stop_due - self.now:g} s"


def describe(command: cmd.Command) -> str:
    """One line for one command."""
    match command:
        case cmd.RunHook(name, _, _):
            return f"run the {name}-train script"
        case cmd.Spawn(rank, incarnation, epoch, node, local_rank, layout):
            where = f" on node {node} as {local_rank} of a world of {layout.world_size}" if layout.nodes > 1 else ""
            if layout.role_world_size != layout.world_size:
                where += f", {layout.role_rank + local_rank} of {layout.role_world_size} of its role"
            return f"spawn rank {rank}{where}: process {incarnation}, epoch {epoch}"
        case cmd.Kill(rank, incarnation, reason, _, _):
            return f"kill rank {rank}: process {incarnation}, {reason}"
        case cmd.StopWorkers(signum):
            return f"stop workers with {'the shutdown signal' if signum is None else f'signal {int(signum)}'}"
        case cmd.OpenEpoch(epoch):
            owners = command.owners
            return f"open epoch {epoch}" + (f" on nodes {', '.join(map(str, owners))}" if len(owners) > 1 else "")
        case cmd.FailEpoch(epoch, cause, _):
            return f"fail epoch {epoch}: {_why(cause)}"
        case cmd.StartEpoch(epoch, plan, cause, _, _):
            parts = [f"start epoch {epoch}"]
            if plan is not None:
                parts.append(_describe_plan(plan))
            if cause is not None:
                parts.append(f"after {_why(cause)}")
            return "; ".join(parts)
        case cmd.FinishEpoch(epoch):
            return f"finish epoch {epoch}"
        case cmd.TellReturned(epoch, returned):
            return f"tell who still runs in epoch {epoch} that {returned} have returned"
        case cmd.RestartProcesses(cause, number, limit):
            return f"restart all processes ({number} of {limit}): {_why(cause)}"
        case cmd.End(exit_code, reason, _, left_behind):
            left = f"; {causes.name_ranks(left_behind)} left behind" if left_behind else ""
            return f"end with exit code {exit_code}: {reason}{left}"


def _describe_plan(plan: RestorePlan) -> str:
    if plan.origin is Origin.START:
        return "nobody holds the state"
    parts: list[str] = []
    if plan.origin is Origin.MEMORY and not plan.transfers and not plan.rollbacks:
        parts.append(f"everybody holds step {plan.target_step}")
    elif plan.origin is Origin.DISK:
        parts.append(f"everybody loads step {plan.target_step} from disk")
    own = [transfer.receiver for transfer in plan.transfers if transfer.source == transfer.receiver]
    if own:
        parts.append(f"{causes.name_ranks(own)} load their snapshot of step {plan.target_step}")
    given: dict[tuple[int, int | None], list[int]] = {}
    for transfer in plan.transfers:
        if transfer.source != transfer.receiver:
            given.setdefault((transfer.source, transfer.owner), []).append(transfer.receiver)
    for (source, owner), receivers in given.items():
        what = "" if owner is None else f"rank {owner}'s snapshot of "
        parts.append(f"rank {source} gives {what}step {plan.target_step} to {causes.name_ranks(receivers)}")
    if plan.rollbacks:
        parts.append(f"{causes.name_ranks(plan.rollbacks)} back to step {plan.target_step}")
    if plan.lost_steps:
        parts.append(f"{plan.lost_steps} steps lost")
    return "; ".join(parts)


def _why(cause: cmd.Cause) -> str:
    return causes.describe(cause) + (" (a consequence)" if cause.consequence else "")


def _config(line: str) -> tuple[JobConfig, dict[int, NodeState] | None]:
    word, *items = line.partition("#")[0].split()
    if word != "config":
        raise ScenarioError("the first line must be `config ranks=N ...`")
    values: dict[str, Any] = {"world_size": 0}
    nodes, workers, roles = 0, 1, ["default"]
    for item in items:
        name, equals, value = item.partition("=")
        if name in ("nodes", "workers"):
            nodes, workers = (int(value), workers) if name == "nodes" else (nodes, int(value))
            continue
        if name == "roles":
            roles = value.split(",")
            continue
        field = "world_size" if name == "ranks" else name.replace("-", "_")
        if field not in JobConfig.__struct_fields__:
            raise ScenarioError(f"JobConfig has no {field}")
        whole = not field.endswith("_timeout")
        values[field] = (int(value) if whole else float(value)) if equals else True
    return JobConfig(**values), {
        node: NodeState(workers, roles[node % len(roles)]) for node in range(nodes)
    } if nodes else None


def _attach(job: Job, rank: int, incarnation: int, epoch: int, rest: str) -> ev.Event:
    timeout = rest.removeprefix("abort-timeout=")
    return ev.Attached(rank, incarnation, float(timeout) if timeout else None)


def _arrive(job: Job, rank: int, incarnation: int, epoch: int, rest: str) -> ev.Event:
    values: dict[str, Any] = {"call": job.state.finished_calls + 1}
    holding: dict[str, Any] = {}
    for item in rest.split():
        name, equals, value = item.partition("=")
        if name in ("step", "call") and equals:
            values[name] = int(value)
        elif name in ("shard", "holds", "snapshots", "disk") and equals:
            holding |= _holding(name, value)
        elif item == "presumed" or name in ("refuses", "torn"):
            holding |= {"presumed": True} if item == "presumed" else _doubt(name, value)
        elif item == "unhealthy":
            values["healthy"] = False
        else:
            raise ScenarioError(f"not an option of `arrive`: {item}")
    if holding:
        values["holding"] = Holding(**holding)
    return ev.Arrived(rank, incarnation, epoch, **values)


def _doubt(name: str, value: str) -> dict[str, Any]:
    return {"torn": value.replace("_", " ")} if name == "torn" else {"refused": (int(value),)}


def _hold(job: Job, rank: int, incarnation: int, epoch: int, rest: str) -> ev.Event:
    step, digest, *group = rest.split()
    return ev.Holds(rank, incarnation, epoch, int(step), {" ".join(group): digest})


def _holding(name: str, value: str) -> dict[str, Any]:
    if name == "shard":
        return {"shard": value or None}
    if name == "holds":
        step, _, kept = value.partition(",")
        return {"step": int(step) if step else None, "kept": int(kept) if kept else None}
    if name == "disk":
        return {"disk": int(value)}
    pairs = [pair.split(":") for pair in value.split(",")]
    return {"snapshots": tuple((int(owner), int(step)) for owner, step in pairs)}


def _killed(job: Job, rank: int, incarnation: int, epoch: int, rest: str) -> ev.Event:
    return ev.Exited(rank, incarnation, -int(rest.removeprefix("by signal ")))


_EVENTS: dict[str, Callable[[Job, int, int, int, str], ev.Event]] = {
    "attach": _attach,
    "arrive": _arrive,
    "killed": _killed,
    "register": lambda job, rank, process, epoch, rest: ev.Registered(rank, process, epoch, rest),
    "raise": lambda job, rank, process, epoch, rest: ev.Faulted(rank, process, epoch, rest, f"Traceback: {rest}"),
    "feel": lambda job, rank, process, epoch, rest: ev.Faulted(rank, process, epoch, rest, "", consequence=True),
    "refuse": lambda job, rank, process, epoch, rest: ev.Faulted(rank, process, epoch, rest, ends_job=True),
    "hold": _hold,
    "step": lambda job, rank, process, epoch, rest: ev.Stepped(rank, process, epoch, int(rest)),
    "complete": lambda job, rank, process, epoch, rest: ev.Completed(rank, process, epoch, rest),
    "wait": lambda job, rank, process, epoch, rest: ev.Waits(rank, process, epoch, int(rest)),
    "go": lambda job, rank, process, epoch, rest: ev.Waits(rank, process, epoch, int(rest), waiting=False),
    "condemned": lambda job, rank, process, epoch, rest: ev.Condemned(rank, process, rest),
    "exit": lambda job, rank, process, epoch, rest: ev.Exited(rank, process, int(rest)),
}
