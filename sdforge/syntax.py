"""TOML text → values, within limits, and the place of every key in it.

Recipes are TOML 1.0. tree-sitter reads the text first: its grammar is 1.0, it never backs away from hostile input
(1 MiB of anything in under two seconds), and it knows where everything stands. Only text that is within the limits
reaches tomli, which is quadratic in dotted keys and numbers of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from sdforge.errors import Place, Problem, RecipeError
from sdforge.identity import LARGEST_INTEGER
from sdforge.slips import ENDLESS, explain_slip

if TYPE_CHECKING:
    from tree_sitter import Node, Tree

MOST_BYTES = 1 << 20
MOST_DEPTH = 64  # of arrays and inline tables within each other
MOST_PARTS = 16  # of a dotted key
MOST_TABLES = 4096
MOST_KEYS = 20_000
MOST_ITEMS = 100_000  # of arrays

NOT_YET = "inline tables stay on one line, without a comma at their end; times have seconds; no \\e or \\x"  # TOML 1.1

Path: TypeAlias = tuple[str | int, ...]
Span: TypeAlias = tuple[int, int, int]  # row and column from 0 (columns in bytes), length


@dataclass(frozen=True)
class Document:
    """A TOML file that could be read: its values, and where each of them stands.

    file: as it is shown to a person (relative to the project where it can be). moved: the paths of values that stand
    elsewhere in the file than their path says, since a variant sets them → where they stand.
    """

    file: str
    source: bytes
    values: dict[str, Any]
    moved: dict[Path, Path] = field(default_factory=dict)

    def place(self, *path: str | int, value: bool = False) -> Place:
        """Return where the key at `path` stands (or its value), or the nearest thing around it that has a place."""
        for end in range(len(path), 0, -1):
            if written := self.moved.get(path[:end]):
                listed = isinstance(written[-1], int) and end == len(path) and not value
                path = (*(written[:-1] if listed else written), *path[end:])
                break
        for end in range(len(path), 0, -1):
            span = self._spans.get(path[:end]) or self._within(path[:end])
            if span:
                return self._place(*span[1 if value and end == len(path) else 0])
        return Place(self.file)

    def _within(self, path: Path) -> tuple[Span, Span] | None:
        """The first thing of a table that has no header of its own."""
        return next((span for key, span in self._spans.items() if key[: len(path)] == path), None)

    def _place(self, line: int, column: int, length: int) -> Place:
        text = self._lines[line] if line < len(self._lines) else b""
        before = text[:column].decode(errors="replace")
        return Place(self.file, line + 1, len(before) + 1, max(1, length), text.decode(errors="replace"))

    @cached_property
    def _lines(self) -> list[bytes]:
        return self.source.splitlines()

    @cached_property
    def _spans(self) -> dict[Path, tuple[Span, Span]]:
        return dict(_spans(_parse(self.source).root_node))


def read_toml(source: bytes, file: str) -> Document:
    """Read TOML 1.0 within the limits of this module. Raises RecipeError with the place and the reason."""

    def refuse(message: str, place: Place | None = None, hint: str = "") -> RecipeError:
        return RecipeError([Problem("syntax", message, place or Place(file), hint)])

    if len(source) > MOST_BYTES:
        raise refuse(f"is {len(source):,} bytes long; the most is {MOST_BYTES:,}")
    if source.startswith(b"\xef\xbb\xbf"):
        raise refuse("begins with a byte order mark", Place(file, 1, 1), "save it as UTF-8 without BOM")
    try:
        text = source.decode()
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        raise refuse("is not UTF-8", Place(file, line, 1)) from None
    if "\0" in text:
        raise refuse("holds a NUL character", Place(file, text.count("\n", 0, text.index("\0")) + 1, 1))
    document = Document(file, source, {})
    tree = _parse(source)
    excess = _excess(tree)
    if excess:
        message, node = excess
        raise refuse(message, document._place(node.start_point[0], node.start_point[1], 1))
    fault = _first_fault(tree)
    values, complaint = _values(text) if fault is None or len(source) <= 1 << 16 else (None, None)
    if complaint is not None:
        sentence, line, column = complaint
        lines = text.splitlines() or [""]
        if sentence in ENDLESS and fault is not None and (line, column) > (len(lines), len(lines[-1])):
            began = document._place(*fault.start_point, 1)  # at the end of the file it was noticed
            line, column = began.line, began.column
        written = lines[min(line, len(lines)) - 1] if line else ""
        slip = explain_slip(sentence, written, column)
        raise refuse(slip.sentence, Place(file, line, slip.column, slip.length, written), slip.hint)
    if fault is not None or values is None:
        place = document._place(fault.start_point[0], fault.start_point[1], 1) if fault else None
        raise refuse(
            "is not TOML 1.0",
            place,
            NOT_YET,
        )
    return Document(file, source, values)


def _values(text: str) -> tuple[dict[str, Any] | None, tuple[str, int, int] | None]:
    """Return tomli's values, or its complaint: (sentence, line, column)."""
    import tomli

    try:
        return tomli.loads(text), None
    except tomli.TOMLDecodeError as error:
        sentence = error.msg[:1].lower() + error.msg[1:]
        return None, (sentence, error.lineno, error.colno)
    except (ValueError, RecursionError) as error:  # integers of thousands of digits; nesting beyond tomli's own limit
        return None, (str(error).split(";")[0], 0, 0)


def _parse(source: bytes) -> Tree:
    import tree_sitter
    import tree_sitter_toml

    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_toml.language())).parse(source)


def _walk(tree: Tree) -> Iterator[tuple[Node, int]]:
    """Every named node with its depth, without recursion."""
    cursor, depth = tree.walk(), 0
    while True:
        node = cursor.node
        if node is not None and node.is_named:
            yield node, depth
        if cursor.goto_first_child():
            depth += 1
            continue
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                return
            depth -= 1


def _excess(tree: Tree) -> tuple[str, Node] | None:
    """Say what is beyond the limits, and where it begins."""
    tables = keys = items = 0
    nesting: list[tuple[int, str]] = []  # (depth, type) of the containers and dotted keys around the node
    for node, depth in _walk(tree):
        while nesting and nesting[-1][0] >= depth:
            nesting.pop()
        items += bool(nesting) and nesting[-1] == (depth - 1, "array")
        if items > MOST_ITEMS:
            return f"has more than {MOST_ITEMS:,} values in arrays", node
        if node.type in ("array", "inline_table", "dotted_key"):
            nesting.append((depth, node.type))
            dots = sum(kind == "dotted_key" for _, kind in nesting)
            if len(nesting) - dots > MOST_DEPTH:
                return f"nests deeper than {MOST_DEPTH} levels", node
            if dots >= MOST_PARTS:
                return f"has a key of more than {MOST_PARTS} parts", node
        elif node.type in ("table", "table_array_element"):
            tables += 1
            if tables > MOST_TABLES:
                return f"has more than {MOST_TABLES:,} tables", node
        elif node.type == "pair":
            keys += 1
            if keys > MOST_KEYS:
                return f"has more than {MOST_KEYS:,} keys", node
        elif node.type == "integer" and _is_too_large((node.text or b"").decode()):
            return "has a whole number beyond 2^53", node
    return None


def _is_too_large(integer: str) -> bool:
    """Say whether a key could not hold a number: JSON is not exact beyond 2^53 everywhere."""
    if len(integer) <= len(str(LARGEST_INTEGER)) - 1:
        return False
    try:
        return abs(int(integer.replace("_", ""), 0)) > LARGEST_INTEGER
    except ValueError:  # which tomli refuses in its own words
        return False


def _first_fault(tree: Tree) -> Node | None:
    if not tree.root_node.has_error:
        return None
    return next((node for node, _ in _walk(tree) if node.is_error or node.is_missing), tree.root_node)


def _span(node: Node) -> Span:
    (row, column), (end_row, end_column) = node.start_point, node.end_point
    return row, column, end_column - column if end_row == row else 1


def _parts(key: Node) -> list[str]:
    if key.type == "dotted_key":
        return [part for child in key.named_children for part in _parts(child)]
    import tomli

    (part,) = tomli.loads(f"{(key.text or b'').decode()} = 0")  # quotes and escapes are tomli's business
    return [part]


def _spans(root: Node) -> Iterator[tuple[Path, tuple[Span, Span]]]:
    """The spans (key, value) of every key of a document without faults, tables before what they hold."""
    counts: dict[Path, int] = {}
    for node in root.named_children:
        if node.type == "pair":
            yield from _pair_spans((), node)
        elif node.type in ("table", "table_array_element"):
            key = node.named_children[0]
            path: Path = tuple(_parts(key))
            if node.type == "table_array_element":
                counts[path] = counts.get(path, -1) + 1
                path = (*path, counts[path])
            yield path, (_span(key), _span(key))
            for child in node.named_children[1:]:
                if child.type == "pair":
                    yield from _pair_spans(path, child)


def _pair_spans(prefix: Path, pair: Node) -> Iterator[tuple[Path, tuple[Span, Span]]]:
    key, value = [child for child in pair.named_children if child.type != "comment"]
    path = (*prefix, *_parts(key))
    yield path, (_span(key), _span(value))
    yield from _value_spans(path, value)


def _value_spans(path: Path, value: Node) -> Iterator[tuple[Path, tuple[Span, Span]]]:
    if value.type == "inline_table":
        for child in value.named_children:
            if child.type == "pair":
                yield from _pair_spans(path, child)
    elif value.type == "array":
        items = (child for child in value.named_children if child.type != "comment")
        for i, item in enumerate(items):
            span = _span(item)
            yield (*path, i), (span, span)
            if item.type in ("array", "inline_table"):
                yield from _value_spans((*path, i), item)
