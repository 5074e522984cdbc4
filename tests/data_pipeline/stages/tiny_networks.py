"""BLIP-2 and BLIP as tiny random networks of the real classes, saved as their hub repositories are laid out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertTokenizerFast,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    PreTrainedTokenizerFast,
)

SIDE = 28  # pixels that the vision models look at
QUERIES = 4  # tokens of BLIP-2's Q-Former
WORDS = ("a", "photo", "of", "dog", "cat", "red", "car", "on", "the", "beach", "two", "tree")
LINE_BREAK = "\n"  # what ends a caption of BLIP-2's OPT, as in its hub repositories
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": SIDE, "patch_size": 7}
OPT = {
    "model_type": "opt",
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 2,
    "pad_token_id": 1,
}
T5 = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
    "eos_token_id": 2,
}


def save_tiny_blip2(folder: Path, language_model: Literal["opt", "t5"] = "opt") -> Path:
    """A seeded BLIP-2. Texts begin with `</s>` for OPT and end with it for T5, as theirs do."""
    tokens = ("<unk>", "<pad>", "</s>", LINE_BREAK, *WORDS)
    tokenizer = _word_tokenizer(tokens, "</s> $A" if language_model == "opt" else "$A </s>")
    processor = Blip2Processor(_image_processor(), tokenizer, num_query_tokens=QUERIES)
    text = {**OPT, "eos_token_id": tokens.index(LINE_BREAK)} if language_model == "opt" else T5
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**SMALL, "vocab_size": 8},
        text_config={**text, "vocab_size": len(processor.tokenizer)},
        num_query_tokens=QUERIES,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    _save(Blip2ForConditionalGeneration, config, processor, folder, seed=2)
    return folder


def save_tiny_blip(folder: Path) -> Path:
    """A seeded BLIP with BERT's tokenizer; [DEC] begins a caption and [SEP] ends it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "[DEC]"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), bos_token="[DEC]")
    text: dict[str, Any] = {
        **SMALL,
        "vocab_size": len(vocabulary),
        "projection_dim": 8,
        "max_position_embeddings": 64,
        "encoder_hidden_size": 16,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = BlipConfig(vision_config=VISION, text_config=text, projection_dim=8, tie_word_embeddings=False)
    _save(BlipForConditionalGeneration, config, BlipProcessor(_image_processor(), tokenizer), folder, seed=11)
    return folder


def _image_processor() -> BlipImageProcessor:
    return BlipImageProcessor(size={"height": SIDE, "width": SIDE})


def _word_tokenizer(tokens: tuple[str, ...], template: str) -> PreTrainedTokenizerFast:
    """Whole words; `template` says where `</s>` stands."""
    inner = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("</s>", tokens.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _save(network: type[Any], config: Any, processor: Any, folder: Path, seed: int) -> None:
    """With weights so large that different pictures get different captions."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = network(config)
        for parameter in made.parameters():
            parameter.data += torch.randn(parameter.shape) * (0.5 if parameter.dim() > 1 else 0.1)
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
