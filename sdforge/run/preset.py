"""A preset's folder → a ready pipeline of diffusers: networks, words, sampler, defaults, sidecars."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdforge.errors import BrokenPromise, UsageError
from sdforge.families import Family, family
from sdforge.formats.custom_diffusion import second_row_file
from sdforge.formats.diffusers_folder import folder_files
from sdforge.formats.layout import Layout, read_layout
from sdforge.formats.own import own_statement
from sdforge.formats.safetensors import read_header
from sdforge.formats.tokenizer import alone, read_tokenizer, tokenizer_files
from sdforge.outputs import MANIFEST
from sdforge.report.cells import described_html, sheet_html
from sdforge.run.noise import scaled_linear
from sdforge.run.sample import solver
from sdforge.store.files import sha256_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMS = ("diffusers", "checkpoint")
SAID = ("preset", "family", "words", "negative_prompt", "clip_skip", "sampler", "sidecars", "files")  # of a preset


def load_preset(path: Path, *, form: str = "", device: str = "cpu", dtype: str = "fp32") -> Any:
    """See `sdforge.load_preset`."""
    root, form = _found(path, form)
    described = _described(root)
    if dtype not in DTYPES:
        raise UsageError(f"there is no type of numbers {dtype!r}", hint=f"one of {', '.join(DTYPES)}")
    precision, of = DTYPES[dtype], family(described["family"])
    _verify(root, described, form)
    load = _from_folder if form == "diffusers" else _from_file
    with _quiet():
        pipeline = load(root, described, of, precision)
    pipeline.scheduler = _scheduler(pipeline)
    _let_skip(pipeline)
    _ready(pipeline, described, root)
    pipeline.to(device)
    for row in described["sidecars"]:
        _attach(pipeline, root, row)
    return pipeline


def _found(path: Path, form: str) -> tuple[Path, str]:
    """Return the preset's folder, and in which of its forms it is loaded."""
    root = path
    if (path / "model_index.json").is_file():
        root, form = path.parent, form or "diffusers"
    elif path.is_file():
        root, form = path.parent, form or ("checkpoint" if path.suffix == ".safetensors" else "")
    if not (root / "preset.json").is_file():
        raise UsageError(f"{path} is no preset: there is no preset.json", hint="name the folder out/RECIPE")
    if form and form not in FORMS:
        raise UsageError(f"a preset has no form {form!r}", hint=f"one of {', '.join(FORMS)}")
    return root, form or ("diffusers" if (root / "diffusers" / "model_index.json").is_file() else "checkpoint")


def _described(root: Path) -> dict[str, Any]:
    try:
        described: dict[str, Any] = json.loads((root / "preset.json").read_bytes())
        version = int(described["v"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{root / 'preset.json'} is no description of a preset") from None
    if version != MANIFEST:
        later = version > MANIFEST
        raise UsageError(
            f"{root / 'preset.json'} is of version {version}, and this sdforge reads version {MANIFEST}",
            hint="install a newer sdforge" if later else f"forge build {described.get('preset', '')} writes it anew",
        )
    if "grid" in described:
        raise UsageError(f"{root} is no preset: it holds the grid of a sweep", hint=f"its presets are {root}-1, …")
    if lost := [name for name in SAID if name not in described]:
        hint = "`forge build` writes it anew, and keeps this one in out/.replaced"
        raise UsageError(f"{root / 'preset.json'} does not say its {lost[0]}", hint=hint)
    return described


def _verify(root: Path, described: dict[str, Any], form: str) -> None:
    """Compare the files that will be loaded with what was written. Raises BrokenPromise for another one.

    One that is not there is missed where it is loaded. It costs one reading of the files.
    """
    single = f"{described['preset']}.safetensors"
    words = tuple(row["file"] for row in described["words"] if row["file"])
    loaded = ("diffusers/",) if form == "diffusers" else (single, "diffusers/tokenizer/", *words)
    for row in described["files"]:
        path = root / row["path"]
        if row["path"].startswith((*loaded, "sidecars/")) and path.is_file() and sha256_of(path) != row["sha256"]:
            raise BrokenPromise(
                f"{path} is not the file that was written there",
                hint=f"forge build {described['preset']} writes it anew, and keeps this one in out/.replaced",
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Let libraries say nothing of what they load: no bars, and no advice to install what is not needed."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [each for each in (of_diffusers, of_transformers) if each.is_progress_bar_enabled()]
    levels = [(each, each.get_verbosity()) for each in (of_diffusers, of_transformers)]
    for each, _ in levels:
        each.disable_progress_bar()
        each.set_verbosity_error()
    try:
        yield
    finally:
        for each, level in levels:
            each.set_verbosity(level)
        for each in shown:
            each.enable_progress_bar()


# -- networks and words ------------------------------------------------------------------------------------------------


def _from_folder(root: Path, described: dict[str, Any], of: Family, precision: torch.dtype) -> Any:
    """Load the diffusers folder, which has the words in its tokenizer."""
    folder = root / "diffusers"
    if not (folder / "model_index.json").is_file():
        raise UsageError(
            f"{root} has no diffusers folder", hint=f'[preset] export = ["diffusers"] in {described["preset"]}'
        )
    return _pipeline(of).from_pretrained(folder, dtype=precision, local_files_only=True)


def _from_file(root: Path, described: dict[str, Any], of: Family, precision: torch.dtype) -> Any:
    """Load the single file by configurations of our own, and put the words behind its vocabulary."""
    file = root / f"{described['preset']}.safetensors"
    if not file.is_file():
        raise UsageError(
            f"{root} has neither a diffusers folder nor {file.name}", hint=f"forge build {described['preset']}"
        )
    kind = _pipeline(of)
    if not hasattr(kind, "from_single_file"):
        raise UsageError(
            f"diffusers opens no single file of {of.title}",
            hint=f'[preset] export = ["diffusers"] in {described["preset"]}',
        )
    layout = read_layout(file)
    with tempfile.TemporaryDirectory() as folder:
        _write_configs(Path(folder), root, of, layout)
        pipeline = kind.from_single_file(str(file), config=folder, dtype=precision, local_files_only=True)
    for row in described["words"]:
        _add_word(pipeline, root, row, described["preset"])
    return pipeline


def _pipeline(of: Family) -> Any:
    return getattr(importlib.import_module("diffusers"), of.pipeline)


def _write_configs(folder: Path, root: Path, of: Family, layout: Layout) -> None:
    """Write what a single file does not say of itself in a way that diffusers reads."""
    vocabulary = layout.tokenizer or _vocabulary(root)
    texts = folder_files(of, of.configs(layout.facts, layout.shapes()))
    files = {name: json.dumps(value) for name, value in texts.items()}
    for tokenizer, padding in of.tokenizers().items():
        if vocabulary is None:
            raise UsageError(
                f"{root} holds no vocabulary, as single files have none",
                hint='[preset] export = ["diffusers"] writes one; or put a folder `tokenizer` with vocab.json and '
                "merges.txt beside the file",
            )
        own = tokenizer_files(vocabulary, [], str(of.fact(layout.facts, padding)))
        files |= {f"{tokenizer}/{name}": text for name, text in own.items()}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _vocabulary(root: Path) -> dict[str, Any] | None:
    places = (root / "tokenizer", root / "diffusers" / "tokenizer")
    return next((found for place in places if place.is_dir() and (found := read_tokenizer(place, []))), None)


def _add_word(pipeline: Any, root: Path, row: dict[str, Any], preset: str) -> None:
    """Put a word's rows behind the token tables.

    It is matched as it is written and never within another word, as diffusers folders have it.
    """
    from tokenizers import AddedToken

    word = row["word"]
    if not row["file"]:
        raise UsageError(
            f"the word {word!r} has no file beside the checkpoint, which has no room for it",
            hint=f'[preset] export = [..., "embeddings"] in {preset}; of Custom Diffusion "custom-embeddings"',
        )
    rows = _rows(root / row["file"])
    names = [word, *(f"{word}_{i}" for i in range(1, row["vectors"]))]
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipeline, name, None)
        if encoder is None:
            continue
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        table_VD = encoder.get_input_embeddings().weight
        if len(tokenizer) != table_VD.shape[0] or name not in rows:
            raise UsageError(f"{row['file']} does not fit the {name.replace('_', ' ')} of {preset}")
        tokenizer.add_tokens([AddedToken(each, normalized=False, single_word=True) for each in names])
        grown_VD = torch.cat([table_VD, rows[name].to(table_VD.dtype)])
        # not by `resize_token_embeddings`, which draws random numbers for rows and rounds the table's size
        encoder.set_input_embeddings(nn.Embedding(grown_VD.shape[0], grown_VD.shape[1], _weight=grown_VD))
        encoder.config.vocab_size = grown_VD.shape[0]


def _rows(path: Path) -> dict[str, Tensor]:
    """Return text encoder → rows of a word, of its file; of Custom Diffusion the second encoder's lie beside it."""
    found = {ref.name: _tensor(path, ref) for ref in read_layout(path).tensors}
    if (second := second_row_file(path)) is not None:
        (ref,) = read_layout(second).tensors
        found["text_encoder_2"] = _tensor(second, ref)
    return found


def _tensor(path: Path, found: Any) -> Tensor:
    from safetensors.torch import load_file

    raw = next(name for name, entry in read_header(path).tensors.items() if entry.offset == found.offset)
    tensor: Tensor = load_file(path)[raw].reshape(found.shape)
    return tensor


# -- drawing -----------------------------------------------------------------------------------------------------------


def _scheduler(pipeline: Any) -> Any:
    """Return the sampler of the previews, for the schedule that the pipeline has."""
    config = pipeline.scheduler.config
    schedule = scaled_linear(
        config.beta_start,
        config.beta_end,
        config.prediction_type,
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
    )
    return solver(schedule)


def _let_skip(pipeline: Any) -> None:
    """Let diffusers find the inner model of a text encoder, which transformers since 5.6 has no longer.

    Without it `clip_skip` raises AttributeError.
    """
    encoder = getattr(pipeline, "text_encoder", None)
    if encoder is not None and not hasattr(encoder, "text_model"):
        encoder.__dict__["text_model"] = encoder  # no module of its own, which would be saved twice


def _ready(pipeline: Any, described: dict[str, Any], root: Path) -> None:
    """Give a pipeline the preset's words and defaults. It is saved and shown under the name of its class."""
    kind = type(pipeline)
    pipeline.__class__ = type(kind.__name__, (_Ready, kind), {"__doc__": kind.__doc__})
    pipeline.preset, pipeline.pictures, pipeline.preset_folder = described, {}, root


class _Ready:
    """What a preset adds to a pipeline of diffusers."""

    preset: dict[str, Any]
    pictures: dict[str, Any]
    preset_folder: Path
    _skip: int | None = None  # of the call that runs

    def __call__(self, *arguments: Any, **wishes: Any) -> Any:
        """Draw, with the preset's advice for whatever is not said."""
        call = super().__call__  # type: ignore[misc]
        signature = inspect.signature(call)
        said = signature.bind_partial(*arguments, **wishes).arguments
        advice = {k: v for k, v in self._advice(said).items() if k in signature.parameters and k not in said}
        self._skip = said.get("clip_skip", advice.get("clip_skip"))
        return call(*arguments, **advice, **wishes)

    def _repr_html_(self) -> str:
        return described_html(self.preset) + sheet_html(self.preset_folder)

    def _advice(self, said: dict[str, Any]) -> dict[str, Any]:
        sampler = self.preset["sampler"]
        found = {
            "guidance_scale": sampler.get("guidance"),
            "num_inference_steps": sampler.get("steps"),
            "height": sampler["resolution"],
            "width": sampler["resolution"],
            "clip_skip": self.preset["clip_skip"] or None,
        }
        negative = self.preset["negative_prompt"]
        if negative and said.get("negative_prompt_embeds") is None:
            prompt = said.get("prompt")
            found["negative_prompt"] = [negative] * len(prompt) if isinstance(prompt, list) else negative
        return {name: value for name, value in found.items() if value is not None}

    def encode_prompt(self, *arguments: Any, **wishes: Any) -> Any:
        """Encode both sides of guidance with the same layers left out.

        diffusers leaves them out of one side, and some of its pipelines of neither, whatever they are told.
        """
        encode = super().encode_prompt  # type: ignore[misc]
        said = inspect.signature(encode).bind(*arguments, **wishes).arguments
        skip = said.setdefault("clip_skip", self._skip)
        found = encode(**said)
        prompt, guided = said.get("prompt"), said.get("do_classifier_free_guidance", True)
        if not (skip and guided and prompt) or said.get("negative_prompt_embeds") is not None:
            return found
        negative = said.get("negative_prompt") or ""
        if isinstance(prompt, list) and isinstance(negative, str):
            negative = [negative] * len(prompt)
        shared = {name: said[name] for name in ("device", "num_images_per_prompt", "clip_skip") if name in said}
        if negative or not self.config.get("force_zeros_for_empty_prompt"):  # type: ignore[attr-defined]
            other = encode(prompt=negative, do_classifier_free_guidance=False, **shared)
            found = (found[0], other[0], *found[2:])
        return found

    def maybe_convert_prompt(self, prompt: Any, tokenizer: Any) -> Any:
        """Write out every word of several rows: `<cat>` → `<cat> <cat>_1`.

        diffusers' own replaces within words, so that one that begins as another one does comes out wrong.
        """
        if isinstance(prompt, list):
            return [self.maybe_convert_prompt(each, tokenizer) for each in prompt]
        counts = {row["word"]: row["vectors"] for row in self.preset["words"]}
        if not counts:
            return prompt
        words = "|".join(alone(word) for word in sorted(counts, key=len, reverse=True))
        return re.sub(words, lambda found: _written_out(found[0], counts[found[0]]), prompt)


def _written_out(word: str, vectors: int) -> str:
    return " ".join([word, *(f"{word}_{i}" for i in range(1, vectors))])


def _attach(pipeline: Any, root: Path, row: dict[str, Any]) -> None:
    """Let a sidecar take part in all that the pipeline draws, or add what it draws by itself."""
    from safetensors.torch import load_file

    kinds = importlib.import_module("sdforge.sidecars")
    path = root / row["path"]
    if not path.is_file():
        raise UsageError(
            f"{path} is not there, and {row['name']} is a part of the preset", hint="`forge build` writes it"
        )
    _, facts = own_statement(read_header(path).metadata)
    tensors = load_file(path)
    if module := kinds.attached(row["kind"]):
        module.attach_pipeline(pipeline, tensors, facts)
    if module := kinds.replayed(row["kind"]):
        # it was found without anything left out
        draw = module.attach_pipeline(pipeline, tensors, facts)
        pipeline.pictures[row["name"]] = partial(draw, clip_skip=None)
