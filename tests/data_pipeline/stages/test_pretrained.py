"""Networks by folder or hub id: where they are found, what is read of them, and what is said when there is none."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import BlipForConditionalGeneration, BlipProcessor

from data_pipeline.errors import UserError
from data_pipeline.stages.pretrained import content_hash, find_pretrained, resolve_dtype, usable_device
from tests.data_pipeline.stages.tiny_networks import save_tiny_blip

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_blip(tmp_path_factory.mktemp("networks") / "tiny-blip")


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "tiny-blip")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that nobody answers at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return find_pretrained("caption.model", str(folder)).network(BlipForConditionalGeneration, ("blip",), "cpu", dtype)


def refusal(folder: Path | str) -> str:
    with pytest.raises(UserError) as told:
        load(Path(folder))
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_folder_gives_the_saved_weights_frozen_and_in_evaluation_mode(saved: Path) -> None:
    network, expected = load(saved), BlipForConditionalGeneration.from_pretrained(saved).state_dict()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    torch.testing.assert_close(network.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_come_in_the_dtype_asked_for(saved: Path, dtype: torch.dtype) -> None:
    assert {parameter.dtype for parameter in load(saved, dtype).parameters()} == {dtype}


def test_provenance_names_folder_and_content_wherever_the_folder_lies(saved: Path, copied: Path) -> None:
    provenance = find_pretrained("caption.model", str(saved)).provenance("blip")
    assert (provenance.backend, provenance.model) == ("blip", "tiny-blip")
    assert provenance.revision.startswith("sha256:")
    assert find_pretrained("caption.model", str(copied)).provenance("blip") == provenance


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_byte_of_weights_configuration_or_tokenizer_is_another_revision(copied: Path, changed: str) -> None:
    before = find_pretrained("caption.model", str(copied)).revision
    content = bytearray((copied / changed).read_bytes())
    content[-2] ^= 1
    (copied / changed).write_bytes(content)
    assert find_pretrained("caption.model", str(copied)).revision != before


def test_files_that_no_model_is_read_from_are_not_part_of_the_revision(copied: Path) -> None:
    before = find_pretrained("caption.model", str(copied)).revision
    (copied / "README.md").write_text("a model")
    assert find_pretrained("caption.model", str(copied)).revision == before


def test_the_content_hash_is_that_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    # sha256 of "a\0" + sha256("1") + "\n" + "b\0" + sha256("2") + "\n", by sha256sum
    assert content_hash([tmp_path / "b", tmp_path / "a"]) == "sha256:e2cb7a5e828b2a31"


def test_a_hub_id_that_lies_in_the_cache_is_used_when_the_hub_is_away(hub_cache: Path, saved: Path) -> None:
    repository = hub_cache / "models--owner--blip"
    shutil.copytree(saved, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    found = find_pretrained("caption.model", "owner/blip")
    assert (found.provenance("blip").model, found.revision) == ("owner/blip", COMMIT)
    assert found.network(BlipForConditionalGeneration, ("blip",), "cpu", torch.float32)
    assert find_pretrained("caption.model", "owner/blip", COMMIT).folder == found.folder
    with pytest.raises(UserError, match=r"caption\.model=owner/blip: .* at revision v2, and the hub cannot be reached"):
        find_pretrained("caption.model", "owner/blip", "v2")


def test_without_hub_and_cache_one_line_says_so(hub_cache: Path) -> None:
    with pytest.raises(UserError, match=r"^caption\.model=owner/blip: .*hub cannot be reached.*give a folder") as told:
        find_pretrained("caption.model", "owner/blip")
    assert "\n" not in str(told.value)


def test_a_missing_folder_is_told_in_one_line(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none").endswith("no such folder; give a folder or a hub id, which looks like owner/name")


def test_a_revision_of_a_folder_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="revision=main is for hub ids"):
        find_pretrained("caption.model", str(saved), "main")


def test_a_network_of_another_kind_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "clip"}))
    assert "holds a network of type 'clip'; expected blip" in refusal(copied)


def test_pickled_weights_are_not_read(copied: Path) -> None:
    network = BlipForConditionalGeneration.from_pretrained(copied)
    torch.save(network.state_dict(), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    assert "holds no .safetensors file; pickled weights are not read" in refusal(copied)


def test_code_beside_the_weights_is_never_run(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config"}
    config["model_type"] = "own"
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "own.py").write_text(f"open({str(copied / 'ran')!r}, 'w')")
    assert "cannot be loaded" in refusal(copied)
    assert not (copied / "ran").exists()


def test_cut_or_lacking_weights_and_a_broken_configuration_are_told_in_one_line(saved: Path, tmp_path: Path) -> None:
    cut, broken, lacking = (shutil.copytree(saved, tmp_path / name) for name in ("cut", "broken", "lacking"))
    (cut / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:5000])
    assert "cannot be loaded" in refusal(cut)
    (broken / "config.json").write_text("{")
    assert "cannot be loaded" in refusal(broken)
    config = json.loads((lacking / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (lacking / "config.json").write_text(json.dumps(config))
    assert "incomplete, lacks 26 weights such as text_decoder" in refusal(lacking)


def test_a_processor_that_is_not_there_is_told_in_one_line(copied: Path) -> None:
    for file in (*copied.glob("*token*"), *copied.glob("*processor*"), copied / "vocab.txt"):
        file.unlink()
    with pytest.raises(UserError, match=r"^caption\.model=.*cannot be loaded") as told:
        find_pretrained("caption.model", str(copied)).processor(BlipProcessor)
    assert "\n" not in str(told.value)


def test_auto_is_float32_on_the_cpu_and_names_are_themselves() -> None:
    assert resolve_dtype("auto", "cpu") is torch.float32
    assert [resolve_dtype(name, "cpu") for name in ("float32", "float16", "bfloat16")] == [
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ]


@pytest.mark.parametrize("name", ["cuda:99", "gpu", ""])
def test_a_device_that_torch_cannot_use_is_told_in_one_line(name: str) -> None:
    assert usable_device("cpu") == "cpu"
    with pytest.raises(UserError, match=rf"^device {name}: cannot be used") as told:
        usable_device(name)
    assert "\n" not in str(told.value)


def test_files_of_settings_import_neither_torch_nor_transformers() -> None:
    modules = ["caption.alt_text", "caption.blip", "caption.blip2", "nouns.spacy_chunks", "checks.nsfw", "checks.faces"]
    code = (
        f"import sys, importlib\n"
        f"for name in {modules}: importlib.import_module('data_pipeline.stages.' + name)\n"
        "print([name for name in ('torch', 'transformers', 'spacy', 'cv2', 'huggingface_hub') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
