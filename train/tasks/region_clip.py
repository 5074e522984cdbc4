"""A CLIP for regions: heads that join a frozen image tower and a frozen text tower, for the data pipeline's detector.

Locked-image tuning (Zhai et al., LiT, CVPR 2022) where both towers are locked: they ship for other purposes, and only
what is trained here is new. Proposed boxes of scenes are scored against the phrases of their caption and against
negatives, as `data_pipeline.stages.detect.clip_proposals` scores them; a box that shows no thing belongs to none.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.boxes import pairwise_iou
from data_pipeline.stages.detect.clip_folder import (
    CONFIG,
    PARTS,
    WEIGHTS,
    assemble,
    fingerprint,
    image_tower,
    text_tower,
)
from data_pipeline.stages.detect.clip_proposals import ClipProposalsSettings
from data_pipeline.stages.detect.region_proposals import cut_regions, propose_boxes
from data_pipeline.toybox.backgrounds import BACKGROUNDS
from data_pipeline.toybox.captions import COLOURS
from data_pipeline.toybox.world import ToyboxScene
from train.data.scenes import SceneDataset, as_tensor, make_world
from train.draws import SampleDraws
from train.inputs_folder import input_folder
from train.pictures import save_grid
from train.settings import TrainSettings
from train.tasks.toybox_task import ToyboxTask

TRAINED = re.compile(
    r"visual\.transformer\.resblocks\.LAST\.(attn|ln_1|ln_2)\..*|visual\.(ln_post\..*|proj)|ln_final\..*"
    r"|text_projection|logit_scale"
)
SHOWS_IOU, SHOWS_NOT_IOU = 0.6, 0.5  # of a box with a thing's: from here on it shows it, below here it does not
JITTERS = (0.0, 0.08, 0.2)  # of the true boxes that are learnt from beside the proposed ones, shares of their sides
MOST_SHOWING, MOST_EMPTY = 6, 8  # boxes of a scene that are learnt from
NOTHING, PLACE = -1, -2  # keys of texts: what boxes without a thing belong to; what no box belongs to
_SYLLABLES = "ba ko ri ten lu mar sho pi gan del fro ket wim zo nar ble cus tri hap oon".split()
_COLOURED = re.compile(rf"(?:(?:{'|'.join(COLOURS)}) )?$")


@dataclass(frozen=True)
class Phrases:
    """The texts that a scene's boxes are scored against."""

    texts: list[str]
    keys: list[int]  # of a text: which noun it names, or PLACE
    of_entity: list[int]  # key of each entity


def phrases_of(scene: ToyboxScene, renamed: float, generator: np.random.Generator) -> Phrases:
    """What a noun finder says of the caption: the things as named there, and the place.

    A share `renamed` of the proper nouns gives way to made-up words: whoever names an unknown thing means one, too.
    """
    nouns: list[str] = []
    texts, keys, of_entity = [], [], []
    for entity in scene.entities:
        colour = _COLOURED.search(scene.caption[: entity.span[0]])
        noun = entity.noun
        if noun != entity.subject.group_word and generator.random() < renamed:
            noun = "".join(generator.choice(_SYLLABLES, int(generator.integers(2, 4))))
        if noun not in nouns:
            nouns.append(noun)
        texts.append((colour[0] if colour else "") + noun)
        keys.append(nouns.index(noun))
        of_entity.append(nouns.index(noun))
    for phrase in BACKGROUNDS[scene.background].phrases:
        if phrase in scene.caption:
            place = re.sub(r"^(?:on|in front of|in|at|under|by|among) (?:the |a )?", "", phrase)
            texts.append(place.removesuffix(" at dusk"))
            keys.append(PLACE)
    return Phrases(texts, keys, of_entity)


@dataclass(frozen=True)
class Regions:
    """Boxes of a scene as the frozen towers see them, and what they show."""

    tokens: Tensor  # (N, T, W) fp16, before the image tower's last block
    texts: Tensor  # (C, W) before the text tower's last norm
    keys: Tensor  # (C,) which noun a text names; PLACE; NOTHING for negatives
    shown: Tensor  # (N,) which noun a box shows, or NOTHING


class RegionHeads(nn.Module):
    """What is trained, in the CLIP that it belongs to, and the loss."""

    def __init__(self, clip: open_clip.CLIP) -> None:
        super().__init__()
        self.clip = clip
        trained = re.compile(TRAINED.pattern.replace("LAST", str(len(clip.visual.transformer.resblocks) - 1)))
        for name, parameter in clip.named_parameters():
            parameter.requires_grad_(bool(trained.fullmatch(name)))

    def trained_state(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().contiguous() for name, p in self.clip.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def frozen_image(self, pictures: Tensor) -> Tensor:
        """Normalised (N, 3, H, W) -> tokens (N, T, W) before the last block."""
        visual = self.clip.visual
        kept: list[Tensor] = []
        hook = visual.transformer.resblocks[-1].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        try:
            visual(pictures)
        finally:
            hook.remove()
        return kept[0]

    @torch.no_grad()
    def frozen_text(self, ids: Tensor) -> Tensor:
        """(C, L) -> states of the end tokens (C, W) before the last norm."""
        clip = self.clip
        states = clip.transformer(clip.token_embedding(ids) + clip.positional_embedding, attn_mask=clip.attn_mask)
        return states[torch.arange(len(ids)), ids.argmax(dim=-1)]

    def image(self, tokens: Tensor) -> Tensor:
        """(N, T, W) -> unit vectors (N, D): the last block for the class token alone, norm, projection."""
        visual = self.clip.visual
        block = visual.transformer.resblocks[-1]
        normed = block.ln_1(tokens)
        pooled = tokens[:, :1] + block.attn(normed[:, :1], normed, normed, need_weights=False)[0]  # (N, 1, W)
        pooled = pooled + block.mlp(block.ln_2(pooled))
        return functional.normalize(visual.ln_post(pooled[:, 0]) @ visual.proj, dim=-1)

    def text(self, states: Tensor) -> Tensor:
        """(C, W) -> unit vectors (C, D)."""
        return functional.normalize(self.clip.ln_final(states) @ self.clip.text_projection, dim=-1)

    def chances(self, regions: Regions) -> Tensor:
        """Log-probabilities (N, K + 1) of a scene's boxes showing each noun; the last column: none."""
        logits = self.clip.logit_scale.exp() * self.image(regions.tokens.float()) @ self.text(regions.texts).T  # (N, C)
        return by_noun(logits, regions.keys)

    def forward(self, batch: list[Regions], draws: SampleDraws | None, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.image(torch.cat([regions.tokens for regions in batch]).float())
        text = self.text(torch.cat([regions.texts for regions in batch]))
        losses, right = [], []
        boxes, texts = [len(regions.tokens) for regions in batch], [len(regions.texts) for regions in batch]
        for regions, x, t in zip(batch, image.split(boxes), text.split(texts), strict=True):
            chances = by_noun(self.clip.logit_scale.exp() * x @ t.T, regions.keys)  # (N, K + 1)
            aim = regions.shown.remainder(chances.shape[1])  # NOTHING is the last column
            losses.append(functional.nll_loss(chances, aim, reduction="none"))
            right.append((chances.argmax(dim=1) == aim).float())
        return torch.cat(losses).mean(), {"accuracy": torch.cat(right).mean()}


def by_noun(logits: Tensor, keys: Tensor) -> Tensor:
    """Logits of texts (N, C) -> log-probabilities (N, K + 1) of the nouns they name, none the last.

    What is left of 1 belongs to places: a patch of carpet shows carpet, but no thing that could be drawn elsewhere.
    """
    chances = logits.log_softmax(dim=1)
    nouns = [*range(int(keys.max()) + 1), NOTHING]
    return torch.stack([chances[:, keys == noun].logsumexp(dim=1) for noun in nouns], dim=1)


class RegionClipTask(ToyboxTask):
    """`inputs`: image (a run of task clip), text (a run of task base). `options`: renamed, share of made-up nouns."""

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        self.loader_workers = 0  # items come from the towers, which stay in this process
        self.options: dict[str, Any] = {"renamed": 0.3} | settings.options
        self.image_folder, base = input_folder(settings, "image"), input_folder(settings, "text")
        self.text_folder, self.tokenizer_folder = base / "text_encoder", base / "tokenizer"
        self.detection = ClipProposalsSettings(model=str(settings.folder / "export"))
        self.config = json.loads((self.image_folder / CONFIG).read_text(encoding="utf-8"))
        state = load_file(self.image_folder / WEIGHTS) | text_tower(self.text_folder)
        torch.manual_seed(settings.seed)
        self.loaded = assemble(self.config, state, self.tokenizer_folder)
        self.module = RegionHeads(self.loaded.clip)
        self.known: dict[str, Tensor] = {}  # states of texts, which come again and again
        world = make_world(settings.data)
        self.dataset = SceneDataset(world, self._regions, distinct=settings.data.distinct_scenes)
        unseen = make_world(settings.data, split="val", seed=settings.data.seed + 1)
        self.shown = [unseen.scene(i) for i in range(96)]
        self.unseen = [self._regions(scene, renamed=0.0) for scene in self.shown]

    def _regions(self, scene: ToyboxScene, renamed: float | None = None) -> Regions:
        """Boxes of a scene, proposed and true, through the frozen towers."""
        generator = np.random.default_rng((abs(scene.index), 97))
        share = self.options["renamed"] if renamed is None else renamed
        phrases = phrases_of(scene, share, generator)
        boxes, _ = propose_boxes(scene.image, self.detection.proposals)
        truth = np.asarray([entity.box_xyxy_px for entity in scene.entities], np.float32).reshape(-1, 4)
        boxes, shown = _shown(np.concatenate([boxes, *_jittered(truth, scene.image.shape[0], generator)]), truth)
        chosen = [np.flatnonzero(shown >= 0), np.flatnonzero(shown == NOTHING)]
        limits = (MOST_SHOWING, MOST_EMPTY)
        rows = np.concatenate([generator.permutation(c)[:n] for c, n in zip(chosen, limits, strict=True)])
        crops = cut_regions(scene.image, boxes[rows], self.loaded.image_size, self.detection.margin)
        nouns = np.asarray([*phrases.of_entity, NOTHING])  # entity -> key; the last one, -1, is nothing
        texts = [self.detection.prompt.format(phrase=text) for text in phrases.texts] + [*self.detection.negatives]
        keys = phrases.keys + [NOTHING] * len(self.detection.negatives)
        tokens = self.module.frozen_image(self.loaded.pixels(crops)).half()
        states = torch.stack([self._text_state(text) for text in texts])
        return Regions(tokens, states, torch.tensor(keys), torch.from_numpy(nouns[shown[rows]]))

    def _text_state(self, text: str) -> Tensor:
        if text not in self.known:
            self.known[text] = self.module.frozen_text(self.loaded.tokenize([text]).to(self.device))[0]
        return self.known[text]

    def collate(self, items: list[Regions]) -> list[Regions]:
        return [item for item in items if len(item.shown)]

    def batch(self, collated: list[Regions]) -> list[Regions]:
        return [
            Regions(*(part.to(self.device) for part in (item.tokens, item.texts, item.keys, item.shown)))
            for item in collated
        ]

    @torch.no_grad()
    def validate(self, picture: Path) -> dict[str, float]:
        batch = self.batch(self.collate(self.unseen))
        loss, metrics = self.module(batch, None, 0)
        named, things = 0, 0
        for regions in batch:
            shows = regions.shown >= 0
            if not shows.any():
                continue
            nouns = self.module.chances(regions)[shows, :-1].argmax(dim=1)
            named += int((nouns == regions.shown[shows]).sum())
            things += int(shows.sum())
        save_grid([[as_tensor(scene.image) for scene in self.shown[8 * y : 8 * y + 8]] for y in range(4)], picture)
        return {"loss": float(loss), "accuracy": float(metrics["accuracy"]), "named_right": named / max(1, things)}

    def export(self, folder: Path) -> None:
        """An open_clip folder of the trained tensors; its `parts.json` names the others by place and fingerprint."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.module.trained_state(), folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2))
        write_parts(folder, self.image_folder, self.text_folder, self.tokenizer_folder)


def write_parts(folder: Path, image: Path, text: Path, tokenizer: Path) -> None:
    """Write `parts.json`: where the tensors of `folder`'s model that are not its own come from, as relative paths."""
    towers = (("image", image, image_tower), ("text", text, text_tower))
    parts: dict[str, Any] = {
        name: {"folder": os.path.relpath(source, folder), "fingerprint": fingerprint(read(source))}
        for name, source, read in towers
    }
    parts["tokenizer"] = os.path.relpath(tokenizer, folder)
    (folder / PARTS).write_text(json.dumps(parts, indent=2) + "\n")


def _jittered(truth: np.ndarray, size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """True boxes (N, 4) moved by each of `JITTERS`, inside of a picture of that size."""
    sides = np.tile(truth[:, 2:] - truth[:, :2], 2)  # (N, 4)
    return [
        np.clip(truth + generator.normal(0, spread, truth.shape) * sides, 0, size).astype(np.float32)
        for spread in JITTERS
    ]


def _shown(boxes: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4) that clearly show one of the things at `truth` (M, 4), or clearly none, and which: (N,)."""
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) >= 8]
    overlap = np.concatenate([pairwise_iou(boxes, truth), np.zeros((len(boxes), 1))], axis=1)  # (N, M + 1)
    best, thing = overlap.max(axis=1), overlap.argmax(axis=1)
    clear = (best >= SHOWS_IOU) | (best < SHOWS_NOT_IOU)
    return boxes[clear], np.where(best >= SHOWS_IOU, thing, NOTHING)[clear]
