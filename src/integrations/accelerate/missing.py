"""A framework that is not installed: one sentence that says what to install."""

from __future__ import annotations

import importlib


def require(*packages: str, user: str, extra: str) -> None:
    """Raises ImportError where one of the packages that `user` needs is not there."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            raise ImportError(
                f"{user} needs the package {package}, which is not installed: pip install 'hyperpodrun[{extra}]'"
            ) from None
