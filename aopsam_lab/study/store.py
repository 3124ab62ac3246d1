"""Scores on disk: one SQLite file, written as soon as a score is known."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

_SCHEMA = """
CREATE TABLE IF NOT EXISTS scores (
    key TEXT PRIMARY KEY,      -- hash of all that the values depend on
    image TEXT NOT NULL,
    method TEXT NOT NULL,
    inputs TEXT NOT NULL,      -- what was hashed, as JSON
    vals TEXT NOT NULL,        -- the scores, as JSON
    scored_at TEXT NOT NULL
)
"""
Row = tuple[Mapping[str, Any], str, str, Mapping[str, Any]]  # inputs, image, method, values


def make_key(inputs: Mapping[str, Any]) -> str:
    """The hash of a row; equal inputs give the same, in whatever order."""
    return hashlib.sha256(_json(inputs).encode()).hexdigest()


class Store:
    """Rows of values in one SQLite file; ValueError for a file that is no such store.

    A killed process loses only what it has not yet added. A stored key is never written again.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = sqlite3.connect(path, timeout=60)
            self._connection.execute(_SCHEMA)
            self.values("")
        except sqlite3.DatabaseError as error:
            advice = "Move it away to start anew."
            raise ValueError(f"{path} is not a store of scores ({error}). {advice}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def values(self, key: str) -> dict[str, Any]:
        """The values stored under a key, none where it is not there."""
        query = "SELECT vals FROM scores WHERE key = ?"
        row = self._connection.execute(query, (key,)).fetchone()
        return {} if row is None else json.loads(row[0])

    def add(self, rows: Iterable[Row]) -> None:
        """Store rows in one transaction: all of them or none."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        command = "INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?, ?, ?)"
        with self._connection:
            for inputs, image, method, values in rows:
                stored = make_key(inputs), image, method, _json(inputs), _json(values), now
                self._connection.execute(command, stored)


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
