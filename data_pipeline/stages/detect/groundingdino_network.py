"""The network of groundingdino-py 0.4.0 (2023), built for the transformers and the batches of today.

Three things are put right from outside; nothing installed is edited. BERT lost three methods that the package copies
(transformers 5). In a batch, the masks that keep phrases apart are handed to the wrong pictures (IDEA-Research/
GroundingDINO, issue 294). Configuration files are Python; here they are read as lists of constants and never run.
"""

from __future__ import annotations

import ast
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertModel

from data_pipeline.errors import UserError
from data_pipeline.stages.pretrained import Pretrained, hush_transformers, one_line_errors


def read_literals(file: Path) -> dict[str, Any]:
    """The constants of a configuration file, which holds nothing but lines `name = constant`.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        lines = ast.parse(file.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a configuration ({' '.join(str(error).split())})") from error
    values = {}
    for line in lines:
        match line:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                try:
                    values[name] = ast.literal_eval(value)
                    continue
                except ValueError:
                    pass  # a call or a name: told below
        raise UserError(f"{file}, line {line.lineno}: expected `name = constant`; configurations are read, never run")
    return values


def build_network(config: dict[str, Any], text_encoder: Pretrained, subject: str) -> Any:
    """The network with random weights, but for the text encoder's.

    Args:
        config: names and values of the package's configuration.
        text_encoder: BERT and its tokenizer.
        subject: what a message begins with.
    Raises:
        UserError: the configuration lacks values or holds some that do not fit; the text encoder cannot be read.
    """
    if not str(config.get("backbone")).startswith("swin_"):
        raise UserError(f"{subject}: backbone={config.get('backbone')}; expected a Swin such as swin_T_224_1k")
    if not any(text_encoder.folder.glob("*.safetensors")):
        raise UserError(f"{text_encoder}: holds no .safetensors file; pickled weights are not read")
    hush_transformers()
    settled = {
        "modelname": "groundingdino",
        "text_encoder_type": str(text_encoder.folder),
        "use_checkpoint": False,  # saves memory in training only
        "use_transformer_ckpt": False,
    }
    try:
        with one_line_errors(subject), redirect_stdout(io.StringIO()), warnings.catch_warnings(), methods_of_old_bert():
            warnings.simplefilter("ignore")
            from groundingdino.models import build_model

            model = build_model(SimpleNamespace(**config | settled))
    except AssertionError as error:
        raise UserError(f"{subject}: holds values that do not fit ({' '.join(str(error).split())[:200]})") from error
    for layer in model.transformer.encoder.text_layers:
        layer.self_attn.register_forward_pre_hook(_masks_by_picture, with_kwargs=True)
    warnings.filterwarnings("ignore", r"`torch\.cuda\.amp\.autocast", FutureWarning)  # at every call of its decoder
    warnings.filterwarnings("ignore", r"torch\.meshgrid: ", UserWarning)
    return model.float().eval().requires_grad_(False)


def load_weights(model: nn.Module, checkpoint: Path, subject: str) -> None:
    """Fill the network from a checkpoint of the authors' format.

    Raises:
        UserError: it cannot be read without running it, lacks weights, or is of another size.
    """
    with one_line_errors(subject):
        if checkpoint.suffix == ".safetensors":
            state = load_file(checkpoint)
        else:
            try:
                state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            except Exception as error:  # the unpickler passes on whatever a broken file makes of it
                raise UserError(
                    f"{subject}: holds more than weights, or is broken; give a .safetensors file"
                ) from error
        state = state.get("model", state)
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        own = model.state_dict(keep_vars=True)  # parts that are used twice have two names; one of them is enough
        there = {id(tensor) for name, tensor in own.items() if name in state}
        lacking = [n for n, tensor in own.items() if id(tensor) not in there and not n.startswith("bert.pooler.")]
        if lacking:
            raise UserError(f"{subject}: incomplete, lacks {len(lacking)} weights such as {lacking[0]}")
        model.load_state_dict(state, strict=False)


@contextmanager
def methods_of_old_bert() -> Iterator[None]:
    """While the network is built, BERT has the methods that the package's wrapper of it keeps for itself."""
    lacking = {name: method for name, method in _OLD_METHODS.items() if not hasattr(BertModel, name)}
    for name, method in lacking.items():
        setattr(BertModel, name, method)
    try:
        yield
    finally:
        for name in lacking:
            delattr(BertModel, name)


def _added_mask(bert: BertModel, mask: Tensor, *_: Any) -> Tensor:
    """What is added to the attention logits: 0 where `mask`, (N, L) or (N, L, L), is true, else very little."""
    dtype = bert.embeddings.word_embeddings.weight.dtype
    by_head = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]  # (N, 1, 1 or L, L)
    return (1 - by_head.to(dtype)) * torch.finfo(dtype).min


def _no_head_masks(bert: BertModel, head_mask: None, num_layers: int, *_: Any) -> list[None]:
    """All heads are used."""
    return [None] * num_layers


_OLD_METHODS: dict[str, Callable[..., Any]] = {
    "get_extended_attention_mask": _added_mask,
    "invert_attention_mask": _added_mask,
    "get_head_mask": _no_head_masks,
}


def _masks_by_picture(attention: nn.MultiheadAttention, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Put the masks (heads times pictures, L, L) in the order that attention reads them: a picture's heads together."""
    mask = named["attn_mask"]
    if mask is not None and mask.dim() == 3:
        named["attn_mask"] = mask.unflatten(0, (attention.num_heads, -1)).transpose(0, 1).flatten(0, 1)
    return given, named
