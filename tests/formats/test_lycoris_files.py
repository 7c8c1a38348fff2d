"""Files that LyCORIS writes: read and baked, they make of numbers what LyCORIS' own modules make of them."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.edits.test_bake import baked
from tests.edits.test_bake_forms import FLAT, KERNEL, NARROW
from tests.families.workbench import Taken, take
from tests.formats.forwarded import layer, numbers
from tests.formats.test_lora_dialects import NAMES, weights

pytestmark = pytest.mark.slow

LYCORIS = ("lycoris-lora==4.1.*", "einops", "toml")  # all else that it needs is here
SCRIPT = Path(__file__).with_name("forwarded.py")
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"], "HOME": "/nowhere"}
PLACES = (FLAT, NARROW, KERNEL)
PLAIN = {"lora_dim": 4, "alpha": 1.5}
LOKR = {"lora_dim": 1, "alpha": 1.5}  # of more its second factor is whole in networks as narrow as these
OFT = {"lora_dim": 4, "constraint": 0.0}
WHOLE = {"lora_dim": 1, "alpha": 1}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "locon": ("LoConModule", PLAIN),
    "locon, Tucker": ("LoConModule", PLAIN | {"use_tucker": True}),
    "locon, rank-stabilised": ("LoConModule", PLAIN | {"rs_lora": True}),
    "dora of rows": ("LoConModule", PLAIN | {"weight_decompose": True, "wd_on_out": True}),
    "dora of columns": ("LoConModule", PLAIN | {"weight_decompose": True, "wd_on_out": False}),
    "loha": ("LohaModule", PLAIN),
    "loha, Tucker": ("LohaModule", PLAIN | {"use_tucker": True}),
    "dora of a loha": ("LohaModule", PLAIN | {"weight_decompose": True}),
    "lokr": ("LokrModule", LOKR),
    "lokr, both decomposed": ("LokrModule", LOKR | {"decompose_both": True}),
    "lokr, whole": ("LokrModule", LOKR | {"full_matrix": True}),
    "lokr, Tucker": ("LokrModule", LOKR | {"use_tucker": True}),
    "lokr of factor 2": ("LokrModule", LOKR | {"factor": 2}),
    "oft": ("DiagOFTModule", OFT),
    "oft with a limit": ("DiagOFTModule", OFT | {"constraint": 0.01, "rescaled": True}),
    "boft": ("ButterflyOFTModule", OFT),
    "glora": ("GLoRAModule", PLAIN),
    "ia3": ("IA3Module", WHOLE),
    "a difference": ("FullModule", WHOLE),
}


def layers(toy: Taken) -> dict[str, Tensor]:
    """The weights of a matrix, a 1×1 and a 3×3 convolution, by the names of their modules in kohya's files."""
    found = {NAMES[place]: weights(toy)[f"{place}.weight"].float() for place in PLACES}
    return found | {NAMES[NARROW]: found[NAMES[NARROW]].reshape(*found[NAMES[NARROW]].shape[:2], 1, 1)}


@pytest.fixture(scope="module")
def written(toy: Taken, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of every form, and what LyCORIS' modules made of numbers."""
    folder = tmp_path_factory.mktemp("lycoris")
    venv.create(folder / "python", with_pip=True, symlinks=True)
    packages = next((folder / "python" / "lib").glob("python*/site-packages"))
    (packages / "present.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "python" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *LYCORIS]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{LYCORIS[0]} cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    save_file({name: weight.contiguous() for name, weight in layers(toy).items()}, folder / "weights")
    job = {"weights": str(folder / "weights"), "forms": FORMS, "out": str(folder)}
    (folder / "job.json").write_text(json.dumps(job))
    ran = subprocess.run([python, SCRIPT, folder / "job.json"], capture_output=True, text=True, env=QUIET, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_lycoris_does_when_it_is_baked_what_it_does_there(form: str, written: Path, toy: Taken) -> None:
    before, expected = layers(toy), load_file(written / f"{form}.outputs")
    result = baked(toy, [(take(written / f"{form}.safetensors"), 1.0)], "fp32")
    for place in PLACES:
        name = NAMES[place]
        given = numbers(before[name])
        with torch.no_grad():
            made = layer(result[f"{place}.weight"].reshape(before[name].shape))(given)
            unchanged = layer(before[name])(given)
        assert float((expected[name] - unchanged).abs().max()) > 0.1, place
        # both add in fp32, in another order: of outputs up to 6, units in the last place
        assert float((made - expected[name]).abs().max()) < 5e-6, place
