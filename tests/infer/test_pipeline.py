"""The pipeline as a diffusers user meets it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from data_pipeline.errors import UserError
from infer.pipeline import SubjectDiffusionPipeline
from infer.subjects import Subject
from model.saving import save_subject_model
from tests.infer.tiny_model import TinyModel

Cutout = Callable[..., Image.Image]


def draw(pipeline: SubjectDiffusionPipeline, prompt: Any, subjects: Any = None, seed: int = 0, **options: Any) -> Any:
    """Latents of two steps (or what the options say)."""
    options = {"num_inference_steps": 2, "output_type": "latent", **options}
    if "generator" not in options:
        options["generator"] = torch.Generator().manual_seed(seed)
    return pipeline(prompt, subjects, **options).images


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_one_to_four_subjects_are_drawn_with_boxes_that_do_not_overlap(
    loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout, count: int
) -> None:
    words = ["dog", "mug", "apple", "book"][:count]
    subjects = [Subject(word, [cutout(seed)]) for seed, word in enumerate(words)]
    output = loaded_pipeline(" ".join(words), subjects, num_inference_steps=1)
    assert output.images[0].size == (64, 64) and len(output.boxes[0]) == count


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(
    loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout
) -> None:
    subjects = [Subject("dog", [cutout()])]
    first, second = (draw(loaded_pipeline, "a dog", subjects, seed=3) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, draw(loaded_pipeline, "a dog", subjects, seed=4))


def test_the_reference_the_box_and_the_strength_change_the_picture(
    loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout
) -> None:
    box = (0.1, 0.1, 0.6, 0.6)
    pictures = [
        draw(loaded_pipeline, "a dog", [subject])
        for subject in (
            Subject("dog", [cutout(0)], box),
            Subject("dog", [cutout(1)], box),
            Subject("dog", [cutout(0), cutout(1)], box),
            Subject("dog", [cutout(0)], (0.4, 0.4, 0.9, 0.9)),
            Subject("dog", [cutout(0)], box, strength=0.5),
        )
    ]
    assert all(not torch.allclose(pictures[0], other, atol=1e-4) for other in pictures[1:])


def test_strength_zero_equals_no_subject(loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout) -> None:
    without = draw(loaded_pipeline, "a dog", None)
    assert torch.equal(draw(loaded_pipeline, "a dog", [Subject("dog", [cutout()], strength=0.0)]), without)


def test_subjects_may_be_given_in_any_order(loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout) -> None:
    dog = Subject("dog", [cutout(0)], (0, 0, 0.4, 0.4))
    mug = Subject("mug", [cutout(1)], (0.5, 0.5, 1, 1))
    pictures = [draw(loaded_pipeline, "a dog and a mug", order) for order in ([dog, mug], [mug, dog])]
    assert torch.equal(*pictures)


def test_an_occurrence_ties_a_subject_to_its_mention(loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout) -> None:
    places = [(0, 0, 0.4, 0.4), (0.5, 0.5, 1, 1)]
    implicit = [Subject("dog", [cutout(k)], box) for k, box in enumerate(places)]
    explicit = [Subject("dog", [cutout(k)], box, occurrence=k + 1) for k, box in enumerate(places)]
    prompt = "a dog and a dog"
    assert torch.equal(draw(loaded_pipeline, prompt, implicit), draw(loaded_pipeline, prompt, explicit[::-1]))


def test_a_list_of_prompts_and_several_pictures_each_come_in_order(
    loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout
) -> None:
    subjects = [Subject("dog", [cutout()])]
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    batch = draw(loaded_pipeline, ["a dog", "a red dog"], subjects, generator=generators, num_images_per_prompt=2)
    alone = draw(loaded_pipeline, "a red dog", subjects, generator=[torch.Generator().manual_seed(2)])
    assert batch.shape == (4, 4, 8, 8)
    torch.testing.assert_close(batch[2:3], alone, atol=1e-4, rtol=1e-4)


def test_prompts_may_have_different_subjects(loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    batch = draw(loaded_pipeline, ["a dog", "the beach"], [[Subject("dog", [cutout()])], []], generator=generators)
    alone = draw(loaded_pipeline, "the beach", generator=[torch.Generator().manual_seed(1)])
    torch.testing.assert_close(batch[1:], alone, atol=1e-4, rtol=1e-4)


def test_layout_none_leaves_the_place_to_the_model(loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout) -> None:
    output = loaded_pipeline("a dog", [Subject("dog", [cutout()])], layout="none", num_inference_steps=1)
    assert output.boxes == [None]


def test_separate_and_joint_guidance_differ_and_a_negative_prompt_counts(
    loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout
) -> None:
    subjects = [Subject("dog", [cutout()])]
    separate = draw(loaded_pipeline, "a dog", subjects)
    assert not torch.allclose(separate, draw(loaded_pipeline, "a dog", subjects, guidance="joint"), atol=1e-4)
    assert not torch.allclose(separate, draw(loaded_pipeline, "a dog", subjects, negative_prompt="mug"), atol=1e-4)


def test_every_output_type_shows_the_same_picture(loaded_pipeline: SubjectDiffusionPipeline) -> None:
    array = draw(loaded_pipeline, "a dog", output_type="np")
    tensor = draw(loaded_pipeline, "a dog", output_type="pt")
    picture = draw(loaded_pipeline, "a dog", output_type="pil")[0]
    assert array.shape == (1, 64, 64, 3)
    np.testing.assert_allclose(array[0], tensor[0].permute(1, 2, 0).numpy(), atol=1e-6)
    np.testing.assert_allclose(array[0] * 255, np.array(picture), atol=0.51)


def test_height_and_width_are_those_of_the_picture(loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout) -> None:
    subjects = [Subject("dog", [cutout()])]
    picture = draw(loaded_pipeline, "a dog", subjects, width=96, height=48, output_type="pil")[0]
    assert picture.size == (96, 48)


def test_given_noise_replaces_the_generators(loaded_pipeline: SubjectDiffusionPipeline) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw(loaded_pipeline, "a dog", latents=noise), draw(loaded_pipeline, "a dog", seed=5))


def test_a_callback_sees_every_step_and_may_change_the_latents(loaded_pipeline: SubjectDiffusionPipeline) -> None:
    seen = []

    def callback(pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Any:
        seen.append((step, tuple(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else None

    assert not draw(loaded_pipeline, "a dog", callback_on_step_end=callback).any()
    assert seen == [(0, ("latents",)), (1, ("latents",))]


def test_return_dict_false_gives_a_tuple(loaded_pipeline: SubjectDiffusionPipeline) -> None:
    images, boxes = loaded_pipeline("a dog", num_inference_steps=1, output_type="latent", return_dict=False)
    assert images.shape == (1, 4, 8, 8) and boxes == [None]


def test_another_scheduler_can_be_put_in(tiny_model: TinyModel, cutout: Cutout) -> None:
    pipeline = SubjectDiffusionPipeline.from_pretrained(tiny_model.subject)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    assert draw(pipeline, "a dog", [Subject("dog", [cutout()])]).isfinite().all()


def test_equal_cutouts_are_looked_at_once(tiny_model: TinyModel, cutout: Cutout) -> None:
    pipeline = SubjectDiffusionPipeline.from_pretrained(tiny_model.subject)
    looks: list[int] = []
    pipeline.image_encoder.register_forward_hook(lambda *_: looks.append(1))
    for _ in range(2):
        draw(pipeline, "a dog and a mug", [Subject("dog", [cutout(0)]), Subject("mug", [cutout(0), cutout(1)])])
    assert len(looks) == 2


def test_subject_until_zero_equals_the_plain_base(tiny_model: TinyModel, cutout: Cutout) -> None:
    pipeline = SubjectDiffusionPipeline.from_pretrained(tiny_model.subject)
    plain = SubjectDiffusionPipeline.from_pretrained(
        tiny_model.subject,
        unet=UNet2DConditionModel.from_pretrained(tiny_model.base / "unet"),
        text_encoder=CLIPTextModel.from_pretrained(tiny_model.base / "text_encoder"),
    )
    handed_over = draw(pipeline, "a dog", [Subject("dog", [cutout()])], subject_until=0.0)
    assert torch.equal(handed_over, draw(plain, "a dog"))
    assert not torch.allclose(handed_over, draw(pipeline, "a dog"), atol=1e-4)


def test_a_saved_pipeline_loads_again_and_draws_the_same(
    loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout, tmp_path: Path
) -> None:
    loaded_pipeline.save_pretrained(tmp_path)
    again = SubjectDiffusionPipeline.from_pretrained(tmp_path)
    subjects = [Subject("dog", [cutout()])]
    torch.testing.assert_close(
        draw(again, "a dog", subjects), draw(loaded_pipeline, "a dog", subjects), atol=1e-4, rtol=1e-4
    )
    assert again.fingerprint() == loaded_pipeline.fingerprint()
    assert draw(again, "a dog", subjects, subject_until=0.5).isfinite().all()  # still knows its base


def test_half_precision_draws_nearly_the_same(
    tiny_model: TinyModel, loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout
) -> None:
    half = SubjectDiffusionPipeline.from_pretrained(tiny_model.subject, dtype=torch.bfloat16)
    assert half.unet.dtype == half.adapter.dtype == half.image_encoder.dtype == torch.bfloat16
    subjects = [Subject("dog", [cutout()])]
    exact = draw(loaded_pipeline, "a dog", subjects, guidance="none")
    assert (draw(half, "a dog", subjects, guidance="none") - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_a_base_saved_in_half_precision_draws_in_fp32_unless_asked_otherwise(
    tiny_model: TinyModel, loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout, tmp_path: Path
) -> None:
    base = StableDiffusionPipeline.from_pretrained(tiny_model.base, dtype=torch.float16)
    base.save_pretrained(tmp_path / "base")  # the text encoder's configuration now says float16
    trained = SubjectDiffusionPipeline.from_pretrained(tiny_model.subject, str(tmp_path / "base"))
    SubjectDiffusionPipeline.from_pretrained(tiny_model.subject, dtype=torch.float16).save_pretrained(tmp_path / "full")
    for pipeline in (trained, SubjectDiffusionPipeline.from_pretrained(tmp_path / "full")):
        assert {pipeline.text_encoder.dtype, pipeline.unet.dtype, pipeline.adapter.dtype} == {torch.float32}
        draw(pipeline, "a dog", [Subject("dog", [cutout()])])


def test_model_offload_draws_the_same(
    tiny_model: TinyModel, loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout
) -> None:
    pipeline = SubjectDiffusionPipeline.from_pretrained(tiny_model.subject)
    pipeline.enable_model_cpu_offload(device="cpu")
    subjects = [Subject("dog", [cutout()])]
    torch.testing.assert_close(draw(pipeline, "a dog", subjects), draw(loaded_pipeline, "a dog", subjects))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"height": 60}, "multiples of 8"),
        ({"guidance": "both"}, "guidance 'both'"),
        ({"layout": "grid"}, "layout 'grid'"),
        ({"output_type": "jpeg"}, "output_type 'jpeg'"),
        ({"num_inference_steps": 0}, "num_inference_steps 0"),
        ({"num_images_per_prompt": 0}, "nothing to draw"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan"),
        ({"subject_start": 0.8, "subject_end": 0.2}, "subject_start 0.8"),
        ({"subject_until": 1.5}, "subject_until 1.5"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 texts for 1"),
        ({"subjects": [[], []]}, "subjects: expected"),
        ({"subjects": [Subject("dog", [])]}, "subject dog: has no reference"),
        ({"latents": torch.zeros(1, 4, 2, 2)}, "latents: shape"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 pictures"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "callback_on_step_end_tensor_inputs"),
        ({"prompt": "a <subject>"}, "reserved token <subject>"),
        ({"negative_prompt": "a <subject>"}, "negative prompt"),
        ({"prompt": "dog " * 40}, "prompt too long"),
    ],
)
def test_an_argument_that_cannot_work_is_named_in_one_line(
    loaded_pipeline: SubjectDiffusionPipeline, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError) as error:
        loaded_pipeline(**{"prompt": "a dog", **options})
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_a_full_folder_written_by_the_trainer_loads_in_half_precision(
    loaded_pipeline: SubjectDiffusionPipeline, cutout: Cutout, tmp_path: Path
) -> None:
    save_subject_model(
        tmp_path,
        loaded_pipeline.subject_model,
        base="toybox",
        trained=[],
        parts="all",
        image_encoder=loaded_pipeline.image_encoder,
        card="tiny",
        vae=loaded_pipeline.vae,
        tokenizer=loaded_pipeline.tokenizer,
        scheduler=loaded_pipeline.scheduler,
    )
    full = SubjectDiffusionPipeline.from_pretrained(tmp_path)
    subjects = [Subject("dog", [cutout()])]
    torch.testing.assert_close(
        draw(full, "a dog", subjects), draw(loaded_pipeline, "a dog", subjects), atol=1e-4, rtol=1e-4
    )
    half = SubjectDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.adapter.dtype == half.unet.dtype == torch.bfloat16
    assert draw(half, "a dog", subjects, output_type="pil")[0].size == (64, 64)


def test_taking_over_without_a_known_base_is_refused(loaded_pipeline: SubjectDiffusionPipeline) -> None:
    parts = {name: part for name, part in loaded_pipeline.components.items() if not name.startswith("base")}
    with pytest.raises(UserError, match="needs the plain base"):
        draw(SubjectDiffusionPipeline(**parts), "a dog", subject_until=0.5)


def test_trained_parts_over_another_base_of_the_same_shape_are_drawn_on_request(
    tiny_model: TinyModel, cutout: Cutout, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = StableDiffusionPipeline.from_pretrained(tiny_model.base, safety_checker=None)
    torch.nn.init.normal_(other.unet.conv_out.weight, std=0.1)
    other.save_pretrained(tmp_path)
    pipeline = SubjectDiffusionPipeline.from_pretrained(tiny_model.subject, base=str(tmp_path))
    assert torch.equal(pipeline.unet.conv_out.weight, other.unet.conv_out.weight)
    assert draw(pipeline, "a dog", [Subject("dog", [cutout()])]).isfinite().all()


def test_a_plain_base_is_no_subject_model(tiny_model: TinyModel) -> None:
    with pytest.raises(UserError, match="plain base without subject adapter"):
        SubjectDiffusionPipeline.from_pretrained(tiny_model.base)
