"""Signatures are OpenSSH's: its own program checks ours, and ours checks its."""

from __future__ import annotations

import base64
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from sdforge.errors import BrokenPromise, UsageError
from sdforge.signing import PASSPHRASE, sign, signer

MESSAGE = b"version = 1\n"
SSH = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="OpenSSH is not installed")


def new_key(path: Path) -> str:
    """Write a private key; return the line of its public one."""
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@pytest.fixture
def key(tmp_path: Path) -> tuple[Path, str]:
    return tmp_path / "key", new_key(tmp_path / "key")


def test_a_signature_names_its_key(key: tuple[Path, str], tmp_path: Path) -> None:
    path, public = key
    other = new_key(tmp_path / "other")
    signature = sign(MESSAGE, path)
    assert signer(MESSAGE, signature, [other, f"{public} somebody"]) == f"{public} somebody"
    with pytest.raises(BrokenPromise, match="a key that is not trusted") as said:
        signer(MESSAGE, signature, [other])
    assert public in said.value.message


def test_another_message_is_not_signed(key: tuple[Path, str]) -> None:
    path, public = key
    with pytest.raises(BrokenPromise, match="of something else"):
        signer(MESSAGE + b"\n", sign(MESSAGE, path), [public])


def test_a_byte_of_it_is_another(key: tuple[Path, str]) -> None:
    path, public = key
    begin, *lines, end, _ = sign(MESSAGE, path).split("\n")
    data = base64.b64decode("".join(lines))
    for i in range(len(data)):
        turned = base64.b64encode(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]).decode()
        with pytest.raises(BrokenPromise):
            signer(MESSAGE, f"{begin}\n{turned}\n{end}\n", [public])


@pytest.mark.parametrize("text", ["", "x", "-----BEGIN SSH SIGNATURE-----\nAAAA\n-----END SSH SIGNATURE-----\n"])
def test_what_is_no_signature(key: tuple[Path, str], text: str) -> None:
    with pytest.raises(BrokenPromise, match="no signature"):
        signer(MESSAGE, text, [key[1]])


def test_what_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    rsa = generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    (tmp_path / "rsa").write_bytes(rsa)
    for name, words in (("text", "no key"), ("rsa", "no Ed25519 key"), ("none", "cannot be read")):
        with pytest.raises(UsageError, match=words):
            sign(MESSAGE, tmp_path / name)


@SSH
def test_a_key_with_a_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-a", "1", "-N", "open sesame", "-f", "key"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(UsageError, match="no key that can be opened"):
        sign(MESSAGE, tmp_path / "key")
    monkeypatch.setenv(PASSPHRASE, "open sesame")
    if find_spec("bcrypt") is None:
        with pytest.raises(UsageError, match="needs the library bcrypt"):
            sign(MESSAGE, tmp_path / "key")
        return
    public = " ".join((tmp_path / "key.pub").read_text().split()[:2])
    assert signer(MESSAGE, sign(MESSAGE, tmp_path / "key"), [public]) == public
    monkeypatch.setenv(PASSPHRASE, "another")
    with pytest.raises(UsageError, match="no key that can be opened"):
        sign(MESSAGE, tmp_path / "key")


@SSH
def test_openssh_checks_our_signature(key: tuple[Path, str], tmp_path: Path) -> None:
    path, public = key
    (tmp_path / "allowed").write_text(f"me {public}\n")
    (tmp_path / "sig").write_text(sign(MESSAGE, path))
    command = ["ssh-keygen", "-Y", "verify", "-f", "allowed", "-I", "me", "-n", "sdforge", "-s", "sig"]
    subprocess.run(command, input=MESSAGE, cwd=tmp_path, check=True, capture_output=True)


@SSH
def test_we_check_the_signature_of_openssh(key: tuple[Path, str], tmp_path: Path) -> None:
    path, public = key
    (tmp_path / "text").write_bytes(MESSAGE)
    command = ["ssh-keygen", "-Y", "sign", "-f", str(path), "-n", "sdforge", "text"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert signer(MESSAGE, (tmp_path / "text.sig").read_text(), [public]) == public
