"""Counts what the networks of the data pipeline compute for a picture, and prints it beside the constants of costs.py.

    python scripts/count_pipeline_flops.py                   # all; exit status 1 if a constant is off by more than 2 %
    python scripts/count_pipeline_flops.py --only sam blip   # these backends
    python scripts/count_pipeline_flops.py --table           # the README's table, from the constants

The real classes at the published sizes, without weights, under torch's FlopCounterMode: matrix products, convolutions
and attention count, all else does not. On meta tensors where the code allows it; Grounding DINO looks at values and
runs on the CPU with random weights (under 4 GB, some minutes).
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.build_settings import StageSettings
from data_pipeline.engine.costs import (
    ACCELERATORS,
    COUNTED_SIDES,
    NETWORKS,
    NetworkFlops,
    StageWork,
    duration,
    money,
    stage_works,
    total_hours,
)
from data_pipeline.errors import CommandParser, run_command
from data_pipeline.rules import RuleSettings
from data_pipeline.stages.caption.blip2 import Blip2Settings
from data_pipeline.stages.detect.grounding_dino import GroundingDinoSettings
from data_pipeline.stages.detect.grounding_dino_py import PACKAGE, PACKAGED_CONFIGS
from data_pipeline.stages.pretrained import DtypeName, find_pretrained, hush_transformers
from data_pipeline.stages.segment.sam import SamSettings

TOLERANCE = 0.02
TABLE_PICTURES = {"1 M": 1_000_000, "10 M": 10_000_000, "76 M": 76_000_000}  # the last: what the paper was trained on
CAPTION_TOKENS = 30  # of the longest caption: at its end each token looks back at most
PHRASES = 8  # of a detector's text, each two words and a full stop: the most nouns that the rules let through
SWIN = {
    "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
}
CLS, SEP, STOP, WORD = 101, 102, 1012, 2000  # tokens of BERT


def teraflop(work: Callable[[], Any]) -> tuple[float, Any]:
    """What a call computes, in TFLOP, and what it returns. Attention is counted as the products that it is made of."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = work()
    return counter.get_total_flops() / 1e12, result


def frozen(network: nn.Module) -> Any:
    """As the pipeline uses it."""
    return network.eval().requires_grad_(False)


def count_blip2() -> NetworkFlops:
    """BLIP-2 with OPT-2.7B: 32 tokens of the picture and one of the prompt are read before the first word."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    opt = {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_hidden_layers": 32}
    text = opt | {"model_type": "opt", "num_attention_heads": 32, "vocab_size": 50304}
    with torch.device("meta"):
        network = frozen(Blip2ForConditionalGeneration(Blip2Config(text_config=text)))
        looked, seen = teraflop(lambda: network.vision_model(torch.empty(1, 3, 224, 224)).last_hidden_state)
        # the parts one by one, since the whole looks into its masks
        asked, tokens = teraflop(
            lambda: network.language_projection(
                network.qformer(query_embeds=network.query_tokens, encoder_hidden_states=seen).last_hidden_state
            )
        )  # (1, 32, 2560)
        language = network.language_model
        prompt = torch.empty(1, tokens.shape[1] + 1, tokens.shape[2])
        first, output = teraflop(lambda: language(inputs_embeds=prompt, use_cache=True, logits_to_keep=1))
        further = teraflop(lambda: _last_token(language, output.past_key_values))[0]
    return NetworkFlops(looked + asked, first, further)


def count_blip(width: int, layers: int, heads: int) -> NetworkFlops:
    """BLIP with a ViT of that size; its decoder asks all of the picture's tokens."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    vision |= {"num_attention_heads": heads, "image_size": 384, "patch_size": 16}
    text = {"encoder_hidden_size": width, "num_attention_heads": 12}
    with torch.device("meta"):
        network = frozen(BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text)))
        looked, seen = teraflop(lambda: network.vision_model(torch.empty(1, 3, 384, 384)).last_hidden_state)
        decoder = partial(network.text_decoder, encoder_hidden_states=seen)
        first, output = teraflop(lambda: decoder(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True))
        further = teraflop(lambda: _last_token(decoder, output.past_key_values))[0]
    return NetworkFlops(looked, first, further)


def _last_token(language: Callable[..., Any], cache: Any) -> Any:
    """The last token of the longest caption, with all that went before it in the cache."""
    own = getattr(cache, "self_attention_cache", cache)
    for number, layer in enumerate(own.layers):
        shape = (*layer.keys.shape[:2], CAPTION_TOKENS - 2, layer.keys.shape[-1])
        own.update(torch.empty(shape), torch.empty(shape), number)
    return language(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)


def count_sam(width: int, layers: int, heads: int, all_round: Sequence[int]) -> NetworkFlops:
    """SAM of transformers; `all_round` are the layers whose attention sees the whole picture."""
    from transformers import SamConfig, SamModel

    size = {"hidden_size": width, "mlp_dim": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    vision = {**size, "global_attn_indexes": list(all_round)}
    with torch.device("meta"):
        network = frozen(SamModel(SamConfig(vision_config=vision)))
        looked, seen = teraflop(lambda: network.get_image_embeddings(torch.empty(1, 3, 1024, 1024)))
        cut = partial(network, image_embeddings=seen, input_boxes=torch.empty(1, 1, 4), multimask_output=False)
        return NetworkFlops(looked, piece=teraflop(cut)[0])


def count_segment_anything(model_type: str) -> NetworkFlops:
    """SAM of Meta's package."""
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        network = frozen(sam_model_registry[model_type]())
        looked, seen = teraflop(lambda: network.image_encoder(torch.empty(1, 3, 1024, 1024)))

        def cut() -> Any:
            sparse, dense = network.prompt_encoder(points=None, boxes=torch.empty(1, 4), masks=None)
            return network.mask_decoder(
                image_embeddings=seen,
                image_pe=network.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )

        return NetworkFlops(looked, piece=teraflop(cut)[0])


def count_classifier() -> NetworkFlops:
    """ViT-B/16 with two labels."""
    from transformers import ViTConfig, ViTForImageClassification

    with torch.device("meta"):
        network = frozen(ViTForImageClassification(ViTConfig(num_labels=2)))
        return NetworkFlops(teraflop(lambda: network(torch.empty(1, 3, 224, 224)))[0])


def count_grounding_dino(swin: str) -> NetworkFlops:
    """Grounding DINO of transformers."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

    backbone = SwinConfig(**SWIN[swin], out_indices=[2, 3, 4])
    network = frozen(GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=backbone)))
    network.model.text_backbone.set_attn_implementation("sdpa")  # as the stage does
    tokens = torch.tensor([[CLS, *[WORD, WORD, STOP] * PHRASES, SEP]])
    pixels = torch.randn(1, 3, *COUNTED_SIDES)
    return NetworkFlops(teraflop(lambda: network(pixel_values=pixels, input_ids=tokens))[0])


def count_grounding_dino_py(config: str) -> NetworkFlops:
    """Grounding DINO of its authors, whose text encoder comes from a folder: here BERT with random weights."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    from data_pipeline.stages.detect.groundingdino_network import build_network, read_literals

    package = find_spec(PACKAGE)
    assert package is not None and package.origin is not None
    with tempfile.TemporaryDirectory() as name:
        named = {
            CLS: "[CLS]",
            SEP: "[SEP]",
            STOP: ".",
            WORD: "word",
            0: "[PAD]",
            100: "[UNK]",
            103: "[MASK]",
            1029: "?",
        }
        vocabulary = "\n".join(named.get(number, f"[unused{number}]") for number in range(BertConfig().vocab_size))
        Path(name, "vocab.txt").write_text(vocabulary + "\n")
        BertTokenizerFast(str(Path(name, "vocab.txt"))).save_pretrained(name)
        BertModel(BertConfig()).save_pretrained(name)
        literals = read_literals(Path(package.origin).parent / "config" / PACKAGED_CONFIGS[config])
        network = build_network(literals, find_pretrained("detect.text_encoder", name), f"detect.config={config}")
    pixels: Tensor = torch.randn(1, 3, *COUNTED_SIDES)
    with redirect_stdout(io.StringIO()):
        return NetworkFlops(teraflop(lambda: network(pixels, captions=["word word . " * PHRASES]))[0])


COUNTERS: dict[tuple[str, str], Callable[[], NetworkFlops]] = {
    ("blip2", "Salesforce/blip2-opt-2.7b"): count_blip2,
    ("blip", "Salesforce/blip-image-captioning-large"): partial(count_blip, 1024, 24, 16),
    ("blip", "Salesforce/blip-image-captioning-base"): partial(count_blip, 768, 12, 12),
    ("grounding_dino", "IDEA-Research/grounding-dino-tiny"): partial(count_grounding_dino, "tiny"),
    ("grounding_dino", "IDEA-Research/grounding-dino-base"): partial(count_grounding_dino, "base"),
    ("grounding_dino_py", "swin_t"): partial(count_grounding_dino_py, "swin_t"),
    ("grounding_dino_py", "swin_b"): partial(count_grounding_dino_py, "swin_b"),
    ("sam", "facebook/sam-vit-base"): partial(count_sam, 768, 12, 12, (2, 5, 8, 11)),
    ("sam", "facebook/sam-vit-large"): partial(count_sam, 1024, 24, 16, (5, 11, 17, 23)),
    ("sam", "facebook/sam-vit-huge"): partial(count_sam, 1280, 32, 16, (7, 15, 23, 31)),
    ("segment_anything", "vit_b"): partial(count_segment_anything, "vit_b"),
    ("segment_anything", "vit_l"): partial(count_segment_anything, "vit_l"),
    ("segment_anything", "vit_h"): partial(count_segment_anything, "vit_h"),
    ("nsfw", "Falconsai/nsfw_image_detection"): count_classifier,
}


def parts(flops: NetworkFlops) -> tuple[float, float, float]:
    """For a picture, a beam, a token or box."""
    return flops.picture, flops.beam, flops.piece


def agrees(counted: NetworkFlops, known: NetworkFlops) -> bool:
    """Whether each part of a constant is within the tolerance."""
    return all(
        abs(ours - theirs) <= TOLERANCE * theirs for ours, theirs in zip(parts(known), parts(counted), strict=True)
    )


def compare(backends: Sequence[str]) -> bool:
    """Count, print beside the constants, say whether all agree."""
    print(f"{'TFLOP for a picture, a beam, a token or box':62s}{'counted':>27s}{'costs.py':>29s}")
    good = True
    for (backend, model), count in COUNTERS.items():
        if backends and backend not in backends:
            continue
        name = f"{backend} {model}"
        if backend == "grounding_dino_py" and find_spec(PACKAGE) is None:
            print(f"{name:62s}not counted: groundingdino-py is not installed")
            continue
        known, counted = NETWORKS[backend, model], count()
        same = agrees(counted, known)
        print(f"{name:62s}{columns(counted)}  {columns(known)}{'' if same else '  DIFFERS'}", flush=True)
        good &= same
    return good


def columns(flops: NetworkFlops) -> str:
    return "".join(f"{part:9.4f}" if part > 0.01 or not part else f"{part:9.2g}" for part in parts(flops))


def markdown_table() -> str:
    """Hours and dollars of the usual choices by number of pictures: the rules let all pictures through, and none."""
    head = ["caption, detect, segment", "TFLOP a picture"]
    head += [f"{label} on {accelerator.name}" for label in TABLE_PICTURES for accelerator in ACCELERATORS]
    rows = [head, ["---"] * len(head)]
    dtypes: tuple[DtypeName, ...] = ("float32", "float16")
    for dtype in dtypes:
        for model, name in (("facebook/sam-vit-huge", "SAM ViT-H"), ("facebook/sam-vit-base", "SAM ViT-B")):
            detect, segment = GroundingDinoSettings(dtype=dtype), SamSettings(model=model)
            stages = StageSettings(caption=Blip2Settings(), detect=detect, segment=segment)
            work = stage_works(stages, RuleSettings())
            rows.append([f"BLIP-2, Grounding DINO tiny in {dtype}, {name}", *table_cells(work)])
    rows.append(["BLIP-2 alone: the rules let nothing through", *table_cells([one for one in work if one.sure])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def table_cells(work: Sequence[StageWork]) -> list[str]:
    """TFLOP a picture, then hours and dollars by number of pictures and accelerator, everything let through."""
    cells = [f"{sum(one.tflop for one in work):.1f}"]
    for pictures in TABLE_PICTURES.values():
        for accelerator in ACCELERATORS:
            hours = total_hours(work, pictures, accelerator)[1]
            cells.append(f"{duration(hours)}, {money(hours * accelerator.dollars_per_hour)}")
    return cells


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        "count_pipeline_flops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.prog = "scripts/count_pipeline_flops.py"
    backends = sorted({backend for backend, _ in COUNTERS})
    parser.add_argument("--only", nargs="+", choices=backends, default=[], metavar="BACKEND", help=", ".join(backends))
    parser.add_argument("--table", action="store_true", help="print the README's table and count nothing")
    options = parser.parse_args(arguments)
    if options.table:
        print(markdown_table())
        return 0
    hush_transformers()
    return 0 if compare(options.only) else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
