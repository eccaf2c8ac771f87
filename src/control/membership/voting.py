"""Who votes for whom: once in a term, and for nobody who knows less of the membership. Pure."""

from __future__ import annotations

from .messages import Join, RequestVote, Vote
from .roles import Context


def answer(context: Context, key: str, address: str, claim: RequestVote, join: Join) -> bool:
    """Of an agent in no job, to a candidate of one. Whether it votes for it.

    Who was in that very job still is, for its majority. Another can take a member's place, and votes once in a term.
    """
    if claim.job == context.job:
        granted = answer_as_member(context, key, claim)
        context.send(address, Vote(claim.term, claim.real, granted))
        return granted
    job, term, other = context.promise
    granted = not claim.real or job != claim.job or claim.term > term or (claim.term == term and other == key)
    if granted and claim.real:
        context.promise = (claim.job, claim.term, key)
    context.send(address, Vote(claim.term, claim.real, granted, join=join))
    return granted


def answer_as_member(context: Context, key: str, claim: RequestVote) -> bool:
    """Once in a term, and for nobody who knows of an older membership."""
    known = any(member.key == key for member in context.configurations.everybody().values())
    granted = known and claim.job == context.job and claim.configuration >= context.configurations.proposed.id
    if not claim.real:
        return granted and claim.term > context.term
    granted = granted and (claim.term > context.term or (claim.term == context.term and context.voted == key))
    if granted:
        context.pledge(claim.term, key)
    return granted
