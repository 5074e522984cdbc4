"""Files put to use: several methods' words in one prompt; what cannot be used is refused before anything changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.errors import UserError
from infer.refine.install import install_refinements
from infer.refine.method import RefineBase
from infer.refine.methods import load_method
from infer.refine.refinement import Refinement, read_refinement, rename_placeholders
from tests.infer.refine.tiny_base import concept, drawn, tiny_base, written_and_read
from tests.infer.tiny_model import TinyModel
from tests.model.tiny import wake


def made(model: TinyModel, folder: Path, method: str, placeholder: str, seed: int = 0, **options: object) -> Refinement:
    """The file of a word, moved at random from its start."""
    known = load_method(method)
    torch.manual_seed(seed)
    module = known.build(tiny_base(model), [concept(placeholder)], known.settings(**options))
    wake(module.learned.each[0], seed)
    return written_and_read(module, method, folder / f"{placeholder}.safetensors", **options)


def with_files(model: TinyModel, files: list[Refinement]) -> RefineBase:
    base = tiny_base(model)
    install_refinements(base.pipeline, files, base.name)
    return base


def test_words_of_several_methods_meet_in_one_prompt(tiny_model: TinyModel, tmp_path: Path) -> None:
    files = [
        made(tiny_model, tmp_path, "lasr", "z"),
        made(tiny_model, tmp_path, "lasr", "y", seed=1, num_vectors=2),
        made(tiny_model, tmp_path, "textual-inversion", "x", seed=2),
        made(tiny_model, tmp_path, "cross-init", "w", seed=3, init_words=("dog",)),
    ]
    base = with_files(tiny_model, files)
    prompt = "a z and a y and a x and a w"
    whole = drawn(base.pipeline, prompt)
    assert whole.isfinite().all()
    for word in "zyxw":
        assert not torch.allclose(whole, drawn(base.pipeline, prompt.replace(f"a {word}", "a mug")), atol=1e-4)


def test_a_renamed_word_is_the_same_word(tiny_model: TinyModel, tmp_path: Path) -> None:
    first = made(tiny_model, tmp_path, "lasr", "z")
    second = made(tiny_model, tmp_path / "other", "lasr", "z", seed=1)
    with pytest.raises(UserError, match="its placeholder 'z' is also that of .*z.safetensors; rename one of them"):
        with_files(tiny_model, [first, second])
    both = with_files(tiny_model, [first, rename_placeholders(second, [("z", "y")])])
    alone = with_files(tiny_model, [second])
    assert torch.equal(drawn(both.pipeline, "a y on the beach"), drawn(alone.pipeline, "a z on the beach"))


def test_files_may_be_installed_one_after_the_other(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = with_files(tiny_model, [made(tiny_model, tmp_path, "lasr", "z")])
    second = made(tiny_model, tmp_path, "textual-inversion", "y")
    install_refinements(base.pipeline, [second], base.name)
    assert [word.placeholder for word in base.pipeline.words] == ["z", "y"]
    with pytest.raises(UserError, match="its placeholder 'y' is also that of a word that is there"):
        install_refinements(base.pipeline, [second], base.name)


def test_what_was_made_on_another_base_is_refused_before_anything_changes(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_base(tiny_model)
    fits = made(tiny_model, tmp_path, "textual-inversion", "z")
    foreign = replace(made(tiny_model, tmp_path, "lasr", "y"), base="sd15", fingerprint="ab" * 32)
    tokens = len(base.pipeline.tokenizer)
    with pytest.raises(UserError, match="was made on base sd15 .ababababab.*, this is tiny"):
        install_refinements(base.pipeline, [fits, foreign], base.name)
    assert base.pipeline.words is None and len(base.pipeline.tokenizer) == tokens


def test_files_of_diffusers_are_taken_where_their_width_fits(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "learned_embeds.safetensors"
    save_file({"<toy>": torch.randn(32)}, path)
    assert drawn(with_files(tiny_model, [read_refinement(path)]).pipeline, "a <toy> on the beach").isfinite().all()
    save_file({"<toy>": torch.randn(768)}, path)
    with pytest.raises(UserError, match="the vectors of '<toy>' are 768 wide, those of this base 32"):
        with_files(tiny_model, [read_refinement(path)])
    save_file({"beach": torch.randn(32)}, path)
    with pytest.raises(UserError, match="learned_embeds.safetensors: placeholder 'beach': is an ordinary word"):
        with_files(tiny_model, [read_refinement(path)])


def test_damaged_words_are_told_in_one_line(tiny_model: TinyModel, tmp_path: Path) -> None:
    whole = made(tiny_model, tmp_path, "lasr", "z")
    with pytest.raises(UserError, match="the vectors of 'z' are not in it"):
        with_files(tiny_model, [replace(whole, tensors={})])
    lacking = {name: value for name, value in whole.tensors.items() if not name.endswith("static.basis.bias")}
    with pytest.raises(UserError, match="the tensors of 'z' make no learned word"):
        with_files(tiny_model, [replace(whole, tensors=lacking)])
    fewer = {name: value[:4] if name.endswith("static.basis.bias") else value for name, value in whole.tensors.items()}
    with pytest.raises(UserError, match="'z' has vectors for 4 cross-attention layers, this base has 7"):
        with_files(tiny_model, [replace(whole, tensors=fewer)])


@pytest.mark.parametrize("other", ["dreambooth", "custom-diffusion", "cross-init-custom-diffusion", "adapter", "lora"])
def test_dreambooth_is_refused_beside_anything_else_that_changes_the_unet(other: str, tiny_model: TinyModel) -> None:
    files = [Refinement(method, "tiny", "", {}, {}) for method in ("dreambooth", other)]
    with pytest.raises(UserError, match=f"DreamBooth moves every weight of the UNet, and what {other} has learnt"):
        with_files(tiny_model, files)


def test_a_method_of_another_program_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(UserError, match="method 'hypernetwork' is unknown here; expected one of lasr"):
        with_files(tiny_model, [Refinement("hypernetwork", "tiny", "", {"z": {}}, {})])


def test_strength_and_mode_can_be_told_at_inference(tiny_model: TinyModel, tmp_path: Path) -> None:
    files = [made(tiny_model, tmp_path, "lasr", "z", mode="fast"), made(tiny_model, tmp_path, "lasr", "y", seed=1)]
    plain = made(tiny_model, tmp_path, "textual-inversion", "x")
    assert with_files(tiny_model, [files[0], plain]).pipeline.words.mode == "fast"
    assert with_files(tiny_model, files).pipeline.words.mode == "exact"
    base = tiny_base(tiny_model)
    install_refinements(base.pipeline, files, base.name, mode="fast", scale=0.5, adaptive_weight=0.25)
    assert base.pipeline.words.mode == "fast"
    assert [(word.scale, word.adaptive_weight) for word in base.pipeline.words] == [(0.5, 0.25), (0.5, 0.25)]
    assert torch.equal(drawn(base.pipeline, "a z"), drawn(base.pipeline, "a z"))
