"""What is published with a preset: a model card for the Hugging Face Hub, and description and fields for Civitai.

A card is `README.md` of a repository with the files of `out/NAME`; its front matter is the hub's
(https://huggingface.co/docs/hub/model-cards). The same story is told as in the report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from sdforge.references import Hub, is_remote, parse
from sdforge.report.markup import Markup, element, joined
from sdforge.report.story import Made, Story
from sdforge.report.words import size
from sdforge.target import PREVIEWS

WIDGETS = 6  # pictures of a card
HUB_LICENCES = (  # that the hub knows by name; all others are `other` there
    "cc0-1.0",
    "apache-2.0",
    "mit",
    "creativeml-openrail-m",
    "openrail",
    "openrail++",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
)
CIVITAI = {"sd15": "SD 1.5", "sd2": "SD 2.1", "sdxl": "SDXL 1.0", "unclip": "SD 2.1 Unclip"}
TRAINED = {"lora": "lora", "loha": "loha", "lokr": "lokr", "textual_inversion": "textual-inversion"}


def card(told: Story) -> str:
    """Return the model card, Markdown with YAML before it."""
    parts = [
        _front_matter(told),
        f"# {plain(told.title)}\n",
        f"{plain(told.about)}\n" if told.about else "",
        f"A preset for {told.family}, made by sdforge from the recipe below.\n",
        _gallery(told),
        _use(told),
        _licence(told),
        f"## How it was made\n\n```mermaid\n{mermaid(told)}```\n",
        _inputs(told),
        f"## Recipe\n\n{fenced(told.last.recipe, 'toml')}\n{_again(told)}\n",
        _hashes(told),
    ]
    return "\n".join(filter(None, parts))


# -- front matter ------------------------------------------------------------------------------------------------------


def _front_matter(told: Story) -> str:
    """Return the YAML that the hub reads; every value is written as JSON, which is YAML too."""
    licence = told.settings["licence"]
    known = licence.lower() in HUB_LICENCES
    values: dict[str, object] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if licence:
        values |= {"license": licence.lower()} if known else {"license": "other", "license_name": licence}
    if bases := _hub_bases(told):
        values |= {"base_model": bases, "base_model_relation": "merge" if _is_merge(told) else "finetune"}
    values["tags"] = list(dict.fromkeys(_tags(told)))
    if told.settings["trigger"]:
        values["instance_prompt"] = ", ".join(told.settings["trigger"])
    if widgets := list(_widgets(told)):
        values["widget"] = [{"text": prompt, "output": {"url": path}} for prompt, path in widgets]
    lines = "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())
    return f"---\n{lines}---\n"


def _hub_bases(told: Story) -> list[str]:
    bases = [parse(each.where) for each in told.sources if each.kind == "checkpoint" and is_remote(each.where)]
    return list(dict.fromkeys(base.repository for base in bases if isinstance(base, Hub)))


def _is_merge(told: Story) -> bool:
    return sum(each.kind == "checkpoint" for each in told.sources) > 1


def _tags(told: Story) -> Iterator[str]:
    yield from ("stable-diffusion", "text-to-image", "diffusers", "safetensors", "sdforge")
    yield told.preset["family"]
    if _is_merge(told):
        yield "merge"
    for each in told.made:
        if each.method in TRAINED:
            yield TRAINED[each.method]


def _widgets(told: Story) -> Iterator[tuple[str, str]]:
    """Yield prompt and file of the first pictures of the preset, one of each prompt."""
    seen: set[str] = set()
    drawn = any(each.id == f"{told.name}:{PREVIEWS}" for each in told.made)
    for p, prompt in enumerate(told.drawn_with.get("prompts", []) if drawn else []):
        if prompt not in seen and len(seen) < WIDGETS:
            seen.add(prompt)
            yield prompt, f"previews/{p + 1}-{told.drawn_with['seeds'][0]}-{told.name}.png"


# -- sections ----------------------------------------------------------------------------------------------------------


def _again(told: Story) -> str:
    if told.preset.get("checks", {}).get("state") == "skipped":
        return f"Its checks were skipped: `forge build --locked --no-checks {told.name}` makes the same again."
    return f"`forge build --locked {told.name}` makes the same again."


def _gallery(told: Story) -> str:
    shown = [f"| ![{plain(prompt)}](<{path}>) | {plain(prompt)} |" for prompt, path in _widgets(told)]
    return "\n".join(["| | |", "| --- | --- |", *shown, ""]) if shown else ""


def _use(told: Story) -> str:
    settings, sampler = told.settings, told.preset["sampler"]
    lines = ["## How to use it\n"]
    if settings["trigger"]:
        lines.append(f"- Trigger words: {', '.join(map(code, settings['trigger']))}")
    if settings["negative_prompt"]:
        lines.append(f"- Negative prompt: {code(settings['negative_prompt'])}")
    said = [sampler["name"]]
    said += [f"{sampler['steps']} steps"] if "steps" in sampler else []
    said += [f"guidance {sampler['guidance']:g}"] if "guidance" in sampler else []
    said += [f"{sampler['resolution']} × {sampler['resolution']} pixels"]
    lines.append(f"- Sampler: {', '.join(said)}")
    if settings["clip_skip"]:
        lines.append(f"- Clip skip: {settings['clip_skip']} in diffusers, {settings['clip_skip'] + 1} in A1111")
    baked = [row for row in told.preset["files"] if row["kind"] == "lora" and "strength" in row]
    lines += [f"- {code(row['path'])} is in it at strength {row['strength']:g}" for row in baked]
    if told.preset["words"]:
        words = ", ".join(f"{code(row['word'])} ({code(row['file'] or 'diffusers/')})" for row in told.preset["words"])
        lines.append(f"- Words that it knows: {words}; a single file has no room for them, so they lie beside it")
    example = f'import sdforge\n\npipeline = sdforge.load_preset("{told.name}")\n'
    example += f"picture = pipeline({_first_prompt(told)!r}).images[0]\n"
    return "\n".join(lines) + f"\n\n{fenced(example, 'python')}"


def _first_prompt(told: Story) -> str:
    return next(iter(told.drawn_with.get("prompts", [])), ", ".join(told.settings["trigger"]) or "a picture")


def _licence(told: Story) -> str:
    lines = ["## Licence\n", f"{plain(told.settings['licence'] or 'Not stated')}."]
    lines += [f"Its inputs together ask: {'; '.join(told.asked)}."] if told.asked else []
    lines += [f"**Mind:** {plain(reason)}." for reason in told.against]
    return "\n".join(lines) + "\n"


def mermaid(told: Story) -> str:
    """Return what is made from what as a mermaid flowchart."""
    ids = [each.id for each in told.sources] + [each.id for each in told.made]
    number = {identifier: f"n{i}" for i, identifier in enumerate(ids)}
    lines = ["flowchart LR"]
    lines += [f'  {number[each.id]}(["{each.id}"])' for each in told.sources]
    lines += [f'  {number[each.id]}["{each.name}<br/><i>{each.method}</i>"]' for each in told.made]
    lines += [f"  {number[a]} --> {number[each.id]}" for each in told.made for a in each.inputs if a in number]
    return "\n".join(lines) + "\n"


def _inputs(told: Story) -> str:
    rows = ["| input | what | from | licence | identity |", "| --- | --- | --- | --- | --- |"]
    for each in told.sources:
        what = each.kind.replace("_", " ")
        licence = plain(each.licence) or "not stated"
        rows.append(f"| {plain(each.id)} | {what} | {code(each.where)} | {licence} | {code(each.digest[:16])} |")
    return "\n".join(rows) + "\n"


def _hashes(told: Story) -> str:
    rows = ["## Files\n", "| file | size | AutoV2 | AutoV3 | sha256 |", "| --- | --- | --- | --- | --- |"]
    for row in told.preset["files"]:
        if "autov2" in row:
            known = f"{code(row['autov2'])} | {code(row['autov3'])} | {code(row['sha256'])}"
            rows.append(f"| {code(row['path'])} | {size(row['bytes'])} | {known} |")
    return "\n".join(rows) + "\n"


# -- words of people in Markdown ---------------------------------------------------------------------------------------


def plain(words: str) -> str:
    """Return a text so that Markdown shows it as it is, in one line."""
    words = re.sub(r"\s+", " ", words)
    words = re.sub(r"([\\`*_{}\[\]()|~]|^\s*[#+!-]|!(?=\[))", r"\\\1", words)
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(words: str) -> str:
    """Return a text as code within a line of Markdown, also in a table."""
    words = re.sub(r"\s+", " ", words)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", words)), default=0))
    space = " " if "`" in words else ""
    return f"{fence}{space}{words}{space}{fence}".replace("|", r"\|")


def fenced(words: str, language: str) -> str:
    """Return lines as a block of code, with a fence that none of them ends."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", words)), default=0))
    return f"{fence}{language}\n{words.rstrip()}\n{fence}\n"


# -- Civitai -----------------------------------------------------------------------------------------------------------


def civitai_description(told: Story) -> str:
    """Return the description as HTML of the few elements that Civitai keeps."""
    settings, sampler = told.settings, told.preset["sampler"]
    parts = [element("p", told.about or told.title)]
    if settings["trigger"]:
        parts.append(
            element("p", "Trigger words: ", joined(*(element("code", w) for w in settings["trigger"]), by=" "))
        )
    said = [sampler["name"], *(f"{sampler[key]:g} {key}" for key in ("steps", "guidance") if key in sampler)]
    said += [f"clip skip {settings['clip_skip'] + 1}"] if settings["clip_skip"] else []
    parts.append(element("p", "Drawn with ", ", ".join(said), "."))
    parts.append(element("h3", "How it was made"))
    parts.append(element("ul", *(element("li", _made_of(told, each)) for each in told.made)))
    parts.append(element("h3", "Made from"))
    parts.append(element("ul", *(element("li", f"{each.id}: {each.licence or 'no licence'}") for each in told.sources)))
    if told.asked:
        parts.append(element("p", f"The inputs' licences together ask: {'; '.join(told.asked)}."))
    return joined(*parts, by="\n") + "\n"


def _made_of(told: Story, each: Made) -> Markup:
    names = {made.id: made.name for made in told.made}
    inputs = ", ".join(names.get(identifier, identifier) for identifier in each.inputs)
    return joined(element("strong", each.name), f" ({each.method}) from {inputs}")


def civitai_fields(told: Story) -> str:
    """Return what Civitai's form asks for, a field a line."""
    rows = {
        "Name": told.title,
        "Type": "Checkpoint, merge" if _is_merge(told) else "Checkpoint, trained",
        "Base model": CIVITAI.get(told.preset["family"], "Other"),
        "Trigger words": ", ".join(told.settings["trigger"]),
        "Clip skip": str(told.settings["clip_skip"] + 1) if told.settings["clip_skip"] else "",
        "Licence": told.settings["licence"],
        "Licences of what it is made from": "; ".join(
            f"{each.id}: {each.licence or 'not stated'}" for each in told.sources
        ),
    }
    single = [row for row in told.preset["files"] if "autov2" in row and not row["path"].startswith("diffusers/")]
    rows |= {f"AutoV2 of {row['path']}": row["autov2"] for row in single}
    return "".join(f"{name}: {' '.join(value.split())}\n" for name, value in rows.items() if value)
