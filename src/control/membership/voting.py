"""Who votes for whom: once in a term, and for nobody who knows less of the membership. Pure."""

from __future__ import annotations

from .messages import Join, RequestVote, Vote
from .roles import Context


def answer(context: Context, key: str, address: str, request: RequestVote, join: Join) -> bool:
    """Of an agent in no job, to a candidate of one. Whether it votes for it.

    Who was in that very job still is, for its majority. Another can replace a member, and votes once in a term.
    """
    if request.job == context.job:
        granted = answer_as_member(context, key, request)
        context.send(address, Vote(request.term, request.pre, granted))
        return granted
    job, term, other = context.promise
    granted = request.pre or job != request.job or request.term > term or (request.term == term and other == key)
    if granted and not request.pre:
        context.promise = (request.job, request.term, key)
    context.send(address, Vote(request.term, request.pre, granted, join=join))
    return granted


def answer_as_member(context: Context, key: str, request: RequestVote) -> bool:
    """Once in a term, and for nobody who knows of an older membership."""
    known = context.configurations.find(key) is not None
    granted = known and request.job == context.job and request.configuration >= context.configurations.proposed.id
    if request.pre:
        return granted and request.term > context.term
    granted = granted and (request.term > context.term or (request.term == context.term and context.voted == key))
    if granted:
        context.pledge(request.term, key)
    return granted
