"""model/attention_maps.py: probabilities read out of fused attention."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import UNet2DConditionModel, attention_processor
from diffusers.models.attention_processor import AttnProcessor

from model.attention_maps import (
    AttentionMapRecorder,
    RecordingAttnProcessor,
    attend_and_record,
    install_recording,
    supervised_layers,
)
from model.subject_adapter import SubjectAdapter
from tests.model.tiny_inputs import PATCH_WIDTH, PATCHES, POOLED, tiny_inputs

ROWS, SUBJECTS, LENGTH, TEXT_WIDTH = 2, 3, 7, 24


def tiny_unet(**options) -> UNet2DConditionModel:
    torch.manual_seed(0)
    settings = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
        "block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2,
        "cross_attention_dim": TEXT_WIDTH,
    }  # fmt: skip
    return UNet2DConditionModel(**{**settings, **options})


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_unet()


@pytest.fixture
def call() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(ROWS, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(ROWS, LENGTH, TEXT_WIDTH, generator=generator),
    }


@pytest.fixture
def recorder() -> AttentionMapRecorder:
    weights = torch.zeros(ROWS, SUBJECTS, LENGTH)
    weights[0, 0, 2] = 1
    weights[0, 1, [3, 5]] = 0.5
    weights[1, 0, 6] = 1
    return AttentionMapRecorder(weights)


# --- the values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["in products", "fused"])
@pytest.mark.parametrize("num_subjects", [0, 1, 3, 8])
def test_maps_equal_softmax_and_the_output_stays(num_subjects, dtype) -> None:
    query, key, value = (torch.randn(2, 4, length, 16, dtype=dtype) for length in (9, LENGTH, LENGTH))
    weights = torch.rand(2, num_subjects, LENGTH, dtype=dtype)
    output, maps = attend_and_record(query, key, value, weights)
    probabilities = (query @ key.mT / 16**0.5).softmax(-1)  # (2, 4, 9, L)
    torch.testing.assert_close(maps, torch.einsum("bhql,bsl->bhsq", probabilities, weights), atol=1e-6, rtol=0)
    torch.testing.assert_close(output, probabilities @ value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["in products", "fused"])
def test_gradients_of_the_maps_reach_query_and_key(dtype) -> None:
    query, key = (torch.randn(1, 1, length, 8, dtype=dtype, requires_grad=True) for length in (4, LENGTH))
    weights = torch.eye(LENGTH)[None, :2]
    attend_and_record(query, key, torch.randn(1, 1, LENGTH, 8, dtype=dtype), weights)[1].square().sum().backward()
    probabilities = (query.detach().requires_grad_() @ key.mT / 8**0.5).softmax(-1)
    expected = torch.autograd.grad(probabilities[..., :2].square().sum(), key)[0]
    torch.testing.assert_close(key.grad, expected, atol=1e-6, rtol=1e-5)
    assert query.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["in products", "fused"])
@pytest.mark.parametrize("as_logits", [False, True])
def test_a_masked_token_gets_no_attention(dtype, as_logits) -> None:
    mask = torch.ones(1, 1, 1, LENGTH, dtype=torch.bool)
    mask[..., 2] = False
    if as_logits:
        mask = torch.zeros(1, 1, 1, LENGTH, dtype=dtype).masked_fill(~mask, float("-inf"))
    weights = torch.eye(LENGTH)[None]
    maps = attend_and_record(*(torch.randn(1, 1, n, 8, dtype=dtype) for n in (4, LENGTH, LENGTH)), weights, mask)[1]
    assert maps[0, 0, 2].abs().max() == 0
    torch.testing.assert_close(maps.sum(2), torch.ones(1, 1, 4, dtype=dtype))


# --- in the UNet


def test_every_supervised_layer_writes_one_map_under_its_name(unet, call, recorder) -> None:
    install_recording(unet)
    unet(**call, cross_attention_kwargs={"recorder": recorder})
    assert list(recorder.maps) == supervised_layers(unet)
    for name, maps in recorder.maps.items():
        heads = unet.get_submodule(name).heads
        pixels = 64 if name.startswith("up_blocks.1") else 16
        assert maps.shape == (ROWS, heads, SUBJECTS, pixels)


def test_maps_equal_probabilities_computed_outside(unet, call, recorder) -> None:
    seen: dict[str, torch.Tensor] = {}

    def probabilities(name):
        def hook(attn, args, kwargs):
            query, key = attn.to_q(args[0]), attn.to_k(kwargs["encoder_hidden_states"])
            query, key = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (query, key))
            seen[name] = (query @ key.mT * attn.scale).softmax(-1)  # (B, heads, Q, L)

        return hook

    install_recording(unet)
    for name in supervised_layers(unet):
        unet.get_submodule(name).register_forward_pre_hook(probabilities(name), with_kwargs=True)
    unet(**call, cross_attention_kwargs={"recorder": recorder})
    for name, maps in recorder.maps.items():
        expected = torch.einsum("bhql,bsl->bhsq", seen[name], recorder.weights)
        torch.testing.assert_close(maps, expected, atol=1e-6, rtol=0)


def test_the_output_is_that_of_the_stock_unet(unet, call, recorder) -> None:
    stock = unet(**call).sample
    install_recording(unet)
    assert torch.equal(unet(**call).sample, stock)
    recorded = unet(**call, cross_attention_kwargs={"recorder": recorder}).sample
    torch.testing.assert_close(recorded, stock, atol=1e-5, rtol=0)


def test_a_text_mask_is_respected(unet, call, recorder) -> None:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[0, 2] = False
    stock = unet(**call, encoder_attention_mask=mask).sample
    install_recording(unet)
    recorded = unet(**call, encoder_attention_mask=mask, cross_attention_kwargs={"recorder": recorder}).sample
    torch.testing.assert_close(recorded, stock, atol=1e-5, rtol=0)
    assert all(maps[0, :, 0].abs().max() < 1e-6 for maps in recorder.maps.values())


def test_checkpointing_gives_the_same_maps_and_gradients(unet, call, recorder) -> None:
    def gradients() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        unet.zero_grad()
        sample = unet(**call, cross_attention_kwargs={"recorder": recorder}).sample
        maps = list(recorder.maps.values())
        (sample.square().mean() + sum(m.square().sum() for m in maps)).backward()
        return [m.detach() for m in maps], [p.grad.clone() for p in unet.parameters() if p.grad is not None]

    install_recording(unet)
    unet.train()
    without = gradients()
    unet.enable_gradient_checkpointing()
    for first, second in zip(without, gradients(), strict=True):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b)


def test_half_precision_works(unet, call, recorder) -> None:
    install_recording(unet.bfloat16())
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in call.items()}
    unet(**half, cross_attention_kwargs={"recorder": recorder})
    assert all(maps.dtype == torch.bfloat16 and maps.isfinite().all() for maps in recorder.maps.values())


def test_no_layer_warns_about_the_recorder(unet, call, recorder, monkeypatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(attention_processor.logger, "warning", lambda message, *_: warnings.append(message))
    install_recording(unet)
    unet(**call, cross_attention_kwargs={"recorder": recorder})
    assert warnings == []
    unet(**call, cross_attention_kwargs={"recoder": recorder})
    assert warnings, "an unknown name is still told"


def test_recording_works_beside_an_attached_adapter(unet, call, recorder) -> None:
    adapter = SubjectAdapter.from_unet(
        unet, text_dim=TEXT_WIDTH, pooled_dim=POOLED, patch_dim=PATCH_WIDTH, num_patches=PATCHES
    )
    adapter.attach(unet)
    install_recording(unet)
    conditions = {"gligen": {"objs": adapter.condition(tiny_inputs(), (8, 8))}}
    plain = unet(**call, cross_attention_kwargs=conditions).sample
    recorded = unet(**call, cross_attention_kwargs={**conditions, "recorder": recorder}).sample
    torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=0)
    assert list(recorder.maps) == supervised_layers(unet)


# --- which layers


def test_all_groups_but_the_first_and_the_last_are_supervised(unet) -> None:
    groups = {name.split(".attentions")[0] for name in supervised_layers(unet)}
    assert groups == {"down_blocks.1", "mid_block", "up_blocks.0"}


def test_at_sd_size_the_middle_five_of_seven_groups_are_supervised() -> None:
    with torch.device("meta"):
        unet = tiny_unet(
            block_out_channels=(8, 8, 8, 8), layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )  # fmt: skip
    layers = supervised_layers(unet)
    groups = list(dict.fromkeys(name.split(".attentions")[0] for name in layers))
    assert groups == ["down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.1", "up_blocks.2"]
    assert len(layers) == 2 + 2 + 1 + 3 + 3


def test_too_few_groups_are_refused() -> None:
    unet = tiny_unet(
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
    )
    with pytest.raises(ValueError, match="2 block groups hold cross-attention, at least 3"):
        supervised_layers(unet)


def test_other_layers_may_be_chosen_by_name(unet, call, recorder) -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    install_recording(unet, [name])
    unet(**call, cross_attention_kwargs={"recorder": recorder})
    assert list(recorder.maps) == [name]


def test_an_unknown_layer_is_refused(unet) -> None:
    with pytest.raises(ValueError, match="down_blocks.9 is no cross-attention layer"):
        install_recording(unet, ["down_blocks.9"])


def test_foreign_processors_are_not_lost(unet) -> None:
    unet.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match="has a AttnProcessor; recording replaces stock processors only"):
        install_recording(unet)


def test_the_ignoring_processor_can_be_made_without_arguments() -> None:
    assert RecordingAttnProcessor().layer is None  # diffusers' IP-Adapter loader makes it so
