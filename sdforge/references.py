"""Names of files elsewhere, as a source's `from` writes them: the Hub, a URL, a page of Civitai, an AIR.

    hf://ORG/REPO[@REVISION][/FILE]                     a file, or without one the diffusers folder of a repository
    https://HOST/PATH                                   a file
    [https://]civitai.com/models/ID[?modelVersionId=V]  a page (without a version: the newest)
    [urn:]air:ECOSYSTEM:TYPE:SOURCE:ID[@V][+FILE][.FORMAT]   AI Resource Identifier; SOURCE: civitai or huggingface

Nothing here opens a connection: `fetch` does. A reference stands in files that git keeps: one with a secret is refused.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from sdforge.errors import UsageError
from sdforge.hidden import NAMES

PAGES = ("civitai.com/", "www.civitai.com/")
PREFIXES = ("hf://", "http://", "https://", *PAGES, "urn:air:", "air:")
SECURE_OR_HERE = ("127.0.0.1", "localhost", "::1")
PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
HUB = re.compile(rf"({PART}/{PART})(?:@((?:refs/[a-z]+/)?{PART}))?(?:/((?!/).+))?")
AIR = re.compile(
    r"(?:urn:)?air:[a-z0-9_-]+:[a-z0-9_-]+:(?P<source>[a-z]+):(?P<id>[^@+]+?)"
    r"(?:@(?P<version>[^+]+?))?(?:\+(?P<file>\d+))?(?:\.(?P<format>safetensors|diffusers|ckpt|pt|bin))?",
    re.IGNORECASE,
)
SECRETS = re.compile(NAMES, re.IGNORECASE)
FORMS = "hf://ORG/REPO@REVISION/FILE, https://…, a page of civitai.com, or an AIR (urn:air:…)"


class Hub(NamedTuple):
    """A file of a repository of the Hugging Face Hub, or its folder (file: "")."""

    repository: str
    revision: str = "main"
    file: str = ""


class Civitai(NamedTuple):
    """A file of a version of a model on Civitai; 0: the newest version, the primary file."""

    model: int
    version: int = 0
    file: int = 0


class Url(NamedTuple):
    """A file at an address."""

    address: str


Reference = Hub | Civitai | Url


def is_remote(text: str) -> bool:
    """Say whether a source's `from` names something that has to be fetched."""
    return text.lower().startswith(PREFIXES)


def is_folder(reference: Reference) -> bool:
    """Say whether a reference stands for a folder of files."""
    return isinstance(reference, Hub) and not reference.file


def parse(text: str) -> Reference:
    """Read a reference. Raises UsageError with the forms that there are."""
    lower = text.lower()
    if lower.startswith("hf://"):
        return _hub(text, text[5:])
    if lower.startswith(("urn:air:", "air:")):
        return _air(text)
    address = text if "://" in text else f"https://{text}"
    parts = address_parts(address)
    if parts is None or not parts.hostname or not text.isprintable():
        raise UsageError(f"{text!r} is no address of a file", hint=f"forms are {FORMS}")
    refuse_secrets(address)
    if parts.hostname in ("civitai.com", "www.civitai.com"):
        return _civitai(text, parts.path, parts.query)
    if parts.hostname in ("huggingface.co", "hf.co") and (found := _hub_page(text, parts.path)):
        return found
    if parts.scheme == "http" and parts.hostname not in SECURE_OR_HERE:
        raise UsageError(f"{text!r} would come over a line that anybody can change", hint="https://…")
    return Url(address)


def address_parts(address: str) -> SplitResult | None:
    """Return the parts of an address, or None for what no host and port can be read from."""
    try:
        parts = urlsplit(address)
        (parts.hostname or "").encode("idna")  # a name that no host can have
        parts.port  # noqa: B018 -- that is no number, or none of a port
    except ValueError:
        return None
    return parts


def without_query(address: str) -> str:
    """Return an address without what may hold a secret."""
    parts = address_parts(address)
    if parts is None:
        return "an unreadable address"
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"


def refuse_secrets(address: str) -> None:
    """Raise UsageError for an address with a password or token, without showing it; an AIR and a path hold none."""
    written = f"https://{address}" if address.lower().startswith(PAGES) else address
    parts = address_parts(written)
    if parts is None or "://" not in written:
        return
    named = [name for name in parse_qs(parts.query, keep_blank_values=True) if SECRETS.fullmatch(name)]
    if named or parts.password or (parts.username and parts.scheme in ("http", "https")):
        where = f"{parts.hostname}{parts.path}"
        what = f"a secret ({', '.join(named)})" if named else "a name or password"
        raise UsageError(
            f"the address of {where} holds {what}, which git would keep and everybody read",
            hint="leave it out, and set CIVITAI_TOKEN, HF_TOKEN or, for a remote cache, FORGE_REMOTE_TOKEN; what "
            "another host gives to members only is downloaded by hand into a folder of forge.local.toml",
        )


def _hub(text: str, rest: str) -> Hub:
    found = HUB.fullmatch(rest)
    if not found or ".." in rest.split("/"):
        raise UsageError(f"{text!r} names no file of the Hub", hint="as in hf://ORG/REPO@REVISION/FILE")
    return Hub(found[1], found[2] or "main", found[3] or "")


def _hub_page(text: str, path: str) -> Hub | None:
    """Read the address that a browser shows of a repository of models, its files at a revision, or one of them.

    None: a file of a repository of data sets, which is an address like any other. Raises UsageError for other pages.
    """
    parts = [unquote(part) for part in path.strip("/").split("/")]
    repository = "/".join(parts[:2])
    if len(parts) >= 5 and parts[2] in ("blob", "resolve", "raw"):
        return _hub(text, f"{repository}@{parts[3]}/{'/'.join(parts[4:])}")
    if len(parts) == 2 or (len(parts) == 4 and parts[2] == "tree"):
        return _hub(text, "@".join([repository, *parts[3:]]))
    if parts[0] == "datasets" and "resolve" in parts:
        return None
    raise UsageError(f"{text!r} is no page of a model's file on the Hub", hint="as in hf://ORG/REPO@REVISION/FILE")


def _civitai(text: str, path: str, query: str) -> Civitai:
    parts = path.strip("/").split("/")
    versions = parse_qs(query).get("modelVersionId", [])
    if parts[0] == "models" and len(parts) > 1 and parts[1].isdigit():
        if not versions or versions[0].isdigit():
            return Civitai(int(parts[1]), int(versions[0]) if versions else 0)
    elif parts[:3] == ["api", "download", "models"] and len(parts) == 4 and parts[3].isdigit():
        return Civitai(0, int(parts[3]))
    raise UsageError(f"{text!r} is no page of a model on Civitai", hint="as in civitai.com/models/ID?modelVersionId=V")


def _air(text: str) -> Reference:
    found = AIR.fullmatch(text)
    numbers = found and found["id"].isdigit() and (found["version"] or "0").isdigit()
    if found and found["source"].lower() == "civitai" and numbers:
        return Civitai(int(found["id"]), int(found["version"] or 0), int(found["file"] or 0))
    if found and found["source"].lower() == "huggingface":
        version = f"@{found['version']}" if found["version"] else ""
        return _hub(text, f"{found['id']}{version}")
    raise UsageError(
        f"{text!r} is no AIR that can be fetched", hint="as in urn:air:sdxl:checkpoint:civitai:833294@1190596"
    )
