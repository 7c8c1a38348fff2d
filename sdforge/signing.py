"""Signatures of locks and results: Ed25519 (RFC 8032) in OpenSSH's form, so that `ssh-keygen -Y` makes and checks them.

The form is SSHSIG (OpenSSH, PROTOCOL.sshsig): what is signed is the sha512 of a message, in the namespace `sdforge`.
Keys are those that people have for git: a private key is a file as `ssh-keygen -t ed25519` writes it, a public key the
line in its `.pub`. The library cryptography (the extra `sign`) computes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import struct
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from sdforge.errors import BrokenPromise, UsageError

NAMESPACE = b"sdforge"
MAGIC, VERSION, KIND, HASH = b"SSHSIG", 1, b"ssh-ed25519", b"sha512"
BEGIN, END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
PASSPHRASE = "FORGE_KEY_PASSPHRASE"


def sign(message: bytes, key: Path) -> str:
    """Return the signature of a message as text. Raises UsageError for a file that is no Ed25519 key."""
    private = _private(key)
    public = private.public_key().public_bytes_raw()
    blob = _string(KIND) + _string(public)
    signature = _string(KIND) + _string(private.sign(_signed(message)))
    body = MAGIC + struct.pack(">I", VERSION) + _string(blob) + _string(NAMESPACE) + _string(b"") + _string(HASH)
    text = base64.b64encode(body + _string(signature)).decode()
    lines = [text[i : i + 70] for i in range(0, len(text), 70)]
    return "\n".join([BEGIN, *lines, END, ""])


def check_key(key: Path) -> None:
    """Raise UsageError for a file that is no Ed25519 key."""
    _private(key)


def signer(message: bytes, signature: str, trusted: Iterable[str]) -> str:
    """Return the trusted public key that signed a message. Raises BrokenPromise if none of them did."""
    try:
        public, raw = _parts(signature)
    except (ValueError, struct.error, binascii.Error):
        raise BrokenPromise("this is no signature of sdforge", hint="`forge sign` makes one") from None
    line = next((line for line in trusted if _public(line) == public), None)
    if line is None:
        shown = f"ssh-ed25519 {base64.b64encode(_string(KIND) + _string(public)).decode()}"
        raise BrokenPromise(
            f"it is signed by a key that is not trusted: {shown}", hint="[trust] keys = […] lists those"
        )
    ed25519, exceptions = _library("asymmetric.ed25519"), import_module("cryptography.exceptions")
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(raw, _signed(message))
    except exceptions.InvalidSignature:
        raise BrokenPromise("the signature is of something else", hint="was it changed after it was signed?") from None
    return line


def _library(name: str) -> Any:
    try:
        return import_module(f"cryptography.hazmat.primitives.{name}")
    except ImportError:
        raise UsageError("signatures need the library cryptography", hint='pip install "sdforge[sign]"') from None


def _private(path: Path) -> Any:
    serialization, ed25519 = _library("serialization"), _library("asymmetric.ed25519")
    passphrase = os.environ.get(PASSPHRASE, "").encode() or None
    try:
        data = path.read_bytes()
        key = serialization.load_ssh_private_key(data, passphrase)
    except OSError as error:
        raise UsageError(f"the key {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):
        raise UsageError(
            f"{path} is no key that can be opened", hint=f"a passphrase belongs into {PASSPHRASE}"
        ) from None
    except import_module("cryptography.exceptions").UnsupportedAlgorithm:
        raise UsageError(
            f"{path} has a passphrase, which needs the library bcrypt", hint='pip install "sdforge[sign]"'
        ) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UsageError(f"{path} is no Ed25519 key", hint="ssh-keygen -t ed25519")
    return key


def _public(line: str) -> bytes:
    """Return the 32 bytes of a public key's line. Raises UsageError."""
    parts = line.split()
    try:
        kind, rest = _take(base64.b64decode(parts[1], validate=True))
        public, _ = _take(rest)
        if parts[0].encode() != KIND or kind != KIND or len(public) != 32:
            raise ValueError
    except (ValueError, IndexError, struct.error, binascii.Error):
        raise UsageError(f"{line[:60]!r} is no Ed25519 public key", hint="ssh-ed25519 AAAA…") from None
    return public


def _signed(message: bytes) -> bytes:
    return MAGIC + _string(NAMESPACE) + _string(b"") + _string(HASH) + _string(hashlib.sha512(message).digest())


def _parts(signature: str) -> tuple[bytes, bytes]:
    """Return public key and signature, 32 and 64 bytes. Raises ValueError, struct.error."""
    lines = signature.strip().splitlines()
    if lines[:1] != [BEGIN] or lines[-1:] != [END]:
        raise ValueError("no signature")
    data = base64.b64decode("".join(lines[1:-1]), validate=True)
    if data[:6] != MAGIC or struct.unpack(">I", data[6:10]) != (VERSION,):
        raise ValueError("another form")
    blob, rest = _take(data[10:])
    namespace, rest = _take(rest)
    _, rest = _take(rest)
    algorithm, rest = _take(rest)
    raw, rest = _take(rest)
    (kind, public), (kind_too, found) = (_take(blob), _take(raw))
    public, found = _take(public)[0], _take(found)[0]
    if (namespace, algorithm, kind, kind_too, rest) != (NAMESPACE, HASH, KIND, KIND, b""):
        raise ValueError("of another purpose")
    if (len(public), len(found)) != (32, 64):
        raise ValueError("of another length")
    return public, found


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _take(data: bytes) -> tuple[bytes, bytes]:
    """Split a string with its length before it from what follows. Raises ValueError, struct.error."""
    (length,) = struct.unpack(">I", data[:4])
    if length > len(data) - 4:
        raise ValueError("it ends too early")
    return data[4 : 4 + length], data[4 + length :]
