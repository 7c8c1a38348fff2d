"""Concepts of Custom Diffusion in one, by constrained least squares (Kumari et al. 2022, §3.2, derived here).

Wanted is the W nearest to W₀ on C_reg that says of every concept's name what its own matrices say:
    min ‖(W − W₀) C_regᵀ‖²  with  W Cᵀ = V.
With Δ = W − W₀, G = C_regᵀ C_reg and multipliers Λ: 2 Δ G = Λ C, so Δ = ½ Λ C G⁻¹ = M D with D = C G⁻¹; put into the
constraint, M D Cᵀ = V − W₀ Cᵀ. Hence W = W₀ + (V − W₀ Cᵀ) (D Cᵀ)⁻¹ D. Rows of C that are alike share what they say: a
pseudo-inverse gives them the mean.

Shapes in names: S tokens of the concepts' names and ends of text, N tokens of the captions, D width of the text's
states, O of outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sdforge.dtypes import SAFETENSORS
from sdforge.errors import ActionFailed
from sdforge.formats.custom_diffusion import row_name, words_of
from sdforge.formats.tokenizer import END
from sdforge.order import Given, Order, Outcome
from sdforge.run.diffusion import Diffusion, load_diffusion
from sdforge.run.fingerprint import fingerprint
from sdforge.run.sketch import sketch
from sdforge.run.tensors import DTYPES, load_component, rounded, write_pack

RIDGE = 1e-9  # of the mean of G's diagonal: directions that no caption has are nearly free
SMALLEST = 1e-12  # singular values of D Cᵀ, in the largest one, that count as none
CAPTIONS = 32  # encoded at a time


class Problem(NamedTuple):
    """What does not depend on a layer: the tokens of the names, and how a change is spread over directions.

    owners_S: whose token each row is. condition: of D Cᵀ, the largest singular value over the smallest that counts.
    """

    names_SD: Tensor
    owners_S: Tensor
    spread_SD: Tensor  # D
    inverse_SS: Tensor  # (D Cᵀ)⁻¹
    condition: float


def pose(names_SD: Tensor, owners_S: Tensor, captions_ND: Tensor) -> Problem:
    """Prepare the least squares of all layers, in fp64."""
    names_SD, captions_ND = names_SD.double(), captions_ND.double()
    gram_DD = captions_ND.T @ captions_ND
    ridge = RIDGE * gram_DD.diagonal().mean()
    gram_DD = gram_DD + ridge * torch.eye(len(gram_DD), dtype=gram_DD.dtype, device=gram_DD.device)
    spread_SD = torch.linalg.solve(gram_DD, names_SD.T).T
    inner_SS = spread_SD @ names_SD.T
    inner_SS = (inner_SS + inner_SS.T) / 2
    values = torch.linalg.eigvalsh(inner_SS)
    kept = values[values > SMALLEST * values[-1]]
    inverse_SS = torch.linalg.pinv(inner_SS, rtol=SMALLEST, hermitian=True)
    return Problem(names_SD, owners_S, spread_SD, inverse_SS, float(kept[-1] / kept[0]))


def solve(problem: Problem, base_OD: Tensor, trained: list[Tensor]) -> Tensor:
    """Return W (O, D) in fp64; trained: the matrices of the concepts, by the numbers in `owners_S`."""
    base_OD = base_OD.double()
    wanted_SO = torch.empty(len(problem.names_SD), len(base_OD), dtype=base_OD.dtype, device=base_OD.device)
    for number, matrix_OD in enumerate(trained):
        own = problem.owners_S == number
        wanted_SO[own] = problem.names_SD[own] @ matrix_OD.double().T
    missing_OS = wanted_SO.T - base_OD @ problem.names_SD.T
    return base_OD + missing_OS @ problem.inverse_SS @ problem.spread_SD


@torch.no_grad()
def merge(order: Order, captions: list[str], report: Callable[..., None]) -> Outcome:
    """Merge the concepts of an order. Raises ActionFailed for concepts that are not of one kind.

    captions: prompts that are to say what they said.
    """
    device = torch.device(order.how.get("device", "cpu"))
    report(note="loading the checkpoint")
    diffusion = load_diffusion(order, order.the("checkpoint"))
    concepts = sorted(order.inputs["custom"], key=lambda each: words_of(each.facts))
    matrices = [load_component(each.components["custom"]) for each in concepts]
    rows = [load_component(each.components.get("embedding", [])) for each in concepts]
    layers = [f"unet.{name}" for name in diffusion.family.cross_attention]
    _refuse_others(concepts, matrices, layers)
    words = _add_words(diffusion, concepts, rows)
    problem = pose(*_tokens_of_names(diffusion, order, concepts), _tokens_of_captions(diffusion, captions))
    own = dict(diffusion.unet.named_parameters())
    dtype = _dtype(order)
    made, update = {}, []
    for done, layer in enumerate(layers):
        base_OD = own[layer.removeprefix("unet.")].detach()
        merged_OD = solve(problem, base_OD, [each[layer].to(device) for each in matrices])
        made[layer] = rounded(layer, merged_OD.cpu(), dtype)
        update.append((layer, merged_OD - base_OD.double(), None))
        report(step=done + 1, steps=len(layers))
    outcome = write_pack(Path(order.work), {"custom": made, "embedding": _rows_of(concepts, rows)})
    lines, norm = sketch(update)
    outcome.facts = {"token": words[0], "further": words[1:]}
    outcome.grade, outcome.fingerprint = "B", fingerprint(device)
    outcome.record = {"condition": problem.condition, "tokens": len(problem.names_SD), "sketch": lines, "norm": norm}
    return outcome


def _dtype(order: Order) -> torch.dtype:
    """Return the type of the result: as stated, or that of the checkpoint's U-Net."""
    stated = order.settings["dtype"]
    return DTYPES[SAFETENSORS[stated] if stated else order.the("checkpoint").components["unet"][0].dtype]


def _refuse_others(concepts: list[Given], matrices: list[dict[str, Tensor]], layers: list[str]) -> None:
    for each, own in zip(concepts, matrices, strict=True):
        words = words_of(each.facts)
        if not words:
            raise ActionFailed("a concept without a word cannot be merged", hint="put the file of its rows beside it")
        if sorted(own) != sorted(layers):
            raise ActionFailed(
                f"{words[0]} has other layers than keys and values of the cross-attention",
                hint='train it with freeze = "kv"',
            )


def _add_words(diffusion: Diffusion, concepts: list[Given], rows: list[dict[str, Tensor]]) -> list[str]:
    """Put all words behind the vocabulary; return them in the order of their rows."""
    words = []
    for each, tensors in zip(concepts, rows, strict=True):
        for i, word in enumerate(words_of(each.facts)):
            if word in words:
                raise ActionFailed(f"two concepts are called {word!r}", hint="train one of them with another token")
            words.append(word)
            own = {encoder: tensors[row_name(encoder, i)] for encoder in diffusion.text_encoders}
            diffusion.words.add(word, next(iter(own.values())).shape[0])
            for encoder, table in diffusion.token_tables().items():
                table.append(own[encoder].to(diffusion.device))
    return words


def _tokens_of_names(diffusion: Diffusion, order: Order, concepts: list[Given]) -> tuple[Tensor, Tensor]:
    """Return what the text encoders say of every token of the concepts' names, and whose each is.

    With them the end of text: it has seen the whole prompt, and attention finds much of what a name says there.
    """
    before, _, after = order.settings["template"].partition("{}")
    states, owners = [], []
    for number, each in enumerate(concepts):
        names = [each.use["name"]] if each.use.get("name") else words_of(each.facts)
        for name in names:
            prompt = before + name + after
            (hidden_LD,) = diffusion.encode_text([prompt]).hidden_BLD
            places = range(_length(diffusion, before), _length(diffusion, before + name))
            states.append(hidden_LD[[*places, _length(diffusion, prompt)]])
            owners += [number] * (len(places) + 1)
    return torch.cat(states), torch.tensor(owners, device=diffusion.device)


def _tokens_of_captions(diffusion: Diffusion, captions: list[str]) -> Tensor:
    """Return what the text encoders say of every token of the captions, from the start of text to its end."""
    found = []
    for start in range(0, len(captions), CAPTIONS):
        some = captions[start : start + CAPTIONS]
        hidden_BLD = diffusion.encode_text(some).hidden_BLD
        found += [states[: _length(diffusion, text) + 1] for states, text in zip(hidden_BLD, some, strict=True)]
    return torch.cat(found)


def _length(diffusion: Diffusion, text: str) -> int:
    """Return how many tokens stand before the end of a text, its start included."""
    ids = diffusion.words.encode(text)
    return ids.index(diffusion.words.number(END))


def _rows_of(concepts: list[Given], rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the rows of all words, numbered through."""
    found: dict[str, Tensor] = {}
    count = 0
    for each, tensors in zip(concepts, rows, strict=True):
        for i in range(len(words_of(each.facts))):
            found |= {
                row_name(encoder, count): tensors[row_name(encoder, i)]
                for encoder in ("text_encoder", "text_encoder_2")
                if row_name(encoder, i) in tensors
            }
            count += 1
    return found
