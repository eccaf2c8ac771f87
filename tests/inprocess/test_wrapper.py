"""Which parameter of a wrapped function is given the HPCallWrapper."""

from __future__ import annotations

from typing import Any, Optional

import pytest
from hyperpodrun import HPCallWrapper, HPWrapper


def annotated(value: int, who: Optional[HPCallWrapper] = None) -> Any:  # noqa: UP045 - as HyperPod's scripts have it
    return who


def bare(value, caller=None):
    return caller


def required(value, caller):
    return caller


def keyword_only(value, *, caller=None):
    return caller


@pytest.mark.parametrize("function", [annotated, bare, required, keyword_only])
@pytest.mark.filterwarnings("ignore:HPWrapper")
def test_it_is_injected(function):
    assert isinstance(HPWrapper()(function)(1), HPCallWrapper)


def of_another_kind(value, caller: str | None = None):
    return caller


def with_a_default(value, caller="me"):
    return caller


@pytest.mark.parametrize(("function", "kept"), [(of_another_kind, None), (with_a_default, "me")])
@pytest.mark.filterwarnings("ignore:HPWrapper")
def test_what_is_called_so_and_means_something_else_is_left_alone(function, kept):
    assert HPWrapper()(function)(1) == kept


@pytest.mark.filterwarnings("ignore:HPWrapper")
def test_what_is_given_stays():
    assert HPWrapper()(bare)(1, "mine") == "mine"
