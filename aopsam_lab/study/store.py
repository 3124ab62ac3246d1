"""Scores on disk: one SQLite file, written as soon as a score is known."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS scores (
    key TEXT PRIMARY KEY,      -- hash of all that the values depend on
    image TEXT NOT NULL,
    method TEXT NOT NULL,
    inputs TEXT NOT NULL,      -- what was hashed, as JSON
    vals TEXT NOT NULL,        -- the scores, as JSON
    detail BLOB,               -- masks and prompts of example images, as compressed JSON
    scored_at TEXT NOT NULL
)
"""
# inputs, image, method, values, detail
Row = tuple[Mapping[str, Any], str, str, Mapping[str, Any], Mapping[str, Any] | None]


def make_key(inputs: Mapping[str, Any]) -> str:
    """The hash of a row; equal inputs give the same, in whatever order."""
    return hashlib.sha256(_json(inputs).encode()).hexdigest()


class Store:
    """Rows of values in one SQLite file.

    A process that is killed loses only what it had in hand. A stored key is never written again.

    Args:
        path: the file; it is made where it is not there.

    Raises:
        ValueError: for a file that is no such store.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = sqlite3.connect(path, timeout=60)
            self._connection.execute(_SCHEMA)
            self._connection.execute("SELECT key, vals, detail FROM scores LIMIT 1")
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{path} is not a store of scores ({error}). Move it away to start anew."
            ) from error

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def __contains__(self, key: str) -> bool:
        return self._read("key", key) is not None

    def values(self, key: str) -> dict[str, Any] | None:
        """The values stored under a key, None where there are none."""
        found = self._read("vals", key)
        return None if found is None else json.loads(found)

    def detail(self, key: str) -> dict[str, Any] | None:
        """The masks and prompts stored under a key, None where there are none."""
        found = self._read("detail", key)
        return None if found is None else json.loads(zlib.decompress(found))

    def add(self, rows: Iterable[Row]) -> None:
        """Store rows in one transaction: all of them or none.

        Args:
            rows: each with the inputs that its values depend on, image, method, values and detail.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        stored = [
            (make_key(inputs), image, method, _json(inputs), _json(values), _packed(detail), now)
            for inputs, image, method, values, detail in rows
        ]
        with self._connection:
            self._connection.executemany(
                "INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?, ?, ?, ?)", stored
            )

    def _read(self, column: str, key: str) -> Any:
        query = f"SELECT {column} FROM scores WHERE key = ?"
        row = self._connection.execute(query, (key,)).fetchone()
        return None if row is None else row[0]


def _packed(detail: Mapping[str, Any] | None) -> bytes | None:
    return None if detail is None else zlib.compress(_json(detail).encode())


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
