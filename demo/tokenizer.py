"""A small CLIP tokenizer: byte pairs, `</w>` at a word's end, and every word of our captions one token.

Its files are those of every CLIP tokenizer (vocab.json, merges.txt), so other programs read them. The 256 bytes stand
in the vocabulary twice, inside a word and at its end, so that any text has tokens.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING

from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from demo.attributes import ACCESSORY_CLAUSES, BACKGROUNDS, EXPRESSIONS, EYE_COLOURS, HAIR_COLOURS, HAIR_STYLES, PERSONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77
WORD_END = "</w>"

# Besides the attributes: the words of captions, and some that people will try, which no training caption holds.
_CAPTION_WORDS = "flat ink drawing of a an with hair eyes background"
_FRIENDLY_WORDS = (
    "chalk sketch pastel portrait picture painting style art photo the and in on at by is to for it face head person "
    "woman man child cat dog robot star stars night sky moon sun happy cute red gold silver dark light wearing"
)


def words() -> list[str]:
    """Every word that becomes one token, in a fixed order."""
    lists = (EXPRESSIONS, PERSONS, HAIR_STYLES, HAIR_COLOURS, EYE_COLOURS, BACKGROUNDS, ACCESSORY_CLAUSES.values())
    texts = [text for texts in lists for text in texts]
    everything = " ".join([_CAPTION_WORDS, *texts, _FRIENDLY_WORDS]).split()
    return list(dict.fromkeys(everything))


def byte_alphabet() -> list[str]:
    """Return the printable characters that stand for the 256 bytes, in the order of every CLIP vocabulary.

    Bytes that print (Latin-1 without blanks) stand for themselves; the others take code points from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]


def make_merges(vocabulary: Iterable[str]) -> list[tuple[str, str]]:
    """Merge each word's pieces into one: repeatedly the most frequent neighbours, ties by first sight."""
    split = [[*word[:-1], word[-1] + WORD_END] for word in vocabulary]
    merges: list[tuple[str, str]] = []
    while True:
        counts: dict[tuple[str, str], int] = {}
        for pieces in split:
            for pair in pairwise(pieces):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            return merges
        best = max(counts, key=lambda pair: counts[pair])
        merges.append(best)
        split = [_joined(pieces, best) for pieces in split]


def _joined(pieces: Sequence[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


class Tokenizer:
    """Text to 77 ids: start, the text's tokens (cut if too many), end, padded with end as Stable Diffusion 1.x does."""

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
        self.vocabulary = vocabulary
        self.merges = merges
        self._bpe = FastTokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=WORD_END))
        self._bpe.normalizer = normalizers.Lowercase()
        # CLIP's words: letters, single digits, or runs of other signs; then bytes.
        pattern = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    @classmethod
    def new(cls) -> Tokenizer:
        """Return the demo's tokenizer, made from the demo's words."""
        merges = make_merges(words())
        alphabet = byte_alphabet()
        tokens = [*alphabet, *(character + WORD_END for character in alphabet), *(a + b for a, b in merges), START, END]
        return cls({token: index for index, token in enumerate(tokens)}, merges)

    @classmethod
    def read(cls, folder: Path) -> Tokenizer:
        """Return the tokenizer of a base folder."""
        vocabulary = json.loads((folder / "vocab.json").read_text())
        lines = (folder / "merges.txt").read_text().splitlines()[1:]
        pairs = [line.split(" ") for line in lines if line]
        return cls(vocabulary, [(pair[0], pair[1]) for pair in pairs])

    def __len__(self) -> int:
        return len(self.vocabulary)

    def id_of(self, token: str) -> int:
        """Return the id of one token of the vocabulary."""
        return self.vocabulary[token]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """77 ids for each text."""
        start, end = self.id_of(START), self.id_of(END)
        rows = []
        for text in texts:
            tokens = self._bpe.encode(text).ids[: MAX_TOKENS - 2]
            rows.append([start, *tokens] + [end] * (MAX_TOKENS - 1 - len(tokens)))
        return rows

    def write(self, folder: Path) -> None:
        """Write vocab.json, merges.txt and the two small files that CLIPTokenizer wants."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(self.vocabulary, ensure_ascii=False) + "\n")
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n")
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
        config = special | {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": MAX_TOKENS,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
