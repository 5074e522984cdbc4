"""The check `faces`: how much of the picture its largest face fills, found by YuNet (Wu et al., 2023) through OpenCV.

The network is one small .onnx file (`face_detection_yunet_2023mar.onnx` of the OpenCV Zoo, MIT), given by path.
Pictures are shrunk into one square with a black rest, so that no picture changes what the network's input is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.record import Provenance
from data_pipeline.settings import Settings
from data_pipeline.stages import Picture
from data_pipeline.stages.pretrained import content_hash

if TYPE_CHECKING:
    import cv2

SIDE = 640  # pixels of the square that the published network was exported for
OVERLAP = 0.3  # IoU from which on two boxes are the same face
CANDIDATES = 5000  # best boxes that are looked at before overlaps are removed


class FacesSettings(Settings):
    """A picture is left out where a face fills more than the limit."""

    check: Literal["faces"] = "faces"
    model: Path  # the .onnx file of YuNet
    limit: float = Field(0.05, ge=0, le=1)  # share of the picture above which its largest face is too large
    confidence: float = Field(0.7, ge=0, le=1)  # how sure the network must be of a face
    batch_size: int = Field(16, ge=1)  # pictures at once; decides nothing but the grain of the work

    def load(self, device: str) -> FacesCheck:
        """The check; the network takes milliseconds on a CPU, so `device` is not used.

        Raises:
            UserError: no such file, or no face detector in it.
        """
        import cv2

        path, name = self.model.expanduser(), f"checks.faces.model={self.model}"
        if not path.is_file():
            raise UserError(f"{name}: no such file; give the path of face_detection_yunet_2023mar.onnx")
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # it warns of targets that nobody asked for
        try:
            network = cv2.FaceDetectorYN.create(str(path), "", (SIDE, SIDE), self.confidence, OVERLAP, CANDIDATES)
            network.detect(np.zeros((SIDE, SIDE, 3), np.uint8))
        except cv2.error as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{name}: cannot be loaded as YuNet ({reason}); give the .onnx file of YuNet") from error
        return FacesCheck(network, Provenance("faces", path.name, content_hash([path])))


class FacesCheck:
    """Gives each picture the share that its largest face fills."""

    def __init__(self, network: cv2.FaceDetectorYN, provenance: Provenance) -> None:
        self.network, self.provenance = network, provenance

    def score(self, pictures: Sequence[Picture]) -> list[float]:
        return [self._largest(picture) for picture in pictures]

    def _largest(self, picture: Picture) -> float:
        square, width, height = into_square(picture)
        found = self.network.detect(square)[1]  # (F, 15): x, y, width, height, five points, score; None: no face
        if found is None:
            return 0.0
        near, far = found[:, :2], found[:, :2] + found[:, 2:4]  # (F, 2) each
        sides = np.clip(far, 0, (width, height)) - np.clip(near, 0, (width, height))  # (F, 2), inside the picture
        return float(sides.prod(axis=1).max() / (width * height))


def into_square(picture: Picture) -> tuple[np.ndarray, int, int]:
    """(SIDE, SIDE, 3) BGR with the picture, never enlarged, in its upper left corner; width and height it has there."""
    import cv2

    height, width = picture.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    square = np.zeros((SIDE, SIDE, 3), np.uint8)
    small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA) if scale < 1 else picture
    square[:height, :width] = small[..., ::-1]
    return square, width, height
