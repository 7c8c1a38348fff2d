"""What can be rebuilt, kept in SQLite so that a null build looks nothing up twice: stats, parsed files, known keys.

Opened read-only until there is something to write. A read-only open that fails (a journal left by a dead process) is
tried once read-write; where that is impossible, or the file is damaged, the index counts as empty.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS parsed (id TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen (id TEXT PRIMARY KEY, stats TEXT, settled INTEGER, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS digests (sha256 TEXT, path TEXT, PRIMARY KEY (sha256, path)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS known (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS expected (recipe TEXT PRIMARY KEY, keys TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tensors (identity TEXT PRIMARY KEY, listed TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS verdicts (id TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS history (id TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""
VERSION = 1
WAIT = 30.0  # seconds for another writer


class Index:
    """Tables of text → text; every method works on an index that is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self._writable = False
        if path.is_file():
            self._open_to_read()

    def _open_to_read(self) -> None:
        for uri in (f"file:{_quoted(self.path)}?mode=ro", f"file:{_quoted(self.path)}?mode=rw"):
            try:
                connection = sqlite3.connect(uri, uri=True, timeout=WAIT)
                (version,) = connection.execute("PRAGMA user_version").fetchone()
            except sqlite3.Error:
                continue
            if version == VERSION:
                self._connection = connection
                return
            connection.close()

    def _open_to_write(self) -> sqlite3.Connection | None:
        if self._writable:
            return self._connection
        self.close()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise sqlite3.DatabaseError("another version")
            connection.execute("PRAGMA journal_mode=DELETE")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.executescript(SCHEMA)
            connection.execute(f"PRAGMA user_version={VERSION}")
        except sqlite3.DatabaseError as error:
            if "not a database" in str(error) or "malformed" in str(error) or "another version" in str(error):
                with suppress(OSError):
                    self.path.unlink()
                    return self._open_to_write()
            return None
        except OSError:
            return None
        self._connection, self._writable = connection, True
        return connection

    @property
    def wrote(self) -> bool:
        """Whether this process has had something to write."""
        return self._writable

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection, self._writable = None, False

    def read(self, query: str, arguments: Iterable[Any] = ()) -> list[Any]:
        """Return all rows of a query, or nothing where the index cannot be read."""
        if self._connection is None:
            return []
        try:
            return self._connection.execute(query, tuple(arguments)).fetchall()
        except sqlite3.Error:
            return []

    def read_keyed(self, table: str, columns: str, key: str, keys: Iterable[str]) -> dict[str, Any]:
        """Return key → the row's columns (the value itself if there is only one), for many keys at once."""
        query = f"SELECT {key}, {columns} FROM {table} WHERE {key} IN (SELECT value FROM json_each(?))"
        rows = self.read(query, [json.dumps(list(keys))])
        return {row[0]: row[1] if len(row) == 2 else row[1:] for row in rows}

    def write(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Write rows in one transaction. A place that cannot be written to is no failure: all this can be rebuilt."""
        rows = list(rows)
        connection = self._open_to_write() if rows else None
        if connection is None:
            return
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(statement, rows)
            if " known " in statement:
                connection.execute("DELETE FROM verdicts")  # they rest on what was known
            connection.execute("COMMIT")
        except sqlite3.Error:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")

    def put(self, table: str, rows: dict[str, Any]) -> None:
        """Write key → value rows (further columns as tuples)."""
        values = [(key, *(value if isinstance(value, tuple) else (value,))) for key, value in rows.items()]
        marks = ",".join("?" * len(values[0])) if values else ""
        self.write(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", values)


def _quoted(path: Path) -> str:
    return "".join(
        c if c.isalnum() or c in "/-_." else "".join(f"%{b:02X}" for b in c.encode()) for c in str(path.absolute())
    )
