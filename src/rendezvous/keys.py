"""The CURVE keys of a job, derived from its one secret: who knows the secret is an agent of the job, nobody else."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field


@dataclass(frozen=True)
class JobKeys:
    """All agents of a job have the same pair: each is a server with it and, to the others, a client."""

    public: bytes
    secret: bytes = field(repr=False)


def derive_keys(secret: bytes, run_id: str) -> JobKeys:
    """The pair of a job (Z85). Another secret or another job is another pair."""
    import zmq
    from zmq.utils import z85

    material = hmac.new(secret, b"hyperpodrun agents of job " + run_id.encode(), hashlib.sha256).digest()
    encoded = z85.encode(material)
    return JobKeys(zmq.curve_public(encoded), encoded)
