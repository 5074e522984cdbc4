"""Grounding DINO with few random weights, saved as each of the two projects lays it out, and its WordPiece tokenizer.

The original project's Swin cannot be made smaller than Swin-T, and its transformer is 256 wide by constants in its
code; the rest is as small as it goes. `save_as_transformers` says the same weights by the names on the hub.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    SwinConfig,
)

from data_pipeline.stages.detect.groundingdino_network import build_network, read_literals
from data_pipeline.stages.pretrained import find_pretrained

VOCABULARY_SIZE = 1200
SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}  # BERT's own
WORDS = "dog cat red sports car plant flower pot mini ##van van cafe two boat of st bernard - ' s".split()
QUERIES = 20
BERT = BertConfig(
    vocab_size=VOCABULARY_SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)
ORIGINAL_CONFIG = """
# one layer each instead of six
batch_size = 1
modelname = "groundingdino"
backbone = "swin_T_224_1k"
position_embedding = "sine"
pe_temperatureH = 20
pe_temperatureW = 20
return_interm_indices = [1, 2, 3]
backbone_freeze_keywords = None
enc_layers = 1
dec_layers = 2
pre_norm = False
dim_feedforward = 64
hidden_dim = 256
dropout = 0.0
nheads = 8
num_queries = 20
query_dim = 4
num_patterns = 0
num_feature_levels = 4
enc_n_points = 4
dec_n_points = 4
two_stage_type = "standard"
two_stage_bbox_embed_share = False
two_stage_class_embed_share = False
transformer_activation = "relu"
dec_pred_bbox_embed_share = True
dn_box_noise_scale = 1.0
dn_label_noise_ratio = 0.5
dn_label_coef = 1.0
dn_bbox_coef = 1.0
embed_init_tgt = True
dn_labelbook_size = 2000
max_text_len = 256
text_encoder_type = "bert-base-uncased"
use_text_enhancer = True
use_fusion_layer = True
use_checkpoint = True
use_transformer_ckpt = True
use_text_cross_attention = True
text_dropout = 0.0
fusion_dropout = 0.0
fusion_droppath = 0.1
sub_sentence_present = True
"""


def word_piece_tokenizer(folder: Path) -> BertTokenizerFast:
    """BERT's tokenizer over a few words and all letters; also saved in `folder`."""
    by_number = {number: token for token, number in SPECIAL.items()}
    letters = [prefix + letter for prefix in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz"]
    by_number |= dict(enumerate([*WORDS, *letters], start=1100))
    folder.mkdir(parents=True, exist_ok=True)
    lines = [by_number.get(number, f"[unused{number}]") for number in range(VOCABULARY_SIZE)]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return tokenizer


def _stir(network: torch.nn.Module) -> None:
    """Weights of a size that lets every part be seen in the result; as they are made, many are zero."""
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            fan = parameter[0].numel()
            torch.nn.init.normal_(parameter, std=1.5 * fan**-0.5)
        elif "gamma" in name or name.endswith("_param"):
            torch.nn.init.constant_(parameter, 0.5)
        elif name.endswith(("decoder.norm.weight", "decoder.layer_norm.weight")):
            torch.nn.init.constant_(parameter, 0.2)  # scores between 0 and 1, not at them


def save_tiny_grounding_dino(folder: Path, multi_modal: bool = False) -> Path:
    """The folder of transformers' Grounding DINO, or of MM Grounding DINO."""
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, out_indices=[2, 3, 4]
    )
    config = (MMGroundingDinoConfig if multi_modal else GroundingDinoConfig)(
        backbone_config=swin,
        text_config=BERT,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=QUERIES,
        max_text_len=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = (MMGroundingDinoForObjectDetection if multi_modal else GroundingDinoForObjectDetection)(config)
        _stir(model)
    model.save_pretrained(folder)
    GroundingDinoImageProcessor().save_pretrained(folder)
    word_piece_tokenizer(folder)
    return folder


def save_small_original(folder: Path) -> Path:
    """What the original project reads: `config.py`, `weights.pth`, `weights.safetensors`, and BERT in `bert`."""
    word_piece_tokenizer(folder / "bert")
    (folder / "config.py").write_text(ORIGINAL_CONFIG)
    with torch.random.fork_rng():
        torch.manual_seed(6)
        BertModel(BERT).save_pretrained(folder / "bert")
        text_encoder = find_pretrained("detect.text_encoder", str(folder / "bert"))
        network = build_network(read_literals(folder / "config.py"), text_encoder, "config")
        _stir(network)
    weights = network.state_dict()
    torch.save({"model": {f"module.{name}": tensor for name, tensor in weights.items()}}, folder / "weights.pth")
    once = {tensor.data_ptr(): name for name, tensor in reversed(weights.items())}
    save_file({name: weights[name] for name in once.values()}, folder / "weights.safetensors")
    return folder


def save_as_transformers(original: Path, folder: Path) -> Path:
    """The very same weights as transformers' Grounding DINO."""
    swin = SwinConfig(
        image_size=224,
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_indices=[2, 3, 4],
    )
    config = GroundingDinoConfig(
        backbone_config=swin,
        text_config=BERT,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=QUERIES,
    )
    weights = torch.load(original / "weights.pth", weights_only=True)["model"]
    renamed = {
        name: tensor.contiguous()
        for old, value in weights.items()
        for name, tensor in _converted(old.removeprefix("module."), value)
        if "decoder.bbox_embed" not in old and not re.search(r"bbox_embed\.[1-9]\.|pooler|position_index", old)
    }
    GroundingDinoForObjectDetection(config).config.save_pretrained(folder)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    GroundingDinoImageProcessor().save_pretrained(folder)
    word_piece_tokenizer(folder)
    return folder


NEW_NAMES = (  # in order; each rule sees what the ones before it left
    (r"^backbone\.0\.patch_embed\.proj\.", "swin.embeddings.patch_embeddings.projection."),
    (r"^backbone\.0\.patch_embed\.norm\.", "swin.embeddings.norm."),
    (r"^backbone\.0\.layers\.", "swin.encoder.layers."),
    (r"^backbone\.0\.norm(\d)\.", lambda found: f"swin.hidden_states_norms.stage{int(found[1]) + 1}."),
    (r"^(swin\..*)\.norm1\.", r"\1.layernorm_before."),
    (r"^(swin\..*)\.norm2\.", r"\1.layernorm_after."),
    (r"^(swin\..*)\.attn\.proj\.", r"\1.attention.output.dense."),
    (r"^(swin\..*)\.attn\.", r"\1.attention.self."),
    (r"^(swin\..*)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"^(swin\..*)\.mlp\.fc2\.", r"\1.output.dense."),
    (r"^swin\.", "model.backbone.conv_encoder.model."),
    (r"^bert\.", "model.text_backbone."),
    (r"^feat_map\.", "model.text_projection."),
    (r"^input_proj\.", "model.input_proj_vision."),
    (r"^transformer\.tgt_embed\.", "model.query_position_embeddings."),
    (r"^transformer\.enc_out_bbox_embed\.", "model.encoder_output_bbox_embed."),
    (r"^transformer\.", "model."),
    (r"\.decoder\.norm\.", ".decoder.layer_norm."),
    (r"\.decoder\.ref_point_head\.", ".decoder.reference_points_head."),
    (r"\.decoder\.layers\.(\d)\.cross_attn\.", r".decoder.layers.\1.encoder_attn."),
    (r"\.decoder\.layers\.(\d)\.norm1\.", r".decoder.layers.\1.encoder_attn_layer_norm."),
    (r"\.decoder\.layers\.(\d)\.ca_text\.", r".decoder.layers.\1.encoder_attn_text."),
    (r"\.decoder\.layers\.(\d)\.catext_norm\.", r".decoder.layers.\1.encoder_attn_text_layer_norm."),
    (r"\.decoder\.layers\.(\d)\.norm2\.", r".decoder.layers.\1.self_attn_layer_norm."),
    (r"\.decoder\.layers\.(\d)\.norm3\.", r".decoder.layers.\1.final_layer_norm."),
    (r"\.encoder\.fusion_layers\.(\d)\.", r".encoder.layers.\1.fusion_layer."),
    (r"\.gamma_v$", ".vision_param"),
    (r"\.gamma_l$", ".text_param"),
    (r"\.layer_norm_v\.", ".layer_norm_vision."),
    (r"\.layer_norm_l\.", ".layer_norm_text."),
    (r"(fusion_layer.*[._])v_proj\.", r"\1vision_proj."),
    (r"(fusion_layer.*[._])l_proj\.", r"\1text_proj."),
    (r"\.encoder\.text_layers\.(\d)\.norm1\.", r".encoder.layers.\1.text_enhancer_layer.layer_norm_before."),
    (r"\.encoder\.text_layers\.(\d)\.norm2\.", r".encoder.layers.\1.text_enhancer_layer.layer_norm_after."),
    (r"\.encoder\.text_layers\.(\d)\.", r".encoder.layers.\1.text_enhancer_layer."),
    (r"\.encoder\.layers\.(\d)\.norm1\.", r".encoder.layers.\1.deformable_layer.self_attn_layer_norm."),
    (r"\.encoder\.layers\.(\d)\.norm2\.", r".encoder.layers.\1.deformable_layer.final_layer_norm."),
    (r"\.encoder\.layers\.(\d)\.(self_attn|linear)", r".encoder.layers.\1.deformable_layer.\2"),
    (r"\.linear(\d)\.", r".fc\1."),
)


def _converted(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """Name and value in transformers' model; what it holds apart (query, key, value) is cut."""
    if not name.startswith("bert."):
        for pattern, replacement in NEW_NAMES:
            name = re.sub(pattern, replacement, name)
    else:
        name = name.replace("bert.", "model.text_backbone.", 1)
    joined = re.match(r"(.*\.)(?:qkv\.|in_proj_)(weight|bias)$", name)
    if joined is None:
        return [(name, value)]
    parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
    return [(f"{joined[1]}{part}.{joined[2]}", tensor) for part, tensor in parts]
