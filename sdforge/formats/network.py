"""One network of a checkpoint alone: a U-Net as diffusers names it, a VAE as diffusers or a single file does.

It is a file, or a folder of diffusers (`unet/`, `vae/`: configuration and weights, also in parts). VAEs are handed
around so (`vae-ft-mse-840000`, `sdxl-vae-fp16-fix`), to take the place of a checkpoint's own. All families share their
topology, so a VAE is of no family. No tensor tells its scale: where it is swapped in, the scale of what was there
holds, unless a folder's configuration states its own (or the metadata of a file of ours).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdforge.errors import UsageError
from sdforge.families import Family, Name, families, family
from sdforge.families.naming import lacking
from sdforge.families.stable_diffusion import CROSS, EMA
from sdforge.families.strangers import FAMILIES_HINT, stranger_unet, stranger_vae
from sdforge.formats.diffusers_folder import canonical_name, read_json, weight_files
from sdforge.formats.layout import Found, HeaderOf, Layout, shape_here
from sdforge.formats.safetensors import Entry, Header
from sdforge.formats.single_file import note_unsaid, stated_facts
from sdforge.identity import Json

Files = list[tuple[Path, Header]]

CLASSES = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}  # of a folder's configuration → what it is
VAE = "first_stage_model."  # how its names begin in a whole checkpoint, and in some files of it alone
AROUND = ("loss.", EMA)  # what LDM's own training of a VAE leaves beside it


def recognises(path: Path, header: Header | None) -> bool:
    return bool(_network(header) if header else _stated(path))


def _network(header: Header) -> str:
    names = header.tensors
    if "conv_in.weight" in names and CROSS in names:
        return "unet"
    start = VAE if f"{VAE}decoder.conv_in.weight" in names else ""
    return "vae" if f"{start}decoder.conv_in.weight" in names and f"{start}encoder.conv_in.weight" in names else ""


def _stated(path: Path) -> str:
    config = path / "config.json"
    return CLASSES.get(str(read_json(config).get("_class_name")), "") if config.is_file() else ""


def read(path: Path, header: Header) -> Layout:
    if _network(header) == "unet":
        return _read_unet(path, [(path, header)])
    layout, some = _read_vae(path, [(path, header)]), families()[0]
    stated = stated_facts(path, header.metadata, some)
    layout.facts = {fact: value for fact, value in stated.items() if some.owners[fact] == "vae"}
    return layout


def read_folder(path: Path, header_of: HeaderOf) -> Layout:
    component, config = _stated(path), read_json(path / "config.json")
    files = [(file, header_of(file)) for file in weight_files(path, component)]
    layout = (_read_unet if component == "unet" else _read_vae)(path, files)
    layout.files.append(path / "config.json")
    try:
        layout.facts = _unet_facts(layout.family, config) if component == "unet" else _vae_facts(config)
    except UsageError as error:
        raise UsageError(f"{path} {error.message}", error.hint) from None
    return layout


def _unet_facts(name: str, config: dict[str, Any]) -> dict[str, Json]:
    return family(name).facts_of_folder({"unet": config})


def _vae_facts(config: dict[str, Any]) -> dict[str, Json]:
    """Return what a VAE's configuration states, in full: what is neutral differs between families.

    A scale that it leaves out is not taken to be diffusers' default, which is that of Stable Diffusion 1.
    """
    some = families()[0]
    found = some.facts_of_folder({"vae": config})
    stated = ("vae_groups", "latent_scaling") if "scaling_factor" in config else ("vae_groups",)
    return {fact: some.fact(found, fact) for fact in stated}


def _tensors(files: Files) -> dict[str, Entry]:
    return {name: entry for _, header in files for name, entry in header.tensors.items()}


def _read_unet(path: Path, files: Files) -> Layout:
    shapes = {name: entry.shape for name, entry in _tensors(files).items()}
    if other := stranger_unet(shapes):
        raise UsageError(f"{path} is the U-Net of {other}, which cannot be used here", hint=FAMILIES_HINT)
    found = next((each for each in families() if _has(each, shapes)), None)
    if found is None:
        raise UsageError(f"{path} is a U-Net of no family that is known here", hint=FAMILIES_HINT)
    layout = Layout("checkpoint", found.name, [], dialect="diffusers")
    known = {name.canonical: name for name in found.names() if name.component == "unet"}
    _take(path, files, layout, found, known)
    note_unsaid(layout, found, files[0][1].metadata)
    layout.notes["widths"] = found.widths(layout.shapes())
    return layout


def _has(of: Family, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Say whether a U-Net is one of a family: by its names, and by whether its attentions stand between matrices."""
    names = [name for name in of.names() if name.component == "unet"]
    needed, known = {name.canonical for name in names if not name.optional}, {name.canonical for name in names}
    if not needed <= shapes.keys() <= known:
        return False
    rank = len(shapes["mid_block.attentions.0.proj_in.weight"])
    return of.is_conv("unet.mid_block.attentions.0.proj_in") == (rank == 4)


def _read_vae(path: Path, files: Files) -> Layout:
    """Read a VAE, whose names are those of every family."""
    of = families()[0]
    names = [name for name in of.names() if name.component == "vae"]
    shapes = {raw.removeprefix(VAE): entry.shape for raw, entry in _tensors(files).items()}
    ldm = any(raw.startswith("decoder.mid.") for raw in shapes)
    known = {name.single.removeprefix(VAE) if ldm else name.canonical: name for name in names}
    if other := stranger_vae(shapes):
        raise UsageError(f"{path} is {other}, which cannot be used here", hint=FAMILIES_HINT)
    layout = Layout("checkpoint", "", [], dialect="LDM" if ldm else "diffusers")
    _take(path, files, layout, of, known)
    return layout


def _take(path: Path, files: Files, layout: Layout, of: Family, known: dict[str, Name]) -> None:
    """Let a layout have all tensors of the files. Raises UsageError for those that are unknown, and for gaps."""
    component, unknown = next(iter(known.values())).component, []
    for number, (file, header) in enumerate(files):
        layout.files.append(file)
        for raw, entry in header.tensors.items():
            called = raw.removeprefix(VAE)
            name = known.get(called) or known.get(canonical_name(component, called))
            if name is not None:
                shape = shape_here(file, of, name, raw, entry.shape)
                layout.tensors.append(Found(component, name.canonical, entry.dtype, shape, number, entry.offset))
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
