"""`report.html`: a preset's story as one page that opens from the disk, without network and without scripts.

Whatever people wrote (prompts, names, recipes) is text in it: `markup` escapes it, and the page's policy lets nothing
run or be fetched.
"""

from __future__ import annotations

import glob
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdforge import __version__
from sdforge.grids import ABOUT, PICTURE
from sdforge.report.curves import loss_drawing
from sdforge.report.graph_drawing import Box, graph_drawing
from sdforge.report.markup import Markup, element, joined
from sdforge.report.pictures import SHEET, Pictures, uri, webp
from sdforge.report.story import Column, Made, Row, Source, Story, Training, changed_lines
from sdforge.report.words import seconds, size

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
STYLE = Path(__file__).with_name("page.css")
STATES = {"built": "built", "fetched": "fetched", "restored": "reused", "reused": "reused"}
HERO = 4  # pictures beside the name
COMMENT = re.compile(r"((?:[^#\"']|\"[^\"]*\"|'[^']*')*)(.*)")  # a line of TOML: what is said, and a comment behind it
NUMBERS = ("took", "holds", "size")  # columns that hold numbers
SHORT = 12  # digits of a digest that are shown; all of them stand in its title


def page(told: Story, read: Callable[[str], bytes], out: Path) -> str:
    """Return the page. read: sha256 of a picture → its bytes; out: the preset's folder, beside which grids lie."""
    return _Page(told, read, out).html()


class _Page:
    def __init__(self, told: Story, read: Callable[[str], bytes], out: Path) -> None:
        self.told, self.out = told, out
        names = [cell for row in told.rows for cell in row.cells]
        names += [sha256 for each in told.trainings for _, _, sha256 in each.samples]
        self.pictures = Pictures(names, read)

    def html(self) -> str:
        sections = [
            ("pictures", "Pictures", self._gallery()),
            ("grids", "Grids", self._grids()),
            ("checks", "Checks", self._checks()),
            ("made", "How it was made", self._making()),
            ("trainings", "Trainings", joined(*map(self._training, self.told.trainings))),
            ("inputs", "Inputs", self._inputs()),
            ("recipe", "Recipe", self._recipe()),
            ("files", "Files", self._files()),
        ]
        shown = [row for row in sections if row[2]]
        body = element(
            "body",
            self._head(),
            element("nav", *(element("a", title, href=f"#{name}") for name, title, _ in shown), aria_label="Sections"),
            element("main", *(_section(*row) for row in shown)),
            self._foot(),
        )
        head = element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", f"{self.told.title}: how it was made"),
            element("style", Markup(STYLE.read_text(encoding="utf-8"))),
        )
        return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"

    # -- the head --------------------------------------------------------------------------------------------------

    def _head(self) -> Markup:
        told, settings = self.told, self.told.settings
        kind = [told.family, told.dtype, *(["v-prediction"] if told.prediction == "v_prediction" else [])]
        kind += [f"clip skip {settings['clip_skip']}"] if settings["clip_skip"] else []
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(told.last.made))
        built = sum(did.state == "built" for did in told.last.steps.values())
        spent = f"{built} of {len(told.last.steps)} targets built, the others reused" if built else "all of it reused"
        spent = "all of it built" if 0 < built == len(told.last.steps) else spent
        words = element(
            "div",
            element("p", " · ".join(filter(None, kind)), class_="kind"),
            element("h1", told.title),
            element("p", told.about, class_="about") if told.about else "",
            element("p", f"Built {made}", " · ", spent, class_="quiet"),
            self._facts(),
        )
        return element("header", words, self._hero())

    def _hero(self) -> Markup:
        own = [row for row in self.told.rows if row.cells and row.cells[-1] in self.pictures and row.seed is not None]
        first = {row.prompt: row for row in reversed(own)}  # one of each prompt, then further seeds
        chosen = [row for row in own if first[row.prompt] is row] + [row for row in own if first[row.prompt] is not row]
        chosen = chosen[: HERO if len(chosen) >= HERO else 1]
        shown = [self._picture(row.cells[-1], f"{row.prompt}, seed {row.seed}") for row in chosen]
        return element("div", *shown, class_="hero" if len(shown) > 1 else "hero one") if shown else Markup()

    def _facts(self) -> Markup:
        told, settings = self.told, self.told.settings
        rows: list[tuple[str, Markup]] = []
        if settings["trigger"]:
            rows.append(("trigger", joined(*(element("code", word) for word in settings["trigger"]), by=" ")))
        if settings["negative_prompt"]:
            rows.append(("negative", element("code", settings["negative_prompt"])))
        if settings["licence"] or told.asked:
            rows.append(("licence", self._licence()))
        single = next((file for file in told.preset["files"] if file["path"] == f"{told.name}.safetensors"), None)
        if single:
            known = [f"{name} {single[key]}" for name, key in (("AutoV2", "autov2"), ("AutoV3", "autov3"))]
            rows.append(("hashes", joined(*(element("code", each) for each in known), by=" ")))
        lies, kept = told.disk
        rows.append(("disk", joined(f"{size(lies)} in out/{told.name}/, {size(kept)} in the cache")))
        rows.append(("time", joined(f"{seconds(told.seconds)} to make all of it{self._machine()}")))
        return _pairs(rows)

    def _machine(self) -> str:
        known = self.told.machine
        said = [f"on {known['device']}"] if known.get("device") else []
        return ", ".join(["", *said, *([f"torch {known['torch']}"] if known.get("torch") else [])])

    def _licence(self) -> Markup:
        told = self.told
        asked = f"the inputs ask: {'; '.join(told.asked)}" if told.asked else ""
        lines = [element("span", " · ".join(filter(None, [told.settings["licence"] or "none stated", asked])))]
        lines += [element("span", "▲ ", ticked(reason), class_="warning") for reason in told.against]
        return joined(*lines, by=" ")

    # -- pictures --------------------------------------------------------------------------------------------------

    def _picture(self, name: str, alt: str) -> Markup:
        if name not in self.pictures:
            return element("span", "not drawn", class_="none")
        width, height = self.pictures.size(name)
        return element("img", src=self.pictures.uri(name), alt=alt, width=width, height=height)

    def _gallery(self) -> Markup:
        told = self.told
        if not any(cell in self.pictures for row in told.rows for cell in row.cells):
            return Markup()
        said = ["Same prompts, same seeds, same noise in every column."]
        if told.lost:
            said.append("What the build before drew is not in the cache any more.")
        elif told.before is None:
            said.append("There is no earlier build to compare with yet.")
        head = element("tr", element("td"), *(self._column(column) for column in told.columns))
        body = [self._group(prompt, rows) for prompt, rows in _by_prompt(told.rows)]
        table = element("table", element("thead", head), *body, class_="pictures")
        return joined(element("p", " ".join(said), class_="quiet"), element("div", table, class_="wide"), self._drawn())

    def _column(self, column: Column) -> Markup:
        about = {"base": "base", "before": "this recipe", "previous": self._when(), "preset": "this build"}[column.role]
        small = element("small", about) if about else ""
        return element("th", element("span", column.label), small, scope="col", class_=column.role)

    def _when(self) -> str:
        before = self.told.before
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(before.made)) if before else ""

    def _group(self, prompt: str, rows: list[Row]) -> Markup:
        across = len(self.told.columns) + 1
        head = element("tr", element("th", prompt, colspan=across, scope="rowgroup", class_="prompt"))
        return element("tbody", head, *(self._row(row) for row in rows))

    def _row(self, row: Row) -> Markup:
        label = row.note or f"seed {row.seed}"
        cells = []
        for column, cell in zip(self.told.columns, row.cells, strict=True):
            alt = f"{column.label}: {row.prompt}, {label}"
            cells.append(element("td", self._picture(cell, alt), class_=column.role))
        return element("tr", element("th", label, scope="row"), *cells)

    def _drawn(self) -> Markup:
        how = self.told.drawn_with
        sampler = self.told.preset["sampler"]
        said = [sampler["name"], f"{how['steps']} steps", f"guidance {how['guidance']:g}"]
        said += [f"{sampler['resolution']} × {sampler['resolution']} pixels"]
        said += [f"clip skip {how['clip_skip']}"] if how["clip_skip"] else []
        said += [f"negative prompt “{how['negative_prompt']}”"] if how["negative_prompt"] else []
        return element("p", "Drawn with ", ", ".join(said), ".", class_="quiet")

    def _grids(self) -> Markup:
        found = []
        for (data, width, height), axes in _grids(self.out):
            image = element("img", src=uri(data), alt=f"Grid of {axes}", width=width, height=height)
            found.append(element("figure", image, element("figcaption", axes)))
        return joined(*found)

    def _checks(self) -> Markup:
        said = self.told.preset.get("checks", {})
        if said.get("state") == "skipped":
            return element("p", "▲ Written without its checks (--no-checks).", class_="warning")
        rows = [_check_row(each) for each in said.get("results", [])]
        if not rows:
            return Markup()
        head = _head_row("check", "kind", "verdict")
        return element("div", element("table", element("thead", head), element("tbody", *rows)), class_="wide")

    # -- how it was made -------------------------------------------------------------------------------------------

    def _making(self) -> Markup:
        told = self.told
        boxes = [Box(each.id, each.id, each.kind.replace("_", " "), "source", "") for each in told.sources]
        for each in told.made:
            state = STATES[each.did.state]
            boxes.append(Box(each.id, each.name, each.method, state, state, tuple(each.inputs)))
        drawing = graph_drawing(boxes, f"What {told.title} is made from")
        head = _head_row("target", "method", "last build", "took", "holds", "result")
        rows = [_made_row(each) for each in told.made]
        return joined(
            element("div", drawing, class_="wide"),
            element("div", element("table", element("thead", head), element("tbody", *rows)), class_="wide"),
        )

    def _training(self, each: Training) -> Markup:
        title = f"{each.method}, {each.steps} steps in {seconds(each.seconds)}"
        said = [each.remark] if each.remark else []
        if each.validation and each.recommended:
            least = min(loss for _, loss in each.validation)
            said.append(f"On held-out pictures the loss is least at step {each.recommended}: {least:.4f}.")
        elif each.validation:
            said.append("On held-out pictures no step did better than the checkpoint itself.")
        elif each.losses:
            said.append("No pictures were held out, so nothing recommends a step.")
        parts = [element("h3", each.name, element("small", title))]
        if each.losses:
            parts.append(loss_drawing(each.losses, each.validation, each.recommended, f"Loss of {each.name}"))
            parts.append(_legend(held_out=bool(each.validation)))
        else:
            said.append("Its losses are not in the cache any more.")
        parts += [element("p", line, class_="quiet") for line in said]
        return element("article", *parts, self._samples(each))

    def _samples(self, each: Training) -> Markup:
        drawn = [row for row in each.samples if row[2] in self.pictures]
        if not drawn:
            return Markup()
        steps, prompts = sorted({row[0] for row in drawn}), list(dict.fromkeys(row[1] for row in drawn))
        found = {(at, prompt): name for at, prompt, name in drawn}
        head = element("tr", element("td"), *(element("th", f"step {at}", scope="col") for at in steps))
        rows = []
        for prompt in prompts:
            cells = [self._sample(found.get((at, prompt), ""), f"{prompt}, after step {at}") for at in steps]
            rows.append(element("tr", element("th", prompt, scope="row"), *cells))
        table = element("table", element("thead", head), element("tbody", *rows), class_="pictures samples")
        return element("div", table, class_="wide")

    def _sample(self, name: str, alt: str) -> Markup:
        return element("td", self._picture(name, alt))

    # -- the record ------------------------------------------------------------------------------------------------

    def _inputs(self) -> Markup:
        head = _head_row("input", "what", "from", "licence", "size", "identity")
        rows = [_source_row(each) for each in self.told.sources]
        table = element("div", element("table", element("thead", head), element("tbody", *rows)), class_="wide")
        files = [
            (f"{each.id}/{name}" if name else each.id, sha256)
            for each in self.told.sources
            for name, sha256 in each.files.items()
        ]
        listed = _pairs([(name, element("code", sha256)) for name, sha256 in files])
        return joined(
            table, element("details", element("summary", "sha256 of every file of a model"), listed) if files else ""
        )

    def _recipe(self) -> Markup:
        told = self.told
        lines = changed_lines(told.before.recipe if told.before else told.last.recipe, told.last.recipe)
        changes = sum(mark != "=" for mark, _ in lines)
        said = "The first build." if told.before is None else "As in the build before."
        if changes and told.before is not None:
            said = f"Changed since the build of {self._when()}: new lines are marked +, what is gone −."
        return joined(
            element("p", said, class_="quiet"),
            element("pre", *(_line(mark, line) for mark, line in lines), class_="recipe", tabindex=0),
        )

    def _files(self) -> Markup:
        head = _head_row("file", "what", "size", "AutoV2", "AutoV3", "sha256")
        rows = [_file_row(file) for file in self.told.preset["files"]]
        return element("div", element("table", element("thead", head), element("tbody", *rows)), class_="wide")

    def _foot(self) -> Markup:
        name = self.told.name
        return element(
            "footer",
            element("p", element("code", f"forge build --locked {name}"), " makes the same again from forge.lock. "),
            element("p", f"Written by sdforge {__version__}."),
        )


def _section(name: str, title: str, inside: Markup) -> Markup:
    return element("section", element("h2", title), inside, id=name)


def ticked(words: str) -> Markup:
    """Return a sentence with what stands between backticks as code."""
    parts = words.split("`")
    return joined(*(element("code", part) if i % 2 and i < len(parts) - 1 else part for i, part in enumerate(parts)))


def _pairs(rows: list[tuple[str, Markup]]) -> Markup:
    return element("dl", *(joined(element("dt", name), element("dd", value)) for name, value in rows))


def _head_row(*titles: str) -> Markup:
    return element("tr", *(element("th", t, scope="col", class_="number" if t in NUMBERS else None) for t in titles))


def _digest(digest: str) -> Markup:
    return element("code", digest[:SHORT], title=digest) if digest else Markup()


def _made_row(each: Made) -> Markup:
    state = STATES[each.did.state]
    why = joined(": ", ticked(each.did.why)) if each.did.why else ""
    return element(
        "tr",
        element("th", each.name, scope="row"),
        element("td", each.method),
        element("td", element("b", state, class_=state), why),
        element("td", seconds(each.seconds), class_="number"),
        element("td", size(each.size) if each.size else "", class_="number"),
        element("td", _digest(each.did.digest)),
    )


def _source_row(each: Source) -> Markup:
    what = each.kind.replace("_", " ")
    count = f", {each.pictures} pictures" if each.pictures > 1 else ""
    return element(
        "tr",
        element("th", each.id, scope="row"),
        element("td", f"{what}{count}"),
        element("td", element("code", each.where)),
        element("td", each.licence or "not stated"),
        element("td", size(each.size) if each.size else "", class_="number"),
        element("td", _digest(each.digest)),
    )


def _file_row(file: dict[str, str | int]) -> Markup:
    return element(
        "tr",
        element("th", file["path"], scope="row"),
        element("td", str(file["kind"]).replace("_", " ")),
        element("td", size(int(file["bytes"])), class_="number"),
        element("td", _digest(str(file.get("autov2", "")))),
        element("td", _digest(str(file.get("autov3", "")))),
        element("td", _digest(str(file["sha256"]))),
    )


def _check_row(each: dict[str, Any]) -> Markup:
    verdict = element("b", each["state"], class_="reused" if each["state"] == "passed" else None)
    said = joined(verdict, ": ", ticked(each["says"])) if each.get("says") else verdict
    return element("tr", element("th", each["check"], scope="row"), element("td", each["kind"]), element("td", said))


def _legend(*, held_out: bool) -> Markup:
    said = [element("span", "loss, running mean", class_="loss"), element("span", "loss of each step", class_="noise")]
    said += [element("span", "held-out pictures", class_="held-out")] if held_out else []
    return element("p", *said, class_="legend", aria_hidden="true")


def _line(mark: str, line: str) -> Markup:
    """Return a line of a recipe: `=` as it was, `+` new, `-` gone."""
    tag = {"=": "span", "+": "ins", "-": "del"}[mark]
    sign = {"=": " ", "+": "+", "-": "−"}[mark]
    written, comment = COMMENT.match(line).groups()  # type: ignore[union-attr]  # it matches every line
    inside = joined(written, element("span", comment, class_="comment") if comment else "")
    return element(tag, element("i", sign), inside, class_="table" if line.startswith("[") else None)


def _by_prompt(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield the rows of each prompt; a sidecar's own pictures are a group for themselves."""
    found: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        found.setdefault((row.prompt, row.seed is None), []).append(row)
    for (prompt, _), own in found.items():
        yield prompt, own


def _grids(out: Path) -> Iterator[tuple[tuple[bytes, int, int], str]]:
    """Yield the grids of a recipe's sweeps, which lie beside its preset's folder: picture, and what its axes are."""
    for path in sorted(out.parent.glob(f"{glob.escape(out.name.partition('@')[0])}@*/{ABOUT}")):
        if grid := _grid(path):
            yield grid


def _grid(path: Path) -> tuple[tuple[bytes, int, int], str] | None:
    """Return a grid by its description; None for what is the description of a preset, or lies there damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, SyntaxError):  # SyntaxError: Pillow's, of a damaged PNG
        axes = json.loads(path.read_bytes())["grid"]["axes"]
        said = " × ".join(f"{axis['key']} = {', '.join(map(str, axis['values']))}" for axis in axes)
        return webp(path.with_name(PICTURE).read_bytes(), *SHEET), said
    return None
