"""The example database that shards share, by name: a folder, or Redis with the folder as what is left when it is down.

Knows Hypothesis and, where it is asked for, redis; nothing of campaigns.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase

REDIS = ("redis://", "rediss://", "unix://")
SECONDS = 5.0  # for one answer of the server


def opened(name: str, folder: Path, tell: Callable[[str], None]) -> ExampleDatabase:
    """The database of that name; the folder's where it is empty. ValueError where Redis cannot be reached now.

    `tell` hears, once, that Redis is down later on.
    """
    local = DirectoryBasedExampleDatabase(folder)
    if not name:
        return local
    if not name.startswith(REDIS):
        return DirectoryBasedExampleDatabase(name)
    return Falling(_redis(name), local, tell)


def shared(name: str, folder: Path, tell: Callable[[str], None]) -> ExampleDatabase:
    """The database of that name in the middle of a campaign: where it is down, the folder's, and `tell` hears why."""
    try:
        return opened(name, folder, tell)
    except ValueError as error:
        tell(f"{error}: going on with the local folder")
        return DirectoryBasedExampleDatabase(folder)


def _redis(url: str) -> ExampleDatabase:
    try:
        import redis
        from hypothesis.extra.redis import RedisExampleDatabase
    except ImportError as error:
        raise ValueError(f"--database {told(url)} needs the package redis: pip install redis") from error
    try:
        server = redis.Redis.from_url(url, socket_timeout=SECONDS, socket_connect_timeout=SECONDS)
        server.ping()
    except (redis.RedisError, ValueError) as error:
        raise ValueError(f"--database {told(url)} cannot be reached: {error}") from error
    return RedisExampleDatabase(server)


def told(name: str) -> str:
    """The database's name without a password."""
    scheme, there, rest = name.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if there else name


class Falling(ExampleDatabase):
    """The first database as long as it answers, then the second."""

    def __init__(self, first: ExampleDatabase, second: ExampleDatabase, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._first: ExampleDatabase | None = first
        self._second, self._tell = second, tell

    def save(self, key: bytes, value: bytes) -> None:
        self._asked("save", key, value)

    def delete(self, key: bytes, value: bytes) -> None:
        self._asked("delete", key, value)

    def fetch(self, key: bytes) -> Iterable[bytes]:
        yield from self._asked("fetch", key)

    def _asked(self, name: str, *args: bytes) -> Any:
        if self._first is not None:
            try:
                answer = getattr(self._first, name)(*args)
                return list(answer) if name == "fetch" else answer
            except Exception as error:
                self._tell(f"the example database is down ({error}): going on with the local folder")
                self._first = None
        return getattr(self._second, name)(*args)


class Draft(ExampleDatabase):
    """Of one search: what is saved is saved at once, what is deleted goes when `forget` is called.

    Hypothesis deletes what passes; but what another shard has claimed passes too.
    """

    def __init__(self, inner: ExampleDatabase) -> None:
        super().__init__()
        self._inner = inner
        self._passed: dict[tuple[bytes, bytes], None] = {}

    def save(self, key: bytes, value: bytes) -> None:
        self._passed.pop((key, value), None)
        self._inner.save(key, value)

    def delete(self, key: bytes, value: bytes) -> None:
        self._passed[key, value] = None

    def fetch(self, key: bytes) -> Iterable[bytes]:
        yield from self._inner.fetch(key)

    def forget(self) -> None:
        """Delete what passed."""
        for key, value in self._passed:
            self._inner.delete(key, value)
