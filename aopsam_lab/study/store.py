"""Scores on disk: one SQLite file, one row for each image x method x setting, written as soon as it is known."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS scores (
    key TEXT PRIMARY KEY,      -- hash of all that the values depend on
    image TEXT NOT NULL,
    method TEXT NOT NULL,
    inputs TEXT NOT NULL,      -- what was hashed, as JSON
    vals TEXT NOT NULL,        -- the scores, as JSON
    detail BLOB,               -- masks and prompts of the images shown as examples, as compressed JSON
    scored_at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS memory (
    key TEXT PRIMARY KEY,
    method TEXT NOT NULL,
    inputs TEXT NOT NULL,
    peak_mem_mb REAL NOT NULL,
    measured_at TEXT NOT NULL
);
"""


Row = tuple[Mapping[str, Any], str, str, Mapping[str, Any], "Mapping[str, Any] | None"]


def make_key(inputs: Mapping[str, Any]) -> str:
    """The hash of a row: equal inputs, in whatever order, give the same. Raises TypeError for what JSON cannot hold."""
    return hashlib.sha256(_json(inputs).encode()).hexdigest()


class Store:
    """Scores and memory measurements in one SQLite file.

    Rows are written in transactions, one row or one image's rows at a time, so a process that is killed loses only what
    it had in hand. A key that is there is never written again. Raises ValueError for a file that is no such store.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = sqlite3.connect(self.path, timeout=60)
            self._connection.executescript(_SCHEMA)
            self._connection.execute("SELECT key, vals, detail FROM scores LIMIT 1")
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self.path} is not a store of scores ({error}). Move it away to start anew."
            ) from error

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Rows with scores, of all studies that used this file."""
        return self._connection.execute("SELECT COUNT(*) FROM scores").fetchone()[0]

    def __contains__(self, key: str) -> bool:
        return (
            self._connection.execute("SELECT 1 FROM scores WHERE key = ?", (key,)).fetchone()
            is not None
        )

    def scores(self, key: str) -> dict[str, Any] | None:
        """The values stored under a key, None where there are none."""
        row = self._connection.execute("SELECT vals FROM scores WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def detail(self, key: str) -> dict[str, Any] | None:
        """The masks and prompts stored under a key, None where there are none."""
        row = self._connection.execute("SELECT detail FROM scores WHERE key = ?", (key,)).fetchone()
        return None if row is None or row[0] is None else json.loads(zlib.decompress(row[0]))

    def add_scores(
        self,
        inputs: Mapping[str, Any],
        image: str,
        method: str,
        values: Mapping[str, Any],
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Store one image's values for one method, in one transaction."""
        self.add_together([(inputs, image, method, values, detail)])

    def add_together(self, rows: Iterable[Row]) -> None:
        """Store several rows, each with the arguments of `add_scores`, in one transaction: all of them or none."""
        now = _now()
        stored = [
            (make_key(inputs), image, method, _json(inputs), _json(values), _packed(detail), now)
            for inputs, image, method, values, detail in rows
        ]
        with self._connection:
            self._connection.executemany(
                "INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?, ?, ?, ?)", stored
            )

    def memory(self, key: str) -> float | None:
        """The peak memory stored under a key (MiB), None where there is none."""
        row = self._connection.execute(
            "SELECT peak_mem_mb FROM memory WHERE key = ?", (key,)
        ).fetchone()
        return None if row is None else row[0]

    def add_memory(self, inputs: Mapping[str, Any], method: str, peak_mem_mb: float) -> None:
        """Store one method's peak memory, in one transaction."""
        row = (make_key(inputs), method, _json(inputs), peak_mem_mb, _now())
        with self._connection:
            self._connection.execute("INSERT OR IGNORE INTO memory VALUES (?, ?, ?, ?, ?)", row)


def _packed(detail: Mapping[str, Any] | None) -> bytes | None:
    return None if detail is None else zlib.compress(_json(detail).encode())


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
