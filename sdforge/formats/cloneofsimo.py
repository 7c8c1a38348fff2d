"""LoRA files of the first implementation for diffusion models (github.com/cloneofsimo/lora): read.

Factors have numbers instead of names (`unet:0:up`, `text_encoder:3:down`): the place in the walk over a network of
2022, whose ways down and up come before its middle, and whose blocks hold the first attention, the feed-forward layer
and then the second attention; with diffusers since 2023 the feed-forward layer comes last, and the shapes tell. Only
layers of the classes that the metadata names are counted: the first files were made without `GEGLU`. There is no
alpha: the update is up @ down.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from sdforge.errors import UsageError
from sdforge.families import Family, family, family_names
from sdforge.formats.kohya import BUNDLED
from sdforge.formats.layout import Layout
from sdforge.formats.lora import lora_layout
from sdforge.formats.safetensors import Entry, Header

KEY = re.compile(r"^(\w+):(\d+):(up|down)$")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED = "ff.net.0.proj"
UNET = (*(f"attn1.{part}" for part in ATTENTION), FEED, *(f"attn2.{part}" for part in ATTENTION))
LATER = (*(part for part in UNET if part != FEED), FEED)
TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")
USUAL = {  # component → the classes of layers whose matrices have factors; one attention has had two names
    "unet": {"CrossAttention", "Attention", "GEGLU"},
    "text_encoder": {"CLIPAttention"},
}
WAYS = ("down_blocks", "up_blocks", "mid_block")
EMBEDDING = "<embed>"


def recognises(path: Path, header: Header | None) -> bool:  # noqa: ARG001 -- one signature for all readers
    return header is not None and any(KEY.match(name) for name in header.tensors)


def read(path: Path, header: Header) -> Layout:
    found: dict[str, dict[int, dict[str, Entry]]] = {}
    embeddings = []
    for raw, entry in header.tensors.items():
        if match := KEY.match(raw):
            component, place, side = match.groups()
            found.setdefault(component, {}).setdefault(int(place), {})[f"lora_{side}"] = entry
        elif header.metadata.get(raw) == EMBEDDING:
            embeddings.append(raw)
        else:
            raise UsageError(f"{path} holds {raw}, which cannot be read here")
    fed = {component: _is_fed(path, component, header.metadata.get(component, "[]")) for component in found}
    for name in family_names():
        walk = {component: places(family(name), component, fed=fed[component]) for component in found}
        if all(set(own) <= set(range(len(walk[component]))) for component, own in found.items()):
            if "unet" in found and fed["unet"] and _is_later(walk["unet"], found["unet"]):
                walk["unet"] = places(family(name), "unet", later=True)
            break
    else:
        raise UsageError(f"{path} has factors for more layers than any family known here has")
    entries = {walk[component][place]: own for component, table in found.items() for place, own in table.items()}
    layout = lora_layout(path, family(name), entries, {})
    layout.dialect = "cloneofsimo"
    if embeddings:
        layout.passed[BUNDLED] = len(embeddings)
        layout.notes["embeddings"] = sorted(embeddings)
    return layout


def places(of: Family, component: str, *, fed: bool = True, later: bool = False) -> list[str]:
    """Return the modules of a family's component in the order of that walk.

    fed: with the feed-forward layers; later: which come last.
    """
    own = LATER if later else UNET
    parts = TEXT if component != "unet" else own if fed else tuple(part for part in own if part != FEED)
    blocks: dict[str, list[str]] = {}
    for name in of.names():
        module = f"{name.component}.{name.canonical.removesuffix('.weight')}"
        part = next((p for p in parts if module.endswith(f".{p}")), None)
        if part and name.component == component:
            blocks.setdefault(module.removesuffix(f".{part}"), []).append(part)
    ordered = sorted(blocks, key=lambda block: next((i for i, way in enumerate(WAYS) if f".{way}." in block), 0))
    return [f"{block}.{part}" for block in ordered for part in parts]


def _is_later(walk: list[str], found: dict[int, dict[str, Entry]]) -> bool:
    """Say whether feed-forward layers come last: what stands in their place in the walk of 2022 is square.

    They have eight rows for every column, and of the attention that follows there is then the matrix of queries.
    """
    pairs = (own for place, own in found.items() if walk[place].endswith(FEED) and len(own) == len(("up", "down")))
    return any(own["lora_up"].shape[:1] == own["lora_down"].shape[1:2] for own in pairs)


def _is_fed(path: Path, component: str, text: str) -> bool:
    """Say whether feed-forward layers are counted; text: the classes that are, as JSON, or an empty list for the usual.

    Raises UsageError for classes that are not counted here.
    """
    try:
        classes = json.loads(text)
    except (ValueError, RecursionError):
        classes = [text]
    usual = USUAL.get(component, set())
    named = set(map(str, classes)) if isinstance(classes, list) else {text}
    if not named <= usual or named == {"GEGLU"}:
        raise UsageError(f"{path} counts other layers of {component} than usual: {text[:80]}")
    return not named or "GEGLU" in named
