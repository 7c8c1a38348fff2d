"""A store in a folder of its own, and results made of a few bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import xxhash

from sdforge.artifact import Component, Spot, Tensor, artifact_identity
from sdforge.identity import component_identity, tensor_identity
from sdforge.store import Store
from sdforge.store.entries import Result, sum_of


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest_of(key: str) -> str:
    """Return what stands for a manifest under a key that is no hash of it."""
    return json.dumps({"of": key, "sum": sum_of({"of": key, "sum": key})})


def make_result(
    store: Store, key: str, data: bytes, *, kind: str = "lora", grade: str = "B", made: float = 1.0
) -> Result:
    """Publish one tensor's bytes, its table and the result, in the order in which a build does."""
    store.prepare()
    work = store.workplace() / "pack"
    work.write_bytes(data)
    pack = digest_of(data)
    store.put_file(work, pack)
    work.parent.rmdir()
    identity = tensor_identity("U8", (len(data),), pack)
    table = store.put_table(
        [Tensor("x", "U8", (len(data),), identity, pack, xxhash.xxh3_128(data).hexdigest(), Spot(pack, 0))]
    )
    content = component_identity([("x", identity)])
    components = {kind: Component(content, content, table, "mixed")}
    digest = artifact_identity(kind, {kind: content}, {})
    record = {
        "log": store.put_bytes(b"log of " + data),
        "losses": store.put_bytes(b"losses of " + data),
        "samples": [[10, "a cat", store.put_bytes(b"a picture drawn during " + data)]],
    }
    result = Result(key, digest, kind, "sd15", components, packs=(pack,), grade=grade, made=made, record=record)
    store.keep(result, manifest_of(key))
    return result


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def store(cache: Path) -> Store:
    return Store(cache)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project with a cache of its own."""
    folder = tmp_path / "project"
    (folder / "recipes").mkdir(parents=True)
    (folder / "forge.toml").write_text("")
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    return folder
