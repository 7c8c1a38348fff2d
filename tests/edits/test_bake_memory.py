"""What a bake holds while it needs a whole tensor: a few copies of it in fp64. SDXL's largest take 236 MB each."""

from __future__ import annotations

from math import prod

import pytest
import torch

from sdforge.edits.bake import compute
from tests.peak import holds_less

WEIGHT = (512, 512, 3, 3)  # 18.9 MB in fp64
RANK = 8
SIDES = {"hada_w{i}_a": (RANK, 512), "hada_w{i}_b": (RANK, 512), "hada_t{i}": (RANK, RANK, 3, 3)}
# title → form, factors, and how many copies of the weight may be held, with the result and blocks of 256 rows, of which
# this weight has two: measured 3.0, 4.6, 2.0, 6.1, 5.4, 2.1 and 5.1
FORMS = {
    "Tucker": ("lora", {"lora_up": (512, RANK), "lora_mid": (RANK, RANK, 3, 3), "lora_down": (RANK, 512)}, 3.8),
    "LoHa with cores": ("loha", {name.format(i=i): shape for i in "12" for name, shape in SIDES.items()}, 5.3),
    "LoKr": ("lokr", {"lokr_w1": (16, 16), "lokr_w2": (32, 32, 3, 3)}, 3.0),
    "norms per channel": (
        "lora",
        {"lora_up": (512, RANK), "lora_down": (RANK, 512, 3, 3), "dora_scale": (1, 512)},
        8.0,
    ),
    "GLoRA": ("glora", {"a1": (512, RANK), "a2": (RANK, 512), "b1": (512, RANK), "b2": (RANK, 512, 3, 3)}, 6.2),
    "rotations": ("oft", {"oft_blocks": (64, 8, 8)}, 3.5),
    "butterflies": ("oft", {"oft_blocks": (4, 64, 8, 8)}, 6.5),
}


@pytest.mark.parametrize("title", FORMS)
def test_a_form_that_needs_the_whole_weight_holds_few_copies_of_it(title: str) -> None:
    form, factors, most = FORMS[title]
    tensors = [(torch.randn(shape) * 0.01).half() for shape in factors.values()]
    parameters = {"form": form, "factors": list(factors), "scale": 0.5, "strength": 0.5, "limit": 0.0}
    weight = torch.randn(WEIGHT).half()

    def baked() -> None:
        compute({"updates": [["lora", len(tensors), parameters]]}, [weight, *tensors], torch.float16)

    assert holds_less(baked, int(most * 8 * prod(WEIGHT)))
