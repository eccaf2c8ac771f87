"""Turns the start of a worker's interpreter into a standby source.

The agent starts the source with the worker's very command line and this directory first in PYTHONPATH. Python imports
`sitecustomize` when it has set itself up and not yet looked at the script: here the source imports torch, waits, and
forks. What returns from here is a worker, and CPython goes on to run the script as it always does: `__main__`,
`sys.argv`, `-m`, tracebacks and the end of the process are CPython's own, not imitations.
"""

import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
del sys.modules["sitecustomize"]
sys.path.remove(_here)
sys.path_importer_cache.pop(_here, None)


def _become_worker() -> None:
    """Returns in a worker only."""
    # Imports must find what they would find in the worker, where the script's directory is first in the path.
    argument = sys.argv[0]
    if getattr(sys.flags, "safe_path", False):
        first = None
    elif argument == "-m":
        first = os.getcwd()
    else:
        real = os.path.realpath(argument)
        first = argument if os.path.isdir(real) else os.path.dirname(real)
    if first is not None:
        sys.path.insert(0, first)
    package = os.path.dirname(os.path.dirname(_here))
    import importlib.util as util

    spec = util.find_spec("hyperpodrun")
    own = (
        spec is not None
        and spec.origin is not None
        and os.path.realpath(spec.origin) == os.path.realpath(os.path.join(package, "__init__.py"))
    )
    if not own:  # the agent's package is not one that the script could import
        spec = util.spec_from_file_location(
            "hyperpodrun", os.path.join(package, "__init__.py"), submodule_search_locations=[package]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules["hyperpodrun"] = module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
    import importlib

    importlib.import_module("hyperpodrun.standby.source").serve(preload_own=own)
    for name in list(sys.modules):
        if name.startswith("hyperpodrun.standby") or (not own and name.partition(".")[0] == "hyperpodrun"):
            del sys.modules[name]
    if first is not None and first in sys.path:
        sys.path.remove(first)  # CPython puts it there itself


_become_worker()
try:
    __import__("sitecustomize")  # the one of this installation, if it has one
except ImportError as _error:
    if _error.name != "sitecustomize":
        raise
    raise ImportError("No module named 'sitecustomize'", name="sitecustomize") from None  # as `site` expects it
