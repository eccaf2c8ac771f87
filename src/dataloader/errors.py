"""What can go wrong between a training loop and its batches, each with the sentence that says what to do."""

from __future__ import annotations

import builtins


class DataLoaderError(RuntimeError):
    """Base of the errors of this package. What the user's own dataset raises is not among them."""


class BatchTypeError(DataLoaderError, TypeError):
    """A batch holds something that is neither a tensor nor plain data; the sentence names its type and place."""


class CacheCorruptError(DataLoaderError):
    """A batch file is not what was written: a bit flipped, its end is missing, or it is another batch's."""


class CacheFullError(DataLoaderError):
    """There is no room for the next batch. Nothing is lost: once there is, the same batch can be asked for again."""


class ProducerError(DataLoaderError):
    """There is no producer, or it cannot make batches; the sentence says why."""


class StreamTakenError(DataLoaderError):
    """Another MMAPDataLoader of this process, or another recipe, uses the same stream."""


class SkipLimitError(DataLoaderError):
    """A batch can only be reached by making all before it, and these are more than `max_skip_batches`."""


def user_error(type_name: str, text: str) -> Exception:
    """The exception that a user's dataset raised in another process, as torch's DataLoader gives it.

    A built-in exception comes back as itself, any other as RuntimeError: to make an arbitrary class from a message
    would mean to run code that the message names. `text` holds the original traceback.
    """
    kind = getattr(builtins, type_name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, StopIteration | KeyError):
        try:
            error: Exception = kind(text)
        except TypeError:  # UnicodeDecodeError and the like want more than a text
            return RuntimeError(text)
        return error
    if kind is KeyError:
        return KeyError(_Verbatim(text))
    return RuntimeError(text)


class _Verbatim(str):
    """A KeyError shows the repr of its key; a traceback must not be shown as one line."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
