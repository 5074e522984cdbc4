"""Parameter-efficient adapters: each position against the paper's formula, and beside everything else in a UNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

from model.attention_maps import install_layer_contexts
from model.efficient_adapters import (
    AdapterDesign,
    AdapterError,
    EfficientAdapters,
    attach,
    detach,
    load_folder,
    save_folder,
)
from model.efficient_adapters.bottleneck import TokenAdapter
from model.efficient_adapters.design import CONTEXT, RESIDUAL, SOURCES, STREAM, TARGETS
from tests.model.tiny import LATENTS, TEXT_WIDTH, tiny_adapter, tiny_unet, wake

# As published: configs/sd-inject-dreambooth/INPUT-OUTPUT.yaml of the paper's code.
PUBLISHED = (
    "attn1i-attn1i attn1i-attn2i attn1i-ffni attn1i-transo attn1o-attn2i attn1o-ffni attn1o-transo attn2c-attn2c "
    "attn2i-attn2i attn2i-ffni attn2i-transo attn2o-ffni attn2o-transo ffni-ffni ffni-transo ffno-transo resi-resi "
    "resi-reso reso-reso transo-transo"
).split()
IN_TRANSFORMERS = [label for label in PUBLISHED if not label.startswith("res")]
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"


def design_of(label: str, **options: Any) -> AdapterDesign:
    return AdapterDesign(*label.split("-"), **{"width": 5, "scale": 0.7, "activation": "silu"} | options)


def awake(unet: UNet2DConditionModel, *labels: str, seed: int = 0, **options: Any) -> EfficientAdapters:
    """Adapters with nothing left at zero."""
    torch.manual_seed(seed)
    adapters = EfficientAdapters(unet, [design_of(label, **options) for label in labels])
    wake(adapters, seed)
    return adapters


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_unet()


@pytest.fixture
def block(unet: UNet2DConditionModel) -> Iterator[nn.Module]:
    yield unet.get_submodule(BLOCK)
    detach(unet)


def tokens(width: int, count: int = 6, seed: int = 7) -> Tensor:
    return torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed))


def run(unet: UNet2DConditionModel, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, *LATENTS, generator=generator)
    return unet(latents, torch.tensor([5, 700]), tokens(TEXT_WIDTH, 9), return_dict=False, **options)[0]


def block_by_hand(
    block: Any, x: Tensor, text: Any, design: AdapterDesign, delta: Callable[[Tensor], Tensor], fuser: Any = None
) -> Tensor:
    """A transformer block, and x <- x + delta(what is read) at the design's positions."""
    found: dict[str, Tensor] = {}

    def passed(position: str, value: Tensor) -> Tensor:
        if design.source == position:
            found["delta"] = delta(value)
        return value + found["delta"] if design.target == position else value

    x = passed("attn1i", x)
    x = x + passed("attn1o", block.attn1(block.norm1(x)))
    x = x if fuser is None else fuser(x, None)
    x = passed("attn2i", x)
    text = (passed("attn2c", text[0]), *text[1:]) if isinstance(text, tuple) else passed("attn2c", text)
    x = x + passed("attn2o", block.attn2(block.norm2(x), encoder_hidden_states=text))
    x = passed("ffni", x)
    x = x + passed("ffno", block.ff(block.norm3(x)))
    return passed("transo", x)


def module_in(adapters: EfficientAdapters, path: str) -> nn.Module:
    return next(placed.module for placed in adapters if placed.path == path)


def test_a_token_adapter_is_the_formula() -> None:
    adapter = TokenAdapter(2, 1, "relu")
    values = {"down.weight": [[1.0, -1.0]], "down.bias": [0.5], "up.weight": [[2.0], [3.0]], "up.bias": [0.1, -0.2]}
    adapter.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    shown = adapter(torch.tensor([[[2.0, 1.0], [0.0, 1.0]]]))  # W_down x + b: 1.5 and -0.5
    assert torch.allclose(shown, torch.tensor([[[3.1, 4.3], [0.1, -0.2]]]))


@pytest.mark.parametrize(
    ("activation", "bent"), [("relu", 1.5), ("sigmoid", 0.817574), ("silu", 1.226362), ("identity", 1.5)]
)
def test_the_four_activations(activation: str, bent: float) -> None:
    adapter = TokenAdapter(1, 1, activation)
    adapter.load_state_dict(
        {"down.weight": torch.ones(1, 1), "down.bias": torch.zeros(1)}
        | {"up.weight": torch.ones(1, 1), "up.bias": torch.zeros(1)}
    )
    assert adapter(torch.tensor([[[1.5]]])).item() == pytest.approx(bent, abs=1e-5)
    assert adapter(torch.tensor([[[-1.5]]])).item() == pytest.approx(
        {"relu": 0.0, "sigmoid": 0.182426, "silu": -0.273638, "identity": -1.5}[activation], abs=1e-5
    )


def test_the_pairs_that_are_allowed_are_the_published_ones() -> None:
    allowed = []
    for source in SOURCES:
        for target in TARGETS:
            try:
                allowed.append(AdapterDesign(source, target).label)
            except AdapterError as error:
                assert "\n" not in str(error)
    assert sorted(allowed) == sorted(PUBLISHED)
    assert len(SOURCES) == 10 and len(TARGETS) == 7 and set(SOURCES) == {*STREAM, *CONTEXT, *RESIDUAL}


@pytest.mark.parametrize(
    ("source", "target", "options", "told"),
    [
        ("ffni", "attn2i", {}, "adapter ffni-attn2i: attn2i is passed by then; what reads ffni can add at ffni, trans"),
        ("attn2c", "ffni", {}, "ffni holds other values than attn2c; what reads attn2c can add at attn2c"),
        ("attn2o", "reso", {}, "reso holds other values"),
        ("attn3i", "ffni", {}, "adapter input 'attn3i': no such position; expected one of attn1i, "),
        ("attn2o", "ffno", {}, "adapter output 'ffno': nothing adds there; expected one of attn1i, attn2i, "),
        ("attn2o", "ffni", {"activation": "gelu"}, "activation 'gelu'; expected relu, sigmoid, silu, identity"),
        ("attn2o", "ffni", {"width": 0}, "width 0; expected at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(source: str, target: str, options: Any, told: str) -> None:
    with pytest.raises(AdapterError, match=told):
        AdapterDesign(source, target, **options)


@pytest.mark.parametrize("label", IN_TRANSFORMERS)
def test_each_pair_in_a_transformer_block_is_as_by_hand(unet, block, label: str) -> None:
    adapters, design = awake(unet, label), design_of(label)
    module = module_in(adapters, BLOCK)
    x, text = tokens(32), tokens(TEXT_WIDTH, 4, seed=8)
    expected = block_by_hand(block, x, text, design, lambda value: 0.7 * module(value))
    plain = block(x, encoder_hidden_states=text)
    attach(unet, [adapters])
    drawn = block(x, encoder_hidden_states=text)
    assert torch.allclose(drawn, expected, atol=1e-5) and not torch.allclose(drawn, plain, atol=1e-3)


@pytest.mark.parametrize("label", [label for label in PUBLISHED if label.startswith("res")])
def test_each_pair_in_a_residual_block_is_as_by_hand(unet, label: str) -> None:
    path = "down_blocks.1.resnets.0"  # 16 channels in, 32 out
    adapters, resnet = awake(unet, label), unet.get_submodule(path)
    a = module_in(adapters, path).state_dict()
    x, time = torch.randn(2, 16, 4, 4), torch.randn(2, 64)

    def delta(value: Tensor) -> Tensor:
        normed = functional.silu(functional.group_norm(value, 4, a["norm.weight"], a["norm.bias"], eps=1e-5))
        narrow = functional.silu(functional.conv2d(normed, a["down.weight"], a["down.bias"], padding=1))
        return 0.7 * functional.conv2d(narrow, a["up.weight"], a["up.bias"], padding=1)

    source, target = label.split("-")
    found = delta(x) if source == "resi" else None
    inner = x + found if target == "resi" else x
    expected = resnet(inner, time)
    if target == "reso":
        expected = expected + (delta(expected) if found is None else found)
    attach(unet, [adapters])
    assert torch.allclose(resnet(x, time), expected, atol=1e-5)


def test_an_untrained_adapter_changes_nothing(unet) -> None:
    plain = run(unet)
    attach(unet, [EfficientAdapters(unet, [design_of(label) for label in PUBLISHED])])
    assert torch.equal(run(unet), plain)


def test_the_unet_stays_stock_and_adapters_come_off(unet) -> None:
    plain, names = run(unet), list(unet.state_dict())
    adapters = awake(unet, "attn2o-ffni", "resi-reso")
    attach(unet, [adapters])
    assert not torch.allclose(run(unet), plain, atol=1e-3) and list(unet.state_dict()) == names
    detach(unet)
    assert torch.equal(run(unet), plain)
    detach(unet)


def test_attaching_replaces_what_was_attached(unet) -> None:
    first, second = awake(unet, "attn2o-ffni"), awake(unet, "attn1i-transo", seed=1)
    attach(unet, [second])
    alone = run(unet)
    attach(unet, [first])
    attach(unet, [second])
    assert torch.equal(run(unet), alone)


def test_several_adapters_of_a_block_work_side_by_side(unet, block) -> None:
    """All read what the base puts there: two that read and add alike are one twice as strong, in either order."""
    one = awake(unet, "attn2o-ffni", "ffni-ffni", "attn1i-transo")
    other = awake(unet, "attn2o-ffni", "ffni-ffni", "attn1i-transo")
    x, text = tokens(32), tokens(TEXT_WIDTH, 4)
    attach(unet, [one, other])
    both = block(x, encoder_hidden_states=text)
    attach(unet, [one])
    one.strength = 2.0
    assert torch.allclose(block(x, encoder_hidden_states=text), both, atol=1e-5)
    different = awake(unet, "ffni-transo", "attn2o-transo", seed=4)
    attach(unet, [one, different])
    there = block(x, encoder_hidden_states=text)
    attach(unet, [different, one])
    assert torch.allclose(block(x, encoder_hidden_states=text), there, atol=1e-6)


def test_a_pass_that_was_broken_off_leaves_nothing_behind(unet, block) -> None:
    attach(unet, [awake(unet, "attn1i-transo", "resi-reso")])
    whole = run(unet)

    def stop(*ignored: Any) -> None:
        raise KeyboardInterrupt

    handle = block.attn2.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(unet)
    handle.remove()
    assert torch.equal(run(unet), whole)


def test_strength_nought_is_the_base_bit_for_bit(unet) -> None:
    plain, adapters = run(unet), awake(unet, *PUBLISHED)
    adapters.strength = 0.0
    attach(unet, [adapters])
    assert torch.equal(run(unet), plain)


def test_gradients_reach_every_parameter_and_survive_checkpointing(unet) -> None:
    unet.requires_grad_(False)
    adapters = awake(unet, *PUBLISHED)
    attach(unet, [adapters])
    unet.train()

    def gradients() -> list[Tensor]:
        adapters.zero_grad()
        run(unet).square().sum().backward()
        return [parameter.grad.clone() for parameter in adapters.parameters()]

    plain = gradients()
    unet.enable_gradient_checkpointing()
    checkpointed = gradients()
    assert all(gradient.abs().sum() > 0 for gradient in plain)
    scale = max(float(gradient.abs().max()) for gradient in plain)
    assert all(torch.allclose(a, b, atol=1e-5 * scale) for a, b in zip(plain, checkpointed, strict=True))


def test_what_enters_cross_attention_comes_after_a_fuser(unet, block) -> None:
    """attn2i lies behind the subject adapter, which stands between self- and cross-attention."""
    torch.manual_seed(5)
    mix = nn.Linear(32, 32)
    block.__dict__["fuser"] = lambda x, objs: x + mix(x)
    x, text = tokens(32), tokens(TEXT_WIDTH, 4)
    for label in ("attn2i-attn2i", "attn1o-attn2i", "attn2i-transo"):
        adapters = awake(unet, label)
        module = module_in(adapters, BLOCK)
        detach(unet)
        expected = block_by_hand(
            block, x, text, design_of(label), lambda value, module=module: 0.7 * module(value), block.fuser
        )
        attach(unet, [adapters])
        drawn = block(x, encoder_hidden_states=text, cross_attention_kwargs={"gligen": {"objs": None}})
        assert torch.allclose(drawn, expected, atol=1e-5)


def test_the_subject_adapter_and_efficient_adapters_come_and_go_by_themselves(unet) -> None:
    plain, adapters = run(unet), awake(unet, "attn2o-ffni")
    attach(unet, [adapters])
    alone = run(unet)
    subject = tiny_adapter(unet)
    subject.attach(unet)
    assert torch.equal(run(unet), alone)
    detach(unet)
    assert torch.equal(run(unet), plain)
    subject.detach(unet)
    assert torch.equal(run(unet), plain)


def test_text_of_learned_words_is_adapted_too(unet, block) -> None:
    install_layer_contexts(unet)
    adapters, text, own = awake(unet, "attn2c-attn2c"), tokens(TEXT_WIDTH, 4), tokens(TEXT_WIDTH, 4, seed=9)
    module, x = module_in(adapters, BLOCK), tokens(32)
    expected = block_by_hand(block, x, own, design_of("attn2c-attn2c"), lambda value: 0.7 * module(value))
    attach(unet, [adapters])
    contexts = {"layer_contexts": lambda layer, hidden_states: own}
    assert torch.allclose(block(x, encoder_hidden_states=text, cross_attention_kwargs=contexts), expected, atol=1e-5)


def test_pictures_of_an_ip_adapter_pass_beside_the_text(unet, block) -> None:
    torch.manual_seed(2)
    block.attn2.set_processor(IPAdapterAttnProcessor2_0(32, TEXT_WIDTH, num_tokens=(2,)))
    both = (tokens(TEXT_WIDTH, 4), [tokens(TEXT_WIDTH, 2)[:, None]])
    for label in ("attn2c-attn2c", "attn2o-ffni"):
        detach(unet)
        adapters = awake(unet, label)
        module, x = module_in(adapters, BLOCK), tokens(32)
        expected = block_by_hand(block, x, both, design_of(label), lambda value, module=module: 0.7 * module(value))
        attach(unet, [adapters])
        assert torch.allclose(block(x, encoder_hidden_states=both), expected, atol=1e-5)


def test_a_half_precision_unet_takes_adapters_in_float(unet) -> None:
    attach(unet, [awake(unet, "attn2o-ffni", "resi-reso")])
    unet.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, *LATENTS, generator=generator).bfloat16()
    assert unet(latents, 5, tokens(TEXT_WIDTH, 9).bfloat16()).sample.dtype == torch.bfloat16


@pytest.mark.parametrize(("width", "parameters"), [(60, 1_511_040), (256, 6_406_336)])
def test_the_share_of_parameters_at_stable_diffusion_size(width: int, parameters: int) -> None:
    """1.5 million (0.17 % of the UNet) for a subject and 6.4 million for pairs, as published."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)  # the class's defaults are SD 1.5's
        adapters = EfficientAdapters(unet, [AdapterDesign("attn2o", "ffni", width)])
    whole = sum(parameter.numel() for parameter in unet.parameters())
    assert whole == 859_520_964 and adapters.num_parameters == parameters and parameters / whole <= 0.0075


def test_a_folder_holds_one_file_an_adapter_and_gives_them_back(unet, tmp_path: Path) -> None:
    adapters = awake(unet, "attn2o-ffni", "resi-reso")
    attach(unet, [adapters])
    drawn = run(unet)
    files = save_folder(adapters, tmp_path / "adapters")
    assert len(files) == len(list(adapters)) and files[0].name == (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2o-ffni.safetensors"
    )
    restored = load_folder(unet, tmp_path / "adapters")
    attach(unet, [restored])
    assert set(restored.designs) == set(adapters.designs) and torch.equal(run(unet), drawn)
    with pytest.raises(AdapterError, match="holds .safetensors files already"):
        save_folder(adapters, tmp_path / "adapters")


def test_a_folder_that_does_not_fit_is_refused_in_a_line(unet, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter files there"):
        load_folder(unet, tmp_path)
    files = save_folder(awake(unet, "attn2o-ffni"), tmp_path / "adapters")
    wider = tiny_unet(block_out_channels=(16, 48))
    with pytest.raises(AdapterError, match=r"shape \(5, 32\), this base needs \(5, 48\); they were made for another"):
        load_folder(wider, tmp_path / "adapters")
    files[0].unlink()
    with pytest.raises(AdapterError, match=r"down_blocks.0.attentions.0.transformer_blocks.0.attn2o-ffni.*missing"):
        load_folder(unet, tmp_path / "adapters")
    files[0].write_bytes(b"no safetensors")
    with pytest.raises(AdapterError, match="cannot be read"):
        load_folder(unet, tmp_path / "adapters")


def test_adapters_of_another_architecture_are_not_attached(unet) -> None:
    deep = tiny_unet(layers_per_block=2)
    with pytest.raises(AdapterError, match=r"this UNet has no block down_blocks.0.attentions.1.transformer_blocks.0"):
        attach(unet, [EfficientAdapters(deep, [AdapterDesign("attn2o", "ffni")])])


def test_none_or_the_same_twice_is_refused(unet) -> None:
    with pytest.raises(AdapterError, match="none given"):
        EfficientAdapters(unet, [])
    with pytest.raises(AdapterError, match="attn2o-ffni is given twice"):
        EfficientAdapters(unet, [design_of("attn2o-ffni"), design_of("attn2o-ffni", width=9)])
