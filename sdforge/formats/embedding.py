"""Textual-inversion embeddings: the rows of one word, under whatever names programs keep them.

Read: A1111's and the first ones (pickles, converted to `emb_params`), diffusers' (the word is the tensor's name; a
folder of `learned_embeds` where there are two text encoders), kohya's and civitai's `emb_params`, OneTrainer's
`emp_params`, everyone's `clip_l` with `clip_g`; pictures that carry one; and those that a LoRA's file brings along
(`bundle_emb.NAME.…`, or beside the factors of the first implementation), when a source names which. What is added
behind a text encoder (`…_out`) no table of words can hold, and rows for a T5 (`t5` of OneTrainer and diffusers, `t5xxl`
of ComfyUI) no family here: those are refused by name. The rows beside a T5's were learned together with them, and are
not taken alone.

Canonical: one tensor per text encoder, named as the component (`text_encoder`), of shape (vectors, width). An
embedding with a word for the negative prompt too has that word's rows in a component of their own, and two files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdforge.errors import UsageError
from sdforge.families.strangers import FAMILIES_HINT
from sdforge.formats.layout import Found, HeaderOf, Layout, of_numbers
from sdforge.formats.safetensors import Header

KEY = "emb_params"
SPELLED = (KEY, "emp_params", "string_to_param.*")  # how the rows of a single text encoder are called
WHOSE = dict(zip(SPELLED, ("kohya", "OneTrainer", "A1111"), strict=True))
ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
WIDTHS = {"text_encoder": "text", "text_encoder_2": "text_2"}  # what families call how wide those are
FOLDER = {"text_encoder": "learned_embeds", "text_encoder_2": "learned_embeds_2"}  # diffusers' files, by encoder
TOKEN, POLARITY, GUIDANCE = "sdforge.token", "sdforge.polarity", "sdforge.guidance"  # metadata of files that we write
OPPOSITE = "-neg"  # behind the name of the file with the rows of a word for the negative prompt
BUNDLE = "bundle_emb."  # how the names of embeddings begin that a LoRA's file brings along
FAMILY_OF_WIDTH = {
    768: "sd15",
    1024: "sd2",
}  # widths that say more than they hide; other files take the family of the recipe
FOR_T5 = "an embedding for Stable Diffusion 3 or FLUX: it has rows for a T5, which no family here has"
BEHIND = "an embedding that is added behind the text encoder (OneTrainer makes them), where no table of words ends"
EXTENDED = "an extended textual inversion, which has a word for every layer and none for the whole"
# tensors that only other kinds of embeddings have → what has them, and why it cannot be used
OTHER = {
    **dict.fromkeys(("t5", "t5xxl"), FOR_T5),
    **dict.fromkeys(("emp_params_out", "clip_l_out", "clip_g_out", "t5_out"), BEHIND),
    "MID": EXTENDED,
}
PICTURE_TEXT = b"sd-ti-embedding"
SHOWN = 3  # words of a file that are named
MOST_CHUNKS = 256  # of a PNG that are looked at


def recognises(path: Path, header: Header | None) -> bool:
    if header is None:
        return any(file.is_file() for file in _folder_files(path, "text_encoder"))
    names, shapes = set(header.tensors), [entry.shape for entry in header.tensors.values()]
    known = bool(names) and names <= {*SPELLED, *ENCODERS, *OTHER}
    layers = "MID" in names and all(len(shape) == 2 for shape in shapes)
    one = len(names) == 1 and len(shapes[0]) in (1, 2) and not any("lora" in n for n in names)
    return known or layers or one or len(_words(header)) > 1


def read(path: Path, header: Header) -> Layout:
    if other := next((OTHER[name] for name in header.tensors if name in OTHER), ""):
        raise UsageError(f"{path} is {other}", hint=FAMILIES_HINT if other == FOR_T5 else "")
    if len(words := sorted(_words(header))) > 1:
        more = ", …" if len(words) > SHOWN else ""
        raise UsageError(
            f"{path} holds the embeddings of {len(words)} words: {', '.join(map(repr, words[:SHOWN]))}{more}",
            hint=f"embedding = {json.dumps(words[0], ensure_ascii=False)} beside `from` takes that one, "
            "and so does --embedding of `forge convert`",
        )
    layout = Layout("embedding", "", [path], dialect=_dialect(header))
    for raw in header.tensors:
        _take(layout, header, raw, ENCODERS.get(raw, "text_encoder"), 0)
    (name,) = list(header.tensors)[:1]
    own = name not in (*SPELLED, *ENCODERS)
    if header.metadata.get(POLARITY) == "negative":
        layout.facts["polarity"] = "negative"
    return _concluded(layout, header.metadata.get(TOKEN) or (name if own else path.stem))


def read_folder(path: Path, header_of: HeaderOf) -> Layout:
    """Read diffusers' files of one word, one for each text encoder."""
    layout, words = Layout("embedding", "", [], dialect="diffusers"), set()
    for encoder in FOLDER:
        file = next((file for file in _folder_files(path, encoder) if file.is_file()), None)
        if file is None:
            continue
        header = header_of(file)
        if len(header.tensors) != 1:
            raise UsageError(f"{file} holds {len(header.tensors)} words; the rows of one are read")
        (word,) = header.tensors
        words.add(word)
        layout.files.append(file)
        _take(layout, header, word, encoder, len(layout.files) - 1)
    if len(words) > 1:
        raise UsageError(f"{path} has rows of different words for its text encoders: {' and '.join(sorted(words))}")
    return _concluded(layout, words.pop())


def read_named(path: Path, header: Header, name: str) -> Layout:
    """Read one of the embeddings that a file carries, by its name. Raises UsageError where there is none of it."""
    found = carried(header)
    if name not in found and set(header.tensors) <= {*SPELLED, *ENCODERS}:  # a picture, or a file of one alone
        found = {name: list(header.tensors)}
    if name not in found:
        there = ", ".join(sorted(found)) or "none"
        raise UsageError(f"{path} carries no embedding {name!r}", hint=f"it carries {there}")
    own = {raw.removeprefix(f"{BUNDLE}{name}."): header.tensors[raw] for raw in found[name]}
    layout = of_numbers(read(path, replace(header, tensors=own, metadata={})))
    layout.facts["token"] = name
    return layout


def carried(header: Header) -> dict[str, list[str]]:
    """Return the embeddings that a file carries beside something else: name → their tensors in the file."""
    found: dict[str, list[str]] = {}
    for raw, entry in header.tensors.items():
        if raw.startswith(BUNDLE):
            rest = raw.removeprefix(BUNDLE)
            key = next((key for key in (*SPELLED, *ENCODERS, *OTHER) if rest.endswith(f".{key}")), "")
            name = rest.removesuffix(f".{key}") if key else rest.partition(".")[0]
            found.setdefault(name, []).append(raw)
        elif raw.startswith("<") and len(entry.shape) in (1, 2):
            found[raw] = [raw]
    return found | {word: [word] for word in _words(header)}


def _words(header: Header) -> list[str]:
    """Return the words of a file that holds rows of one width and nothing else, each tensor named by its word."""
    names, shapes = set(header.tensors), [entry.shape for entry in header.tensors.values()]
    rows = all(len(shape) in (1, 2) for shape in shapes) and len({shape[-1] for shape in shapes}) == 1
    inner = names & {*SPELLED, *ENCODERS, *OTHER} or any("." in name or name in ("weight", "bias") for name in names)
    return [] if inner or not rows else list(header.tensors)


def _dialect(header: Header) -> str:
    names = set(header.tensors)
    if names & set(ENCODERS):
        return "ComfyUI"
    return next((whose for name, whose in WHOSE.items() if name in names), "diffusers")


def _folder_files(path: Path, encoder: str) -> Iterable[Path]:
    return (path / f"{FOLDER[encoder]}.{ending}" for ending in ("safetensors", "bin"))


def _take(layout: Layout, header: Header, raw: str, encoder: str, file: int) -> None:
    """Add one tensor as the rows for a text encoder."""
    entry = header.tensors[raw]
    if len(entry.shape) not in (1, 2):
        place = layout.files[file]
        raise UsageError(f"{place} holds {raw!r} of {len(entry.shape)} dimensions, which is no embedding")
    shape = (1, *entry.shape) if len(entry.shape) == 1 else entry.shape
    if 0 in shape:
        raise UsageError(f"{layout.files[file]} holds {raw!r} of shape {list(entry.shape)}: a word without a vector")
    layout.tensors.append(Found("embedding", encoder, entry.dtype, shape, file, entry.offset))


def _concluded(layout: Layout, token: str) -> Layout:
    """Say what the rows tell: for which family they are, how many there are, and of which word.

    No prompt holds a word of nothing, and none that begins or ends with a blank is told from the one without: a file's
    own name stands for the former. Raises UsageError for a word that nobody can write.
    """
    token = token.strip() or layout.files[0].stem
    if not token.isprintable():
        raise UsageError(
            f"{layout.files[0]} calls its word {token!r}, which no prompt can hold",
            hint="give the file, or the word in it, a name of letters",
        )
    rows = layout.shapes()["embedding"]
    counts = {shape[0] for shape in rows.values()}
    if len(counts) != 1:
        raise UsageError(f"{layout.files[0]} has another number of vectors for each text encoder")
    layout.notes["widths"] = {WIDTHS[encoder]: shape[1] for encoder, shape in rows.items()}
    if "text_encoder" in rows:
        layout.family = FAMILY_OF_WIDTH.get(rows["text_encoder"][1], "")
    if "text_encoder_2" in rows:
        layout.family = "sdxl"
    layout.facts = {"token": token, **layout.facts}
    layout.notes["vectors"] = counts.pop()
    return layout


def carries_embedding(path: Path) -> bool:
    """Say whether a file is a PNG that has an embedding as text beside its pixels."""
    with path.open("rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return False
        for _ in range(MOST_CHUNKS):
            head = file.read(8)
            if len(head) < 8 or head[4:] == b"IEND":
                return False
            (length,) = struct.unpack(">I", head[:4])
            keyword = file.read(min(length, len(PICTURE_TEXT) + 1))
            if head[4:] in (b"tEXt", b"zTXt", b"iTXt") and keyword == PICTURE_TEXT + b"\0":
                return True
            file.seek(length - len(keyword) + 4, 1)  # past the chunk and its checksum
    return False


def words_of(facts: dict[str, Any]) -> dict[str, str]:
    """Return the component of an embedding → the word whose rows it holds."""
    words = {"embedding": str(facts["token"])}
    return words | ({"negative": str(facts["negative"])} if "negative" in facts else {})


def negative_word(facts: dict[str, Any]) -> str:
    """Return the word of an embedding that belongs into the negative prompt, or ""."""
    return str(facts["token"]) if facts.get("polarity") == "negative" else str(facts.get("negative", ""))
