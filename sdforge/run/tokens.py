"""Prompts → token numbers, with words that were added to a vocabulary or are being learned."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from sdforge.errors import UsageError
from sdforge.formats.tokenizer import END, LENGTH, READ, START, alone, tokenizer_files


class Words:
    """CLIP's tokenizer and the words behind its vocabulary.

    added: [word, rows] in the order of the rows, which follow the vocabulary's.
    """

    def __init__(self, vocabulary: dict[str, Any], added: list[list[Any]]) -> None:
        from transformers import CLIPTokenizer

        with tempfile.TemporaryDirectory() as folder:
            for name, text in tokenizer_files(vocabulary, []).items():
                (Path(folder) / name).write_text(text, encoding="utf-8")
            self._tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.size = len(vocabulary["vocab"])
        self._vocab: dict[str, int] = vocabulary["vocab"]
        self._rows: dict[str, list[int]] = {}
        for word, count in added:
            self.add(word, count)

    @property
    def end(self) -> int:
        """The number of the token that ends a prompt."""
        return self._vocab[END]

    def add(self, word: str, count: int) -> None:
        """Append a word of `count` rows."""
        first = self.size + sum(map(len, self._rows.values()))
        self._rows[word] = list(range(first, first + count))

    def encode(self, prompt: str, padding: str = END) -> list[int]:
        """Return 77 token numbers: start, at most 75 tokens, end, and a word of the vocabulary to fill."""
        if padding not in self._vocab:
            raise UsageError(f"the tokenizer has no {padding!r}, with which the checkpoint's prompts are filled")
        ids = [self._vocab[START], *self.plain(prompt)[:READ], self._vocab[END]]
        return ids + [self._vocab[padding]] * (LENGTH - len(ids))

    def is_cut(self, prompt: str) -> bool:
        """Say whether a prompt has more tokens than are read of it."""
        return len(self.plain(prompt)) > READ

    def plain(self, prompt: str) -> list[int]:
        """Return the numbers of all tokens of a prompt, those of added words among them, without start and end."""
        ids: list[int] = []
        words = sorted(self._rows, key=len, reverse=True)
        pattern = "|".join(map(alone, words))
        parts = re.split(f"({pattern})", prompt) if words else [prompt]
        for part in parts:
            ids += self._rows.get(part) or self._tokenizer(part, add_special_tokens=False).input_ids
        return ids

    def number(self, token: str) -> int:
        """Return the number of a token of the vocabulary."""
        return self._vocab[token]


def swapped(prompt: str, word: str, other: str) -> str:
    """Return a prompt with another word wherever this one stands by itself."""
    return re.sub(alone(word), lambda _: other, prompt)
