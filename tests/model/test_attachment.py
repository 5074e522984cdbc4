"""model/subject_adapter/attachment.py: a UNet with parts attached stays, by itself, the stock UNet it was."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.models import UNet2DConditionModel

from model.subject_adapter import SubjectAdapter
from tests.model.tiny import LATENTS, TEXT_WIDTH, tiny_adapter, tiny_unet
from tests.model.tiny_inputs import tiny_inputs

LATENT = torch.randn(2, *LATENTS, generator=torch.Generator().manual_seed(5))
CONTEXT = torch.randn(2, 6, TEXT_WIDTH, generator=torch.Generator().manual_seed(6))


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_unet()


@pytest.fixture
def adapter(unet: UNet2DConditionModel) -> SubjectAdapter:
    adapter = tiny_adapter(unet, awake=True)
    adapter.attach(unet)
    return adapter


@torch.no_grad()
def run(unet: UNet2DConditionModel, adapter: SubjectAdapter | None = None) -> torch.Tensor:
    kwargs = {}
    if adapter is not None:
        kwargs = {"cross_attention_kwargs": {"gligen": {"objs": adapter.condition(tiny_inputs(), LATENTS[1:])}}}
    return unet(LATENT, 10, CONTEXT, **kwargs).sample


def test_parameters_state_dict_modules_and_processors_stay_stock(unet, adapter):
    plain = tiny_unet()
    assert [name for name, _ in unet.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(unet.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in unet.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(unet.attn_processors) == list(plain.attn_processors)


def test_without_a_condition_the_output_is_that_of_the_plain_unet(unet, adapter):
    assert torch.equal(run(unet), run(tiny_unet()))


def test_with_a_condition_fusers_and_location_take_part(unet, adapter):
    with_both = run(unet, adapter)
    assert not torch.allclose(with_both, run(unet), atol=1e-3)
    with torch.no_grad():
        adapter.location_convolution.weight.zero_()
    assert not torch.allclose(with_both, run(unet, adapter), atol=1e-3)


def test_a_location_does_not_stay_for_the_next_pass(unet, adapter):
    run(unet, adapter)
    assert torch.equal(run(unet), run(tiny_unet()))
    run(unet, adapter)
    assert torch.equal(unet.conv_in(LATENT), tiny_unet().conv_in(LATENT))


@pytest.mark.parametrize("attached", [False, True])
def test_the_saved_folder_loads_with_the_stock_class(tmp_path, unet, attached):
    if attached:
        tiny_adapter(unet, awake=True).attach(unet)
    unet.save_pretrained(tmp_path)
    loaded, report = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    torch.testing.assert_close(run(loaded.eval()), run(unet), atol=1e-5, rtol=0)


def test_a_controlnet_is_made_from_it_as_from_a_plain_unet(unet, adapter):
    ControlNetModel.from_unet(unet, conditioning_channels=3)


def test_detaching_makes_it_plain_again(unet, adapter):
    adapter.detach(unet)
    assert not unet._forward_pre_hooks and not unet.conv_in._forward_hooks
    assert "position_net" not in unet.__dict__
    assert not any("fuser" in module.__dict__ for module in unet.modules())
    adapter.detach(unet)  # once more does no harm


def test_attaching_again_replaces_the_first_adapter(unet, adapter):
    once = run(unet, adapter)
    adapter.attach(unet)
    assert torch.equal(run(unet, adapter), once)
    assert len(unet._forward_pre_hooks) == 1


def test_blocks_outside_the_chosen_levels_stay_as_they_are(unet):
    adapter = tiny_adapter(unet, awake=True, levels=["mid_block"])
    adapter.attach(unet)
    run(unet, adapter)


def test_a_deep_copy_of_model_and_adapter_runs_on_the_copies(unet, adapter):
    pair = copy.deepcopy(torch.nn.ModuleList([unet, adapter]))
    before = run(unet, adapter)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    torch.testing.assert_close(run(pair[0], pair[1]), before)


def test_a_condition_of_another_size_or_row_count_is_refused(unet, adapter):
    condition = adapter.condition(tiny_inputs(), (4, 4))
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\).*\(2, 1, 8, 8\)"):
        unet(LATENT, 10, CONTEXT, cross_attention_kwargs={"gligen": {"objs": condition}})


def test_a_unet_with_grounding_of_its_own_is_refused():
    with pytest.raises(ValueError, match="gated"):
        tiny_adapter(tiny_unet()).attach(tiny_unet(attention_type="gated"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"block_out_channels": (16, 48)}, "made for 32"),
        ({"block_out_channels": (32, 32)}, "made for 16"),
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, r"no block down_blocks\.0"),
    ],
)
def test_a_unet_of_another_architecture_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        tiny_adapter(tiny_unet()).attach(tiny_unet(**other))
