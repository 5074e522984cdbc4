"""SAM with few random weights, saved as each of the two libraries reads it: the same weights under both their names."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn
from transformers import (
    SamConfig,
    SamImageProcessor,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

SIDE, PATCH, WIDTH = 128, 16, 32  # pixels that it looks at, of a patch; numbers of a token
GRID = SIDE // PATCH

# Meta's names -> those of transformers; applied in this order
NAMES = (
    (r"^image_encoder\.neck\.0", "vision_encoder.neck.conv1"),
    (r"^image_encoder\.neck\.1", "vision_encoder.neck.layer_norm1"),
    (r"^image_encoder\.neck\.2", "vision_encoder.neck.conv2"),
    (r"^image_encoder\.neck\.3", "vision_encoder.neck.layer_norm2"),
    (r"^image_encoder\.patch_embed\.proj", "vision_encoder.patch_embed.projection"),
    (r"^image_encoder\.blocks\.(\d+)\.norm", r"vision_encoder.layers.\1.layer_norm"),
    (r"^image_encoder\.blocks", "vision_encoder.layers"),
    (r"^image_encoder", "vision_encoder"),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix", "shared_image_embedding.positional_embedding"),
    (r"^prompt_encoder\.point_embeddings", "prompt_encoder.point_embed"),
    (r"mask_downscaling\.0", "mask_embed.conv1"),
    (r"mask_downscaling\.1", "mask_embed.layer_norm1"),
    (r"mask_downscaling\.3", "mask_embed.conv2"),
    (r"mask_downscaling\.4", "mask_embed.layer_norm2"),
    (r"mask_downscaling\.6", "mask_embed.conv3"),
    (r"output_upscaling\.0", "upscale_conv1"),
    (r"output_upscaling\.1", "upscale_layer_norm"),
    (r"output_upscaling\.3", "upscale_conv2"),
    (r"transformer\.norm_final_attn", "transformer.layer_norm_final_attn"),
    (r"(transformer\.layers\.\d+)\.norm", r"\1.layer_norm"),
    (r"(hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.0", r"\1.proj_in"),
    (r"(hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.1", r"\1.layers.0"),
    (r"(hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.2", r"\1.proj_out"),
)


def tiny_sam(seed: int = 0) -> Sam:
    """Meta's network with one windowed and one global layer."""
    torch.manual_seed(seed)
    encoder = ImageEncoderViT(
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=2,
        num_heads=2,
        out_chans=WIDTH,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
    )
    prompts = PromptEncoder(
        embed_dim=WIDTH, image_embedding_size=(GRID, GRID), input_image_size=(SIDE, SIDE), mask_in_chans=4
    )
    decoder = MaskDecoder(
        transformer_dim=WIDTH,
        transformer=TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=64, num_heads=2),
        iou_head_hidden_dim=WIDTH,
    )
    sam = Sam(encoder, prompts, decoder)
    for name, weight in encoder.named_parameters():
        if "pos" in name:  # begin at zero
            nn.init.normal_(weight, std=0.5)
    return sam.eval()


def save_meta(sam: Sam, file: Path) -> Path:
    """As segment-anything reads it; .safetensors or .pth by the name of the file."""
    if file.suffix == ".safetensors":
        save_file(sam.state_dict(), file)
    else:
        torch.save(sam.state_dict(), file)
    return file


def save_transformers(sam: Sam, folder: Path) -> Path:
    """The same weights as transformers reads them, with the configuration of its image processor."""
    small = {"hidden_size": WIDTH}
    config = SamConfig(
        vision_config=SamVisionConfig(
            **small,
            output_channels=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            window_size=3,
            global_attn_indexes=[1],
            num_pos_feats=WIDTH // 2,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(**small, image_size=SIDE, patch_size=PATCH, mask_input_channels=4),
        mask_decoder_config=SamMaskDecoderConfig(
            **small, mlp_dim=64, num_attention_heads=2, iou_head_hidden_dim=WIDTH, layer_norm_eps=1e-5
        ),
    )
    model = SamModel(config)
    lacking, unknown = model.load_state_dict(renamed(sam.state_dict()), strict=False)
    assert not unknown and lacking in ([], ["prompt_encoder.shared_embedding.positional_embedding"])  # a tied copy
    model.tie_weights()
    model.save_pretrained(folder)
    SamImageProcessor(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's weights by the names that transformers uses."""
    found = {}
    for name, value in weights.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found
