"""What can be rebuilt, kept in SQLite so that a null build looks nothing up twice: stats, parsed files, known keys.

Opened read-only until there is something to write. A read-only open that fails (a journal left by a dead process) is
tried once read-write; where that is impossible, or the file is damaged, the index counts as empty. Every row has a sum:
one whose bytes are not what was written counts as missing, since a parsed recipe with another weight in it would be
built without a word.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS parsed (id TEXT PRIMARY KEY, value TEXT, sum TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen (id TEXT PRIMARY KEY, stats TEXT, settled INTEGER, value TEXT, sum TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS digests (sha256 TEXT, path TEXT, sum TEXT, PRIMARY KEY (sha256, path)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS known (key TEXT PRIMARY KEY, value TEXT, sum TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS expected (recipe TEXT PRIMARY KEY, keys TEXT, sum TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tensors (identity TEXT PRIMARY KEY, listed TEXT, sum TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS verdicts (id TEXT PRIMARY KEY, value TEXT, sum TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS builds (id TEXT PRIMARY KEY, value TEXT, sum TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS history (id TEXT PRIMARY KEY, value TEXT, sum TEXT) WITHOUT ROWID;
"""
KEYS = {"known": "key", "expected": "recipe", "tensors": "identity"}  # of the others: id
VERSION = 2
UNUSABLE = ("not a database", "malformed", "another version", "no such table", "has no column")
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
                connection.text_factory = _text
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
            if self._is_removed(error):
                return self._open_to_write()
            self._read_on()
            return None
        except OSError:
            self._read_on()
            return None
        connection.text_factory = _text
        self._connection, self._writable = connection, True
        return connection

    def _read_on(self) -> None:
        """Go on with what can be read, where nothing can be written."""
        if self.path.is_file():
            self._open_to_read()

    def _is_removed(self, error: sqlite3.DatabaseError | UnicodeEncodeError) -> bool:
        """Remove the file if an error says that it is no index; say whether that could be done."""
        if any(words in str(error) for words in UNUSABLE):
            self.close()
            with suppress(OSError):
                self.path.unlink()
                return True
        return False

    @property
    def wrote(self) -> bool:
        """Whether this process has had something to write."""
        return self._writable

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection, self._writable = None, False

    def read(self, table: str, where: str = "1", arguments: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of a table, without their sums: those that are whole, or nothing if it cannot be read."""
        if self._connection is None:
            return []
        try:
            rows = self._connection.execute(f"SELECT * FROM {table} WHERE {where}", tuple(arguments)).fetchall()
        except (sqlite3.Error, UnicodeDecodeError):  # the latter where the name of a column is damaged
            return []
        return [row[:-1] for row in rows if row[-1] == _sum(table, row[:-1])]

    def read_keyed(self, table: str, keys: Iterable[str]) -> dict[str, Any]:
        """Return key → the row's columns (the value itself if there is only one), for many keys at once."""
        where = f"{KEYS.get(table, 'id')} IN (SELECT value FROM json_each(?))"
        rows = self.read(table, where, [json.dumps(list(keys))])
        return {row[0]: row[1] if len(row) == 2 else row[1:] for row in rows}

    def write(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Write rows in one transaction. A place that cannot be written to is no failure: all this can be rebuilt."""
        rows = list(rows)
        connection = self._open_to_write() if rows else None
        if connection is None:
            return
        try:
            self._commit(connection, statement, rows)
        except (sqlite3.DatabaseError, UnicodeEncodeError) as error:  # the latter of a file whose name is no UTF-8
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            if self._is_removed(error) and (connection := self._open_to_write()):
                with suppress(sqlite3.Error):
                    self._commit(connection, statement, rows)

    def _commit(self, connection: sqlite3.Connection, statement: str, rows: list[tuple[Any, ...]]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(statement, rows)
        if " known " in statement:
            connection.execute("DELETE FROM verdicts")  # they rest on what was known
        connection.execute("COMMIT")

    def insert(self, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Write rows, the key first; those with the same key are replaced."""
        summed = [(*row, _sum(table, row)) for row in rows]
        marks = ",".join("?" * len(summed[0])) if summed else ""
        self.write(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", summed)

    def put(self, table: str, rows: dict[str, Any]) -> None:
        """Write key → value rows (further columns as tuples)."""
        self.insert(table, [(key, *(value if isinstance(value, tuple) else (value,))) for key, value in rows.items()])


def _text(data: bytes) -> str:
    return data.decode(errors="replace")  # what is no text any more has another sum


def _sum(table: str, row: tuple[Any, ...]) -> str:
    return hashlib.sha256("\0".join([table, *map(str, row)]).encode(errors="replace")).hexdigest()[:16]


def _quoted(path: Path) -> str:
    return "".join(
        c if c.isalnum() or c in "/-_." else "".join(f"%{b:02X}" for b in c.encode()) for c in str(path.absolute())
    )
