"""One network of a checkpoint alone: a U-Net as diffusers names it, a VAE as diffusers or a single file does.

VAEs are handed around so (`vae-ft-mse-840000`, `sdxl-vae-fp16-fix`), to take the place of a checkpoint's own. All
families share their topology and nothing in the file tells its scale, so a VAE is of no family: where it is swapped
in, the scale of what was there holds.
"""

from __future__ import annotations

from pathlib import Path

from sdforge.errors import UsageError
from sdforge.families import Family, Name, families
from sdforge.families.naming import lacking
from sdforge.families.stable_diffusion import CROSS, EMA
from sdforge.families.strangers import FAMILIES_HINT, TOLD
from sdforge.formats.diffusers_folder import canonical_name
from sdforge.formats.layout import Found, Layout
from sdforge.formats.safetensors import Header
from sdforge.formats.single_file import note_unsaid

VAE = "first_stage_model."  # how its names begin in a whole checkpoint, and in some files of it alone
AROUND = ("loss.", EMA)  # what LDM's own training of a VAE leaves beside it


def recognises(path: Path, header: Header | None) -> bool:  # noqa: ARG001 -- one signature for all readers
    return header is not None and bool(_network(header))


def _network(header: Header) -> str:
    names = header.tensors
    if "conv_in.weight" in names and CROSS in names:
        return "unet"
    start = VAE if f"{VAE}decoder.conv_in.weight" in names else ""
    return "vae" if f"{start}decoder.conv_in.weight" in names and f"{start}encoder.conv_in.weight" in names else ""


def read(path: Path, header: Header) -> Layout:
    return _read_unet(path, header) if _network(header) == "unet" else _read_vae(path, header)


def _read_unet(path: Path, header: Header) -> Layout:
    if other := TOLD.get(header.tensors["conv_in.weight"].shape[1]):
        raise UsageError(f"{path} is the U-Net of {other}, which cannot be used here", hint=FAMILIES_HINT)
    family = next((each for each in families() if _has(each, header)), None)
    if family is None:
        raise UsageError(f"{path} is a U-Net of no family that is known here", hint=FAMILIES_HINT)
    layout = Layout("checkpoint", family.name, [path], dialect="diffusers")
    known = {name.canonical: name for name in family.names() if name.component == "unet"}
    _take(path, header, layout, family, known)
    note_unsaid(layout, family, header.metadata)
    layout.notes["widths"] = family.widths(layout.shapes())
    return layout


def _has(family: Family, header: Header) -> bool:
    """Say whether a U-Net is one of a family: by its names, and by whether its attentions stand between matrices."""
    names = [name for name in family.names() if name.component == "unet"]
    needed, known = {name.canonical for name in names if not name.optional}, {name.canonical for name in names}
    if not needed <= set(header.tensors) <= known:
        return False
    rank = len(header.tensors["mid_block.attentions.0.proj_in.weight"].shape)
    return family.is_conv("unet.mid_block.attentions.0.proj_in") == (rank == 4)


def _read_vae(path: Path, header: Header) -> Layout:
    """Read a VAE, whose names are those of every family."""
    family = families()[0]
    names = [name for name in family.names() if name.component == "vae"]
    ldm = any(raw.removeprefix(VAE).startswith("decoder.mid.") for raw in header.tensors)
    known = {name.single.removeprefix(VAE) if ldm else name.canonical: name for name in names}
    layout = Layout("checkpoint", "", [path], dialect="LDM" if ldm else "diffusers")
    _take(path, header, layout, family, known)
    return layout


def _take(path: Path, header: Header, layout: Layout, family: Family, known: dict[str, Name]) -> None:
    """Let a layout have all tensors of a file. Raises UsageError for those that are unknown, and for gaps."""
    component, unknown = next(iter(known.values())).component, []
    for raw, entry in header.tensors.items():
        called = raw.removeprefix(VAE)
        name = known.get(called) or known.get(canonical_name(component, called))
        if name is not None:
            shape = family.canonical_shape(name, entry.shape)
            layout.tensors.append(Found(component, name.canonical, entry.dtype, shape, 0, entry.offset))
        elif raw.startswith(AROUND):
            layout.passed["what the network was trained with"] += 1
        else:
            unknown.append(raw)
    here = [tensor.name for tensor in layout.tensors]
    if unknown or len(set(here)) < len(here):
        odd = unknown or [name for name in here if here.count(name) > 1]
        raise UsageError(f"{path} holds tensors that no {component} here has: {', '.join(odd[:3])}")
    if gaps := lacking(known.values(), here):
        raise UsageError(f"{path} has a {component} without {gaps[0]}", hint="the file is incomplete")
