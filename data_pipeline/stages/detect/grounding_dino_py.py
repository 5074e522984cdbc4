"""Grounding DINO (Liu et al., ECCV 2024) as its authors wrote it, through the package groundingdino-py 0.4.0.

Stage `detect`, backend `grounding_dino_py`, for checkpoints that exist in their format only; for the others
`grounding_dino` gives the same scores. How pictures are batched and chunks are scored: `text_guided.py`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.record import Provenance
from data_pipeline.stages.detect.grounding_dino import LookSettings
from data_pipeline.stages.pretrained import content_hash, find_pretrained, resolve_dtype, usable_device

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.stages.detect.text_guided import TextGuidedDetector

PACKAGE = "groundingdino"
PACKAGED_CONFIGS = {"swin_t": "GroundingDINO_SwinT_OGC.py", "swin_b": "GroundingDINO_SwinB_cfg.py"}


class GroundingDinoPySettings(LookSettings):
    """Settings of the backend. It computes in float32: the authors' code mixes it into any other dtype."""

    backend: Literal["grounding_dino_py"] = "grounding_dino_py"
    model: str  # checkpoint file, .pth (read without running what is pickled in it) or .safetensors
    config: str = Field("swin_t", min_length=1)  # swin_t, swin_b (the package's own), or a .py file; read, never run
    text_encoder: str = "google-bert/bert-base-uncased"  # hub id or folder of BERT and its tokenizer

    def load(self, device: str) -> TextGuidedDetector:
        """The detector on that device.

        Raises:
            UserError: the package, the checkpoint or the text encoder cannot be had, or do not fit together.
        """
        package = find_spec(PACKAGE)
        if package is None or package.origin is None:
            raise UserError(
                "detect.backend=grounding_dino_py: the package groundingdino-py is not installed; run `make`, or "
                "`pip install --no-build-isolation --no-deps groundingdino-py==0.4.0`, or take backend=grounding_dino"
            )
        checkpoint = Path(self.model).expanduser()
        if not checkpoint.is_file() or checkpoint.suffix not in (".pth", ".safetensors"):
            raise UserError(f"detect.model={self.model}: no such file; expected a checkpoint, .pth or .safetensors")
        config = Path(self.config).expanduser()
        if self.config in PACKAGED_CONFIGS:
            config = Path(package.origin).parent / "config" / PACKAGED_CONFIGS[self.config]
        elif config.suffix != ".py" or not config.is_file():
            raise UserError(f"detect.config={self.config}: expected {', '.join(PACKAGED_CONFIGS)} or a .py file")
        return self._loaded(config, checkpoint, usable_device(device))

    def _loaded(self, config: Path, checkpoint: Path, device: str) -> TextGuidedDetector:
        from data_pipeline.stages.detect.groundingdino_network import build_network, load_weights, read_literals
        from data_pipeline.stages.detect.text_guided import Sides, TextGuidedDetector

        text_encoder = find_pretrained("detect.text_encoder", self.text_encoder)
        model = build_network(read_literals(config), text_encoder, f"detect.config={self.config}")
        load_weights(model, checkpoint, f"detect.model={self.model}")
        model.to(device)

        def network(pixels: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
            output = model(pixels, captions=texts)
            return output["pred_logits"], output["pred_boxes"]

        return TextGuidedDetector(
            network,
            model.tokenizer,
            Sides(self.shortest_side, self.longest_side, self.side_multiple, model.num_queries),
            Provenance(self.backend, checkpoint.name, content_hash([checkpoint])),
            device,
            resolve_dtype("float32", device),
            max_tokens=model.max_text_len,
        )
