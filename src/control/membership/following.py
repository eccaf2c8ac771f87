"""Whom an agent follows: a controller that no later promise of its own speaks against. Pure."""

from __future__ import annotations

from .becoming import BecomeFollower
from .messages import Hold, Lead
from .roles import Context


def follow(context: Context, key: str, address: str, lead: Lead) -> BecomeFollower | None:
    """Somebody leads: accepted if no later term was voted for, and no later membership is known here.

    It is this job, or the incarnation that a majority has made of it.
    """
    if lead.term < context.term or (lead.term == context.term and context.voted != key):
        return None
    configurations = lead.configurations
    if configurations is None and lead.job == context.job:
        configurations = context.configurations.changed(lead.change)
    if configurations is None:
        context.send(address, Hold())
        return None
    if context.job not in (configurations.proposed.founder, configurations.proposed.succeeds):
        return None
    if configurations.proposed.id <= context.configurations.proposed.id:
        return None
    if configurations.proposed.find(context.config.key) is None:
        return None
    context.pledge(lead.term, key)
    context.local.remember(lead.memory)
    return BecomeFollower(key, address, lead.term, configurations)


def follow_anew(context: Context, key: str, address: str, lead: Lead) -> BecomeFollower | None:
    """A controller counts on an agent that is in no job."""
    if lead.configurations is None:
        voted = (context.job, context.term, context.voted)
        if (lead.job, lead.term, key) in (voted, context.promise):
            context.send(address, Hold())  # the base of its change is not known here
        return None
    if not _names(lead, context.config.key):
        return None
    another_job = lead.configurations.proposed.founder != context.job
    other_voted = lead.term == context.pledged == context.term and context.voted != key
    if not another_job and (lead.term < context.pledged or other_voted):
        return None  # a controller that does not know yet that it is none any more
    context.pledge(lead.term, key, another_job=another_job)
    context.local.remember(lead.memory)
    return BecomeFollower(key, address, lead.term, lead.configurations)


def _names(lead: Lead, key: str) -> bool:
    return any(member.key == key for member in lead.change.added) or (
        lead.configurations is not None and lead.configurations.proposed.find(key) is not None
    )
