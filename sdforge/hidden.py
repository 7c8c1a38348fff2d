"""Secrets in texts: what is quoted of files and addresses has stars in their places.

A secret that somebody wrote into a recipe or `forge.toml` is refused (see `references`); the words that say so, and all
others that quote such a file, go to terminals, to logs of other programs and into reports.
"""

from __future__ import annotations

import re

NAMES = (  # of what holds a secret, in an address or as a setting
    r"(?:(?:access|api|auth|x-amz-security)?[-_]?token|api[-_]?key|password|secret|sig|(?:x-\w+-)?signature)"
)
PLACES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"https?://([^\s/?#\"'<>]+)@",
        r"//([^\s/?#\"'<>:]+:[^\s/?#\"'<>]+)@",  # abfs://CONTAINER@ACCOUNT holds no secret
        rf"[?&;#]{NAMES}=([^\s&;#\"'<>]+)",
        r"\b(?:password|secret|api[-_]?key)[\"']?\s*=\s*[\"']?([^\s\"']+)",
        rf"\b{NAMES}[\"']?\s*=\s*[\"']([^\s\"'<>]{{20,}})",  # longer than the token of an embedding
        r"\b(hf_\w{16,}|gh[a-z]_\w{16,})",  # of the Hub, of GitHub
    )
)


def hidden(text: str) -> str:
    """Return a text of the same length, with stars in place of what is a secret by where it stands or how it begins."""
    for pattern in PLACES:
        text = pattern.sub(_starred, text)
    return text


def _starred(found: re.Match[str]) -> str:
    before, after = found[0][: found.start(1) - found.start()], found[0][found.end(1) - found.start() :]
    return before + "*" * len(found[1]) + after
