"""What an agent says when it asks to be let in, and why it may not be. Pure."""

from __future__ import annotations

from .identity import difference, why_another_job
from .messages import Join
from .roles import Context

_LONGEST_ROLE = 1000


def join_of(context: Context) -> Join:
    """What this agent says."""
    config = context.config
    return Join(
        config.run_id,
        config.key,
        config.host,
        config.address,
        config.workers,
        config.order,
        context.local.epoch,
        context.attempt,
        config.role,
        config.identity,
        context.job,
        context.pledged,
        context.voted if context.pledged == context.term else "",
    )


def why_refused(context: Context, join: Join) -> str:
    """Why this agent can never be a member of the job; empty if it can."""
    config = context.config
    if join.version != Join.__struct_defaults__[-1]:
        return f"it runs another version of hyperpodrun (protocol {join.version})"
    if join.run_id != config.run_id:
        return f"the job here is {config.run_id!r}, not {join.run_id!r} (--rdzv-id)"
    if not 1 <= join.workers <= 4096:
        return f"{join.workers} workers on one node"
    if len(join.role) > _LONGEST_ROLE:
        return f"a role with a name of {len(join.role)} characters"
    return why_another_job(config.identity, join.identity, same_role=join.role == config.role)


def tell_difference(context: Context, join: Join) -> None:
    """A new member runs something else than this agent, and that is meant."""
    same_role = join.role == context.config.role
    found = difference(context.config.identity, join.identity, same_role=same_role)
    if found:
        context.note("node-differs", host=join.host, address=join.address, how=found)
