"""CLIP, DINO and Grounding DINO as tiny networks of the real classes, saved as their hub repositories are laid out."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertTokenizerFast,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    SwinConfig,
    ViTConfig,
    ViTModel,
)

from tests.model.tiny_tokenizer import tiny_tokenizer

SIZE = 28  # pixels that CLIP and DINO look at; 32 are DINO's shorter side
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_tiny_dino(folder: Path) -> Path:
    """A seeded ViT without pooler, as DINO is."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=7,
            initializer_range=0.3,
        )
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def save_tiny_clip(folder: Path) -> Path:
    """A seeded CLIP and its tokenizer."""
    tokenizer = tiny_tokenizer(32, placeholder=False)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        projection_dim=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=7,
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_detector(folder: Path) -> Path:
    """A seeded Grounding DINO; its tokenizer spells words by letters and has BERT's numbers for [CLS], [SEP], `.`."""
    numbers = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    numbers |= {letter: 1100 + i for i, letter in enumerate(LETTERS)}
    numbers |= {f"##{letter}": 1130 + i for i, letter in enumerate(LETTERS)}
    by_number = {number: token for token, number in numbers.items()}
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = [by_number.get(number, f"[unused{number}]") for number in range(1160)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    images = GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 192})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_indices=[2, 3, 4],
    )
    bert = BertConfig(vocab_size=1160, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = GroundingDinoConfig(
        backbone_config=swin,
        text_config=bert,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=12,
        max_text_len=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = GroundingDinoForObjectDetection(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
        model.save_pretrained(folder)
    return folder
