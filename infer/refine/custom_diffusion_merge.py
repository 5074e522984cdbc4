"""Concepts that were tuned apart, joined in closed form: each keeps its own keys and values, all else stays.

For every key and value projection W0 of the base (Custom Diffusion, arXiv 2212.04488, section 3.2, equations 4 to 6):
    min_W |W C_reg^T - W0 C_reg^T|   so that   W C*^T = V^T
    d = C* (C_reg^T C_reg)^-1,   v^T = (V^T - W0 C*^T) (d C*^T)^-1,   W = W0 + v^T d
C_reg: states of the text encoder for ordinary captions; C*: for "z dog" of each concept; V: what its own weights made
of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from infer.pipeline import SubjectDiffusionPipeline
from infer.refine.prompts import SUBJECT_TEMPLATES, composed, draw_template, fill
from infer.refine.refinement import Refinement
from infer.refine.weight_deltas import Weights
from model.prompt import encode_ids
from model.text_fusion import encode_prompt

CAPTIONS = 200
TARGET_TEXTS = ("{}", "photo of a {}")
DAMPING = 1e-6  # of C_reg^T C_reg, as a share of its mean diagonal: what the captions never say is left alone
_NOUNS = (
    "apple", "backpack", "bear", "bicycle", "bird", "boat", "book", "bottle", "bowl", "boy", "bridge", "bus", "cake",
    "camera", "candle", "car", "cat", "chair", "clock", "cow", "cup", "dog", "dress", "duck", "elephant", "fish",
    "flower", "girl", "guitar", "hat", "horse", "house", "lamp", "lion", "man", "monkey", "painting", "person", "plane",
    "rabbit", "robot", "shirt", "shoe", "sofa", "statue", "table", "teapot", "toy", "train", "tree", "vase", "woman",
)  # fmt: skip


class ClosedForm:
    """The merge for given captions and targets; `weight` solves it for one projection after the other.

    Args:
        regularisation: C_reg (R, D).
        targets: C* (N, D), N at most D.
    """

    def __init__(self, regularisation: Tensor, targets: Tensor) -> None:
        known, self.targets = regularisation.double(), targets.double()
        gram = known.T @ known  # (D, D)
        gram.diagonal().add_(DAMPING * gram.diagonal().mean())
        self.directions = torch.linalg.solve(gram, self.targets.T).T  # d (N, D)
        self.inverse = torch.linalg.pinv(self.directions @ self.targets.T)  # (N, N)

    def weight(self, base: Tensor, values: Tensor) -> Tensor:
        """W (O, D) float32.

        Args:
            base: W0 (O, D).
            values: V (N, O), what W shall make of the targets.
        """
        start = base.double()
        missing = values.double() - self.targets @ start.T  # (N, O)
        return (start + missing.T @ self.inverse.T @ self.directions).float()


def regularisation_captions(count: int = CAPTIONS) -> list[str]:
    """Ordinary captions of ordinary things, the same at every call."""
    rng = np.random.default_rng(0)
    nouns = [_NOUNS[index % len(_NOUNS)] for index in range(count)]
    return [composed(fill(draw_template(SUBJECT_TEMPLATES, rng), noun), rng) for noun in nouns]


def merged(pipeline: SubjectDiffusionPipeline, sources: Sequence[tuple[Refinement, Weights]], base: Weights) -> Weights:
    """Key and value projections that serve the concepts of all sources.

    Args:
        pipeline: with the words of all sources.
        sources: each file and its weights.
        base: the weights before, by name.
    Raises:
        UserError: a file that changed more than keys and values, or other layers than the others.
    """
    for refinement, weights in sources:
        odd = sorted(set(weights) ^ set(sources[0][1]))
        other = [name for name in weights if not name.endswith((".to_k.weight", ".to_v.weight"))]
        if odd or other:
            raise UserError(
                f"{refinement.label}: {(other or odd)[0]} was tuned too, and only keys and values can be merged in "
                "closed form; refine with options.parts=kv, or learn the subjects in one run"
            )
    targets = [_states(pipeline, _target_texts(refinement)) for refinement, _ in sources]  # (N_k, D) each
    solver = ClosedForm(_states(pipeline, regularisation_captions()), torch.cat(targets))
    found: Weights = {}
    for name in sources[0][1]:
        values = [
            states @ weights[name].double().T for states, (_, weights) in zip(targets, sources, strict=True)
        ]  # (N_k, O) each
        found[name] = solver.weight(base[name].detach().cpu(), torch.cat(values))
    return found


def _target_texts(refinement: Refinement) -> list[tuple[str, str]]:
    """Texts that name each concept of a file, and the part that is its name."""
    texts = []
    for placeholder, told in refinement.words.items():
        thing = f"{placeholder} {told.get('class_word', '')}".rstrip()
        texts += [(fill(template, thing), thing) for template in TARGET_TEXTS]
    return texts


@torch.no_grad()
def _states(pipeline: SubjectDiffusionPipeline, texts: Sequence[str | tuple[str, str]]) -> Tensor:
    """States of the text encoder at the texts' own tokens, one below the other: (N, D) float64 on the CPU.

    Of a pair (text, name) only the tokens of the name at its end count: those before it are the same for all concepts.
    """
    words, tokenizer, text_encoder = pipeline.words, pipeline.tokenizer, pipeline.text_encoder
    device = text_encoder.device
    rows = None
    if words is not None:
        rows = words.to(device).word_rows(None if words.num_layers is None else 0)

    def tokens(text: str) -> Tensor:
        return encode_ids(tokenizer, text if words is None else words.expand(text), shorten=True)  # (L,)

    def length(text: str) -> int:
        return int((tokens(text)[1:] == tokenizer.eos_token_id).int().argmax())  # of its own tokens

    found = []
    for text in texts:
        whole, name = text if isinstance(text, tuple) else (text, text)
        end = 1 + length(whole)
        nowhere = torch.zeros(1, 0, dtype=torch.int64, device=device)
        states = encode_prompt(text_encoder, tokens(whole)[None].to(device), None, nowhere, words=rows)  # (1, L, D)
        found.append(states[0, end - length(name) : end].double().cpu())
    return torch.cat(found)
