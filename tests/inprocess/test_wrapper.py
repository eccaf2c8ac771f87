"""Which parameter of a wrapped function is given the HPCallWrapper."""

from __future__ import annotations

import functools
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


class Method:
    def __call__(self, value: int, who: HPCallWrapper | None = None) -> Any:
        return who


FUNCTIONS = [annotated, bare, required, keyword_only, functools.partial(annotated), Method()]


@pytest.mark.parametrize("function", FUNCTIONS)
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


@pytest.mark.filterwarnings("ignore:HPWrapper")
def test_a_none_that_is_given_is_none():
    assert isinstance(HPWrapper()(bare)(1, None), HPCallWrapper)
    assert isinstance(HPWrapper()(annotated)(1, None), HPCallWrapper)


async def coroutine(caller=None):
    return caller


def generator(caller=None):
    yield caller


@pytest.mark.parametrize("function", [coroutine, generator, functools.partial(coroutine)])
def test_what_would_run_outside_is_refused(function):
    with pytest.raises(TypeError, match=r"HPWrapper: .* function, whose lines run after the wrapper has been left"):
        HPWrapper()(function)


def test_parentheses_are_asked_for():
    with pytest.raises(TypeError, match=r"the decorator is written @HPWrapper\(\)"):
        HPWrapper(bare)
