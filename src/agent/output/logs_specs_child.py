"""The process in which a `--logs-specs` class lives: the one place of this package that imports torch.

Started by `logs_specs.py`. Reads one JSON line for each question and writes one for each answer; what the class
prints goes to stderr.
"""

import json
import os
import sys
from importlib import metadata
from typing import Any

_FIELDS = (
    *("stdouts", "stderrs", "tee_stdouts", "tee_stderrs", "error_files"),
    *("filtered_stdout", "filtered_stderr"),
)


def make(question: dict[str, Any]) -> Any:
    """The user's object. Raises LookupError when there is no such entry point."""
    from torch.distributed.elastic.multiprocessing.api import Std

    found = list(metadata.entry_points().select(group="torchrun.logs_specs", name=question["name"]))
    if not found:
        raise LookupError(f"no installed package has an entry point torchrun.logs_specs of the name {question['name']}")
    ranks = question["local_ranks_filter"]
    return found[0].load()(
        log_dir=question["log_dir"],
        redirects={int(rank): Std(streams) for rank, streams in question["redirects"].items()},
        tee={int(rank): Std(streams) for rank, streams in question["tee"].items()},
        local_ranks_filter=None if ranks is None else set(ranks),
    )


def destinations(specs: Any, envs: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Its answer for one attempt."""
    wanted = specs.reify({int(rank): environment for rank, environment in envs.items()})
    return {name: getattr(wanted, name) for name in _FIELDS}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    specs = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if specs is None:
                specs = make(question)
                answer: dict[str, Any] = {}
            else:
                answer = destinations(specs, question["envs"])
            text = json.dumps(answer)
        except Exception as error:  # whatever the user's class raises is the answer
            text = json.dumps({"error": f"{type(error).__name__}: {error}"})
        print(text, file=answers, flush=True)


if __name__ == "__main__":
    main()
