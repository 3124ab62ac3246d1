"""Scores on disk: one SQLite file, written as soon as a score is known."""

import hashlib
import json
import os
import sqlite3
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

_SCHEMA = """
CREATE TABLE IF NOT EXISTS scores (
    key TEXT PRIMARY KEY,      -- hash of all that the values depend on
    image TEXT NOT NULL,
    method TEXT NOT NULL,
    inputs TEXT NOT NULL,      -- what was hashed, as JSON
    vals TEXT NOT NULL,        -- the scores and a checksum of key and scores, as JSON
    scored_at TEXT NOT NULL
)
"""
WAIT = 60  # seconds for another program to let go of the file
_CAUSES = {
    sqlite3.SQLITE_BUSY: "is in use by another program. Close that, then run this again",
    sqlite3.SQLITE_READONLY: "is read-only. Allow writing to it and its folder, or name another",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened. Look at the rights of it and its folder",
    sqlite3.SQLITE_FULL: "has no room to grow: the disk is full. What is in it is kept",
    sqlite3.SQLITE_IOERR: "could not be read or written: the disk or the network fails",
}
_DAMAGED = "is damaged. Put a copy of it back, or move it away to start anew"
_NO_STORE = "is not a store of scores. Move it away to start anew"
Row = tuple[Mapping[str, Any], str, str, Mapping[str, Any]]  # inputs, image, method, values


def make_key(inputs: Mapping[str, Any]) -> str:
    """The hash of a row; equal inputs give the same, in whatever order."""
    return hashlib.sha256(_json(inputs).encode()).hexdigest()


class Store:
    """Rows of values in one SQLite file, each with a checksum.

    A killed process loses only what it has not yet added. A stored key is never written again.

    Raises:
        ValueError: the file is no such store, or damaged.
        OSError: it cannot be opened or written, now or later; the text says what to do.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self._connection = sqlite3.connect(path, timeout=WAIT)
            # bytes that are no text any more fail the checksum, not the reading
            self._connection.text_factory = partial(str, encoding="utf-8", errors="replace")
            (found,) = self._connection.execute("PRAGMA integrity_check(1)").fetchone()
            if found != "ok":
                raise ValueError(f"{path} {_DAMAGED} ({' '.join(found.split())}).")
            self._connection.execute(_SCHEMA)
            self._connection.execute("PRAGMA user_version = 1")  # fails where it is read-only
            self.values("")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def values(self, key: str) -> dict[str, Any]:
        """The values stored under a key, none where it is not there.

        A row that was changed after it was written is removed, with a warning.
        """
        with self._explained(), self._connection:
            query = "SELECT vals, image, method FROM scores WHERE key = ?"
            for text, image, method in self._connection.execute(query, (key,)).fetchall():
                with suppress(ValueError, AttributeError):  # no JSON any more
                    values = json.loads(text)
                    # rows of earlier versions have no checksum
                    if values.pop("checksum", None) in (None, make_key({key: values})):
                        return values
                which = f"A row of {self._path} ({image}, {method})"
                warnings.warn(f"{which} was changed after it was written: it goes.", stacklevel=2)
                self._connection.execute("DELETE FROM scores WHERE key = ?", (key,))
        return {}

    def add(self, rows: Iterable[Row]) -> None:
        """Store rows in one transaction: all of them or none."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        command = "INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?, ?, ?)"
        with self._explained(), self._connection:
            for inputs, image, method, values in rows:
                key = make_key(inputs)
                checked = _json({**values, "checksum": make_key({key: values})})
                stored = key, image, method, _json(inputs), checked, now
                self._connection.execute(command, stored)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other process is in this block; one that dies leaves it."""
        lock, said = f"{self._path}.lock", f"Another run is at work in {self._path.parent}; waiting"
        with closing(sqlite3.connect(lock, timeout=0)) as taken:
            while not taken.in_transaction:
                try:
                    with self._explained():
                        taken.execute("BEGIN EXCLUSIVE")
                except BlockingIOError:
                    print(said, end="", flush=True)
                    said = "."
                    time.sleep(1)
            yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into one sentence that says the cause."""
        try:
            yield
        except (sqlite3.Error, UnicodeError) as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # 0 where Python itself raised it
            if code in _CAUSES:
                kind = BlockingIOError if code == sqlite3.SQLITE_BUSY else OSError
                raise kind(f"{self._path} {_CAUSES[code]} ({error}).") from error
            other = code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
            cause = _NO_STORE if other else _DAMAGED
            raise ValueError(f"{self._path} {cause} ({error}).") from error


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
