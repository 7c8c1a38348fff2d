"""What stands behind a reference: which files, where, with which hashes. A host is one function that asks its API.

Mirrors: HF_ENDPOINT (as the Hub's own programs read it) and CIVITAI_ENDPOINT. Tokens: HF_TOKEN (or what `hf auth login`
left), CIVITAI_TOKEN.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from sdforge.errors import ResourceError, UsageError
from sdforge.fetch.wire import Remote, ask
from sdforge.lines import Token, hub_endpoint, hub_token, secret
from sdforge.names import DEVICES, is_digest
from sdforge.references import Civitai, Hub, Reference, Url, is_folder

LONGEST = 255  # bytes of a file's name
ALLOWED = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
CHECKPOINT = ("*.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors")
NETWORK = ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.safetensors.index.json")
NEVER = (
    *("safety_checker/*", "feature_extractor/*", "image_processor/*"),
    *("*.fp16.*", "*.bf16.*", "*.non_ema.*", "*.msgpack"),  # the same weights once more
)


@dataclass(frozen=True)
class Behind:
    """What a reference stands for now.

    pinned: the reference with its revision resolved, as the lock keeps it; whole: it is a folder of files; about:
    licence and trigger words, as its page says; size: bytes of all files of a folder together, where only the lock
    tells which there are (0: their host has told).
    """

    pinned: str
    files: tuple[Remote, ...]
    token: Token | None = None
    whole: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    size: int = 0


def resolve(reference: Reference) -> Behind:
    """Ask what a reference stands for. Raises UsageError (there is no such thing), ResourceError (network)."""
    if isinstance(reference, Hub):
        return _hub(reference)
    return _civitai(reference) if isinstance(reference, Civitai) else _url(reference)


def _url(reference: Url) -> Behind:
    name = unquote(urlsplit(reference.address).path.rpartition("/")[2])
    return Behind(reference.address, (Remote(plain(name), reference.address),))


def plain(name: str) -> str:
    """Return the last part of a name, which becomes one of a file here. Raises UsageError."""
    odd = not name.isprintable() or any(c in name for c in '/\\:<>"|?*')
    ends = name.startswith((".", " ")) or name.endswith((".", " "))
    device = name.partition(".")[0].rstrip().lower() in DEVICES
    if not name or odd or ends or device or len(name.encode()) > LONGEST:
        raise UsageError(f"{name[:80]!r} is no name that a file can have everywhere")
    return name


def _digest(found: Any) -> str:
    """Return a sha256 as we write it, "" where a host states none. Raises ValueError for what is none."""
    text = str(found or "").lower()
    if text and not is_digest(text):
        raise ValueError(f"{text:.80} is no sha256")
    return text


@contextmanager
def _understood(who: str, about: str) -> Iterator[None]:
    """Turn what an answer of another shape makes of our code into one sentence."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise ResourceError(f"{who}'s answer about {about} is not understood") from None


# -- the Hub -----------------------------------------------------------------------------------------------------------


def _hub(reference: Hub) -> Behind:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    endpoint = hub_endpoint()
    token = hub_token()
    try:
        found = HfApi(endpoint, token=token.value or False).model_info(
            reference.repository, revision=reference.revision, files_metadata=True, timeout=30
        )
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise UsageError(
            f"the Hub has no {reference.repository} at {reference.revision}, or shows it to its members only",
            hint=f"https://huggingface.co/{reference.repository}; a token in HF_TOKEN opens what it may see",
        ) from None
    except (HfHubHTTPError, OSError) as error:  # its client's errors of the line are OSErrors
        raise _unreachable(reference, error) from None
    except Exception as error:  # of the HTTP library underneath, which is not ours to name
        raise _unreachable(reference, error) from None
    if not found.sha:
        raise ResourceError(f"the Hub's answer about {reference.repository} names no revision")
    siblings = {each.rfilename: each for each in found.siblings or ()}
    names = [reference.file] if reference.file else checkpoint_files(sorted(siblings))
    if reference.file and reference.file not in siblings:
        raise UsageError(
            f"{reference.repository} has no {reference.file} at {reference.revision}", hint=_some(sorted(siblings))
        )
    if not names:
        raise UsageError(
            f"{reference.repository} is no folder of a checkpoint in safetensors",
            hint=f"name a file: hf://{reference.repository}/…; {_some(sorted(siblings))}",
        )
    where = f"{endpoint}/{reference.repository}/resolve/{found.sha}"
    files = []
    for name in names:
        lfs = siblings[name].lfs
        shown = plain(name.rpartition("/")[2]) if reference.file else "/".join(map(plain, name.split("/")))
        with _understood("the Hub", reference.repository):
            size = int(siblings[name].size or 0)
            files.append(Remote(shown, f"{where}/{quote(name)}", _digest(lfs and lfs.sha256), size))
    licence = str(getattr(found.card_data, "license", "") or "")
    pinned = f"hf://{reference.repository}@{found.sha}{'/' if reference.file else ''}{reference.file}"
    about = {"licence": licence} if licence else {}
    return Behind(pinned, tuple(files), token, is_folder(reference), about)


def _unreachable(reference: Hub, error: Exception) -> ResourceError:
    return ResourceError(
        f"the Hub could not be asked for {reference.repository}: {_short(error)}",
        hint="is this machine online? HF_ENDPOINT names a mirror; `--offline` does without what is not here",
    )


def checkpoint_files(names: list[str]) -> list[str]:
    """Return what of a repository is a checkpoint in diffusers' layout, or one network of it, as a VAE's has.

    Nothing if it has neither model_index.json nor config.json, or its weights in other files than safetensors' only.
    """
    whole = "model_index.json" in names
    patterns = CHECKPOINT if whole else NETWORK if "config.json" in names else ()
    wanted = [n for n in names if any(fnmatch(n, p) for p in patterns) and not any(fnmatch(n, p) for p in NEVER)]
    wanted = [name for name in wanted if name.count("/") < (2 if whole else 1)]
    return wanted if any(name.endswith(".safetensors") for name in wanted) else []


def _some(names: list[str]) -> str:
    fitting = [name for name in names if name.endswith(ALLOWED)]
    return f"it has {', '.join([*fitting[:5], *(['…'] * (len(fitting) > 5))])}" if fitting else "it has no weights"


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# -- Civitai -----------------------------------------------------------------------------------------------------------


def _civitai(reference: Civitai) -> Behind:
    endpoint = os.environ.get("CIVITAI_ENDPOINT", "").rstrip("/") or "https://civitai.com"
    token = Token(urlsplit(endpoint).netloc, "CIVITAI_TOKEN", secret("CIVITAI_TOKEN"))
    version = reference.version or _newest(endpoint, reference.model, token)
    about = ask(f"{endpoint}/api/v1/model-versions/{version}", token)
    with _understood("Civitai", f"version {version}"):
        files = about["files"]
        model = int(about.get("modelId") or reference.model)
        if reference.model and model != reference.model:
            raise UsageError(f"version {version} on Civitai is of model {model}, not of {reference.model}")
        chosen = _chosen(files, reference.file, version)
        name, sha256 = plain(chosen["name"]), _digest(chosen["hashes"].get("SHA256"))
        address, near = str(chosen["downloadUrl"]), round(float(chosen.get("sizeKB", 0)) * 1024)
        words = [word.strip() for word in about.get("trainedWords", []) if word.strip()]
        pinned = f"air:any:model:civitai:{model}@{version}+{int(chosen['id'])}"
    return Behind(pinned, (Remote(name, address, sha256, near=near),), token, about={"trigger": words} if words else {})


def _newest(endpoint: str, model: int, token: Token) -> int:
    about = ask(f"{endpoint}/api/v1/models/{model}", token)
    with _understood("Civitai", f"model {model}"):
        versions = about.get("modelVersions") or []
        if not versions:
            raise UsageError(f"model {model} on Civitai has no version")
        return int(versions[0]["id"])


def _chosen(files: list[dict[str, Any]], wanted: int, version: int) -> dict[str, Any]:
    """Return the file with an id; else the primary one of those in safetensors. Raises UsageError."""
    if wanted:
        fitting = [file for file in files if file["id"] == wanted]
    else:
        fitting = [file for file in files if str(file["name"]).endswith(".safetensors")] or files
        fitting = sorted(fitting, key=lambda file: (not file.get("primary"), file["id"]))
    if not fitting:
        names = ", ".join(f"{file['id']} ({file['name']})" for file in files) or "none"
        raise UsageError(f"version {version} on Civitai has no file {wanted or ''}".rstrip(), hint=f"it has {names}")
    return fitting[0]
