"""Finding a stream by what the user wrote."""

from __future__ import annotations

from collections import Counter

from fedmerge.client.tasks import Stream, StreamOptions
from fedmerge.common.errors import ConfigError
from fedmerge.common.lookup import FORMS, find_function

BUILT_IN = {
    "text": "fedmerge.deploy.streams.text:text",
    "text-hard": "fedmerge.deploy.streams.text_hard:text_hard",
    "vision": "fedmerge.deploy.streams.vision:vision",
    "permuted-mnist": "fedmerge.deploy.streams.permuted:permuted_mnist",
    "split-cifar": "fedmerge.deploy.streams.split:split_cifar",
    "split-fashion": "fedmerge.deploy.streams.split:split_fashion",
    "split-mnist": "fedmerge.deploy.streams.split:split_mnist",
    "example": "fedmerge.deploy.streams.example:example",
}


def load_stream(spec: str, options: StreamOptions) -> Stream:
    """The stream that ``spec`` names, made with ``options``.

    Args:
        spec: a name in ``BUILT_IN``, ``package.module:function`` or ``path/to/file.py:function``.

    Raises:
        ConfigError: nothing is found there, the function returns something else than a
            :class:`Stream`, or the stream's task names are missing or repeated.
    """
    where = f"stream {spec!r}"
    names = ", ".join(map(repr, BUILT_IN))
    stream = find_function(BUILT_IN.get(spec, spec), where=where, forms=f"{names}, {FORMS}")(options)
    if not isinstance(stream, Stream):
        raise ConfigError(
            "the function returned something else", where=where, got=type(stream).__name__, wanted="Stream"
        )
    if not stream.tasks:
        raise ConfigError("a stream needs tasks", where=where, got="none", wanted="at least 1")
    repeated = [name for name, times in Counter(stream.tasks).items() if times > 1]
    if repeated:
        raise ConfigError(
            "task names repeat", where=where, got=", ".join(map(repr, repeated)), wanted="each once"
        )
    return stream


def first_tasks(stream: Stream, count: int | None) -> tuple[str, ...]:
    """The names of a stream's first tasks; of all if ``count`` is None.

    Raises:
        ConfigError: the stream has fewer.
    """
    if count is not None and count > len(stream.tasks):
        raise ConfigError(
            "more tasks than the stream has",
            where=f"stream {stream.name!r}",
            got=count,
            wanted=f"at most {len(stream.tasks)}",
        )
    return stream.tasks[:count]
