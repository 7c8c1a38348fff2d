"""CLIP's byte-pair vocabularies: read from a folder, named by content, written for every transformers."""

from __future__ import annotations

import gzip
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from sdforge.artifact import WORDS
from sdforge.errors import UsageError, counted
from sdforge.formats.layout import HeaderOf, Layout
from sdforge.formats.safetensors import Header, is_text
from sdforge.identity import H

LENGTH = 77  # positions of CLIP's text encoders
READ = LENGTH - 2  # tokens that are read of a text: start and end take a position each
USUAL = 49_408  # words of the vocabulary that all published Stable Diffusion checkpoints share
MOST_BYTES = 64 << 20  # of a tokenizer's file; CLIP's largest has 4 MB
MERGES = Path(__file__).with_name("clip_merges.txt.gz")  # OpenAI's, under the MIT licence beside it
START, END = "<|startoftext|>", "<|endoftext|>"


@cache
def usual_words() -> dict[str, Any]:
    """Return CLIP's own vocabulary, which a single file leaves out: {"vocab", "merges"}.

    Its words are the 256 bytes as letters, the same at a word's end, what each merge makes, and the two marks.
    """
    merges = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # bytes that are no visible letters of Latin-1 are called by the letters from 256 on
    letters = [*map(chr, plain), *(chr(256 + i) for i in range(256 - len(plain)))]
    made = (merge.replace(" ", "") for merge in merges)
    words = [*letters, *(f"{letter}</w>" for letter in letters), *made, START, END]
    return {"vocab": {word: number for number, word in enumerate(words)}, "merges": merges}


def recognises(path: Path, header: Header | None) -> bool:
    """Say whether a path is a folder with nothing but a tokenizer: words for a single file, which has none."""
    both = (path / "vocab.json").is_file() and (path / "merges.txt").is_file()
    return header is None and (both or (path / "tokenizer.json").is_file())


def read_folder(path: Path, header_of: HeaderOf) -> Layout:  # noqa: ARG001 -- one signature for all readers
    """Read a tokenizer's folder as a checkpoint without networks, of no family: `swap` takes its tokenizer."""
    layout = Layout("checkpoint", "", [], dialect="transformers")
    tokenizer = read_tokenizer(path, layout.files)
    if tokenizer is None or tokenizer["added"]:
        raise UsageError(f"{path} has words of its own, which belong to a text encoder", hint="name that checkpoint")
    layout.tokenizer = {"vocab": tokenizer["vocab"], "merges": tokenizer["merges"]}
    layout.notes[WORDS] = len(tokenizer["vocab"])
    return layout


def read_tokenizer(folder: Path, files: list[Path]) -> dict[str, Any] | None:
    """Return {"vocab", "merges", "added": [[word, rows], …]} of a tokenizer folder, or None; append what was read.

    Raises UsageError for files that do not fit together.
    """
    if not folder.is_dir():
        return None
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    whole = folder / "tokenizer.json"
    try:
        if vocab.is_file() and merges.is_file():
            files += [vocab, merges]
            words = json.loads(_data(vocab))
            lines = _data(merges).decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
            pairs = [line for line in lines if line.strip() and not line.startswith("#version")]
        elif whole.is_file():
            files.append(whole)
            model = json.loads(_data(whole))["model"]
            words = model["vocab"]
            pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        else:
            raise UsageError(f"{folder} holds neither vocab.json with merges.txt nor tokenizer.json")
        added = _added(folder, len(words), files)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UsageError(f"{folder} is no CLIP tokenizer: {error}") from None
    if not is_vocabulary({"vocab": words, "merges": pairs}):
        raise UsageError(f"{folder} is no CLIP tokenizer: its words are not numbered from 0, or it has no {END}")
    return {"vocab": words, "merges": pairs, "added": added}


def _data(path: Path) -> bytes:
    """Return the bytes of one of a tokenizer's files. Raises ValueError for more than any has."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.name} has more than {MOST_BYTES:,} bytes")
    return path.read_bytes()


def is_vocabulary(value: Any) -> bool:
    """Say whether this is {"vocab": word → number, counted from 0, "merges": lines} with CLIP's two marks."""
    words, merges = (value.get(key) for key in ("vocab", "merges")) if isinstance(value, dict) else (None, None)
    if not isinstance(words, dict) or not isinstance(merges, list) or not {START, END} <= words.keys():
        return False
    numbered = all(type(number) is int for number in words.values())
    texts = all(isinstance(merge, str) for merge in merges) and is_text("".join((*words, *merges)))
    return numbered and texts and sorted(words.values()) == list(range(len(words)))


def _added(folder: Path, size: int, files: list[Path]) -> list[list[Any]]:
    """Words appended behind the vocabulary, as [word, rows]: `<x>`, `<x>_1`, `<x>_2` are the rows of one word.

    transformers 5 keeps them in tokenizer.json alone.
    """
    path, whole = folder / "added_tokens.json", folder / "tokenizer.json"
    if path.is_file():
        numbers = json.loads(_data(path))
    elif whole.is_file():
        path = whole
        numbers = {each["content"]: each["id"] for each in json.loads(_data(path)).get("added_tokens", [])}
    else:
        return []
    if path not in files:
        files.append(path)
    extra = sorted((index, word) for word, index in numbers.items() if index >= size)
    if [index for index, _ in extra] != list(range(size, size + len(extra))):
        raise ValueError(f"{path.name} leaves numbers out")
    if not all(is_text(word) for _, word in extra):
        raise TypeError(f"{path.name} has a word that is no text")
    groups: list[list[Any]] = []
    for _, word in extra:
        if groups and word == f"{groups[-1][0]}_{groups[-1][1]}":
            groups[-1][1] += 1
        else:
            groups.append([word, 1])
    return groups


def count_words(path: Path, layout: Layout, rows: dict[str, int]) -> None:
    """Note how many words text encoders read, without those that were appended.

    rows: of each text encoder's table. Where the words are known there must be as many, or UsageError is raised: where
    a prompt ends is counted from the last one, and what is appended follows it. With one too many both would be wrong,
    and nobody would be told.
    """
    tokens: Any = layout.facts.get("tokens", [])
    appended = sum(count for _, count in tokens)
    if rows:
        layout.notes[WORDS] = max(rows.values()) - appended
    if layout.tokenizer is None:
        return
    words = len(layout.tokenizer["vocab"]) + appended
    for encoder, count in rows.items():
        if count != words:
            raise UsageError(
                f"{path} has {counted(count, 'row')} in its {encoder} and {counted(words, 'word')} in its tokenizer",
                hint="save it again with the tokenizer that its text encoder was trained with, a word for each row",
            )


def read_padding(folder: Path, files: list[Path]) -> str:
    """Return the word with which a tokenizer's folder fills prompts, or nothing; append what was read.

    Where two files differ, older transformers and diffusers go by the first.
    """
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            try:
                word = json.loads(_data(path)).get("pad_token")
            except (ValueError, AttributeError, OSError, RecursionError) as error:
                raise UsageError(f"{folder} is no CLIP tokenizer: {error}") from None
            word = word.get("content") if isinstance(word, dict) else word
            if isinstance(word, str):
                if path not in files:
                    files.append(path)
                return word
    return ""


def alone(word: str) -> str:
    """Return a pattern for a word that is no part of another one."""
    return rf"(?<!\w){re.escape(word)}(?!\w)"


def stands_in(word: str, prompt: str) -> bool:
    """Say whether a prompt names a word."""
    return re.search(alone(word), prompt) is not None


def is_ordinary(word: str, tokenizer: dict[str, Any]) -> bool:
    """Say whether a word is one token of a vocabulary."""
    return f"{word.lower()}</w>" in tokenizer.get("vocab", {})


def hidden(word: str, tokenizer: dict[str, Any], whose: str) -> str:
    """Say why something new cannot be called so, or nothing; whose: the vocabulary, as the sentence names it."""
    if is_ordinary(word, tokenizer):
        return f"{word!r} is an ordinary word of {whose}; as a token it would hide that word"
    if word in tokenizer.get("vocab", {}):  # transformers would not append it, and diffusers refuses to
        return f"{word!r} is a piece of words in {whose}; as a token it would be taken for that piece"
    return ""


def tokenizer_identity(tokenizer: dict[str, Any]) -> str:
    """Name a vocabulary by its words and merges (what was appended later is a fact of the checkpoint)."""
    return H("tokenizer", {"merges": tokenizer["merges"], "vocab": tokenizer["vocab"]})


def row_words(added: list[list[Any]]) -> list[str]:
    """Return the words of the appended rows in their order, as diffusers spells them (`<x>`, `<x>_1`, …)."""
    return [word if i == 0 else f"{word}_{i}" for word, count in added for i in range(count)]


def tokenizer_files(tokenizer: dict[str, Any], added: list[list[Any]], padding: str = END) -> dict[str, str]:
    """Return the files of a tokenizer folder, for transformers 4 and 5 alike: name → text.

    padding: the word of the vocabulary with which it fills prompts.
    Appended words are neither normalised nor matched within other words: otherwise transformers folds their case and
    diffusers no longer finds their further rows.
    """
    size = len(tokenizer["vocab"])
    rows = row_words(added)
    other = {} if padding == END else {str(tokenizer["vocab"][padding]): _decoder(padding, special=True)}
    files = {
        "vocab.json": json.dumps(
            dict(sorted(tokenizer["vocab"].items(), key=lambda item: item[1])),
            ensure_ascii=False,
            separators=(",", ":"),
        ),
        "merges.txt": "\n".join(["#version: 0.2", *tokenizer["merges"], ""]),
        "special_tokens_map.json": _text(
            {"bos_token": _special(START), "eos_token": _special(END), "pad_token": padding, "unk_token": _special(END)}
        ),
        "tokenizer_config.json": _text(
            {
                "add_prefix_space": False,
                "added_tokens_decoder": {
                    **other,
                    str(tokenizer["vocab"][START]): _decoder(START, special=True, normalized=True),
                    str(tokenizer["vocab"][END]): _decoder(END, special=True, normalized=True),
                    **{str(size + i): _decoder(word, single_word=True) for i, word in enumerate(rows)},
                },
                "bos_token": START,
                "clean_up_tokenization_spaces": True,
                "do_lower_case": True,
                "eos_token": END,
                "errors": "replace",
                "model_max_length": LENGTH,
                "pad_token": padding,
                "tokenizer_class": "CLIPTokenizer",
                "unk_token": END,
            }
        ),
    }
    if rows:
        files["added_tokens.json"] = _text({word: size + i for i, word in enumerate(rows)})
    return files


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _special(word: str) -> dict[str, Any]:
    return {"content": word, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def _decoder(
    word: str, *, special: bool = False, normalized: bool = False, single_word: bool = False
) -> dict[str, Any]:
    return {
        "content": word,
        "lstrip": False,
        "normalized": normalized,
        "rstrip": False,
        "single_word": single_word,
        "special": special,
    }
