"""`preset.json`: what lies in a preset's folder, for people and for programs that load it (`sdforge.load_preset`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from sdforge import sampler
from sdforge.artifact import DIFFUSERS, DIGITS, SIDECARS, Artifact
from sdforge.families import family
from sdforge.formats.custom_diffusion import endings as custom_endings
from sdforge.formats.custom_diffusion import words_of as custom_words
from sdforge.formats.embedding import OPPOSITE, negative_word, words_of
from sdforge.outputs import ADVISED, MANIFEST, verdicts
from sdforge.plan import Step


def describe_preset(step: Step, names: dict[str, str], beside: list[dict[str, Any]]) -> bytes:
    """Return the description of an export: files with the hashes by which other programs know them, words, settings.

    AutoV2 is the first 10 digits of the file's sha256; AutoV3 the first 12 of the sha256 of all bytes after the
    header (Civitai's names). beside: rows of what lies beside models for other programs.
    """
    described = preset_of(step, names)
    described["files"] = sorted([*described["files"], *beside], key=lambda row: row["path"])
    return (json.dumps(described, indent=2, ensure_ascii=False) + "\n").encode()


def preset_of(step: Step, names: dict[str, str]) -> dict[str, Any]:
    """Return what is said of an export and of the files that it wrote."""
    assert step.result is not None
    settings = json.loads(step.node.target.settings)
    checkpoint = step.inputs[0][1]
    assert checkpoint is not None
    files = [_file(step, file, names[file], row) for file, row in sorted(step.result.files.items())]
    return {
        "v": MANIFEST,
        "preset": step.node.recipe.name,
        "family": step.node.recipe.family,
        "checkpoint": checkpoint.digest,
        "words": list(_words(checkpoint, files)),
        "negative_prompt": settings["negative_prompt"],
        "clip_skip": settings["clip_skip"],
        "sampler": _sampler(step, checkpoint),
        "trigger": settings["trigger"],
        "licence": settings["licence"],
        "sidecars": _sidecars(files),
        "checks": verdicts(step),
        "files": files,
    }


def _sampler(step: Step, checkpoint: Artifact) -> dict[str, Any]:
    """What the previews were drawn with, and so what pictures like them need."""
    previews = (step.node.recipe.preset or {}).get("previews", {})
    of = family(step.node.recipe.family)
    advised = {name: previews[name] for name in ADVISED if name in previews}
    return {
        "name": sampler.SAMPLER,
        "diffusers": sampler.CLASS,
        "settings": sampler.SETTINGS,
        "prediction": of.fact(checkpoint.facts, "prediction"),
        "zero_terminal_snr": of.fact(checkpoint.facts, "zero_terminal_snr"),
        **advised,
        "resolution": advised.get("resolution") or of.fact(checkpoint.facts, "resolution"),
    }


def _words(checkpoint: Artifact, files: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the words that the diffusers folder knows beside the vocabulary, in the order of their rows."""
    rows = [row for row in files if row["kind"] in ("embedding", "custom") and row["path"].endswith(".safetensors")]
    named = [(row["trigger"] + row.get("negative", []), row) for row in rows if DIFFUSERS not in row["path"]]
    found = {word: row for words, row in named for word in words}
    tokens: Any = checkpoint.facts.get("tokens", [])
    for word, vectors in tokens:
        row = found.get(word, {})
        yield {
            "word": word,
            "vectors": vectors,
            "negative": word in row.get("negative", []),
            "file": row.get("path", ""),
        }


def _sidecars(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sidecars in the order in which previews attach them: by kind, then by digest, as the files are."""
    rows = [row for row in files if row["path"].startswith("sidecars/") and row["path"].endswith(".safetensors")]
    rows.sort(key=lambda row: SIDECARS.index(row["kind"]))
    return [{key: row[key] for key in ("name", "kind", "path", "strength")} for row in rows]


def _file(step: Step, file: str, name: str, row: list[Any]) -> dict[str, Any]:
    """Return what is said of a file, and of the artifact that it holds."""
    role, _, rest = file.partition("/")
    found: dict[str, Any] = {"path": name, "kind": "diffusers" if role == "diffusers" else "checkpoint"}
    preset = step.node.recipe.preset or {}
    for link, artifact in step.inputs:
        if artifact is None or (link.use.role, artifact.digest[:DIGITS]) != (role, rest[:DIGITS]):
            continue
        reference = link.use.reference
        found |= {"kind": artifact.kind, "name": reference, "trigger": artifact.notes.get("trigger", [])}
        found |= {"licence": artifact.notes["licence"]} if artifact.notes.get("licence") else {}
        if artifact.kind == "embedding":
            opposite = rest[DIGITS:].startswith(OPPOSITE)
            word = words_of(artifact.facts)["negative" if opposite else "embedding"]
            found |= {"trigger": [], "negative": []}
            found["negative" if word == negative_word(artifact.facts) else "trigger"] = [word]
        elif artifact.kind == "custom":
            words = enumerate(custom_words(artifact.facts))
            found["trigger"] = [word for i, word in words if rest[DIGITS:] in custom_endings(i)]
            if "/" not in rest:  # the rows of a word without the matrices, which to other programs are an embedding
                found["kind"] = "embedding"
        if role == "sidecars" or reference in preset.get("bake", {}):
            found["strength"] = preset.get("bake", {}).get(reference, artifact.facts.get("strength", 1.0))
        found |= {fact: artifact.facts[fact] for fact in ("guidance", "steps", "prompt") if fact in artifact.facts}
        break
    return found | file_row(name, row)


def file_row(name: str, row: list[Any]) -> dict[str, Any]:
    """Return what is said of one file: [sha256, bytes, sha256 of the tensors' bytes]."""
    found = {"path": name, "sha256": row[0], "bytes": row[1]}
    if len(row) > 2:
        found |= {"autov2": row[0][:10].upper(), "autov3": row[2][:12].upper()}
    return found
