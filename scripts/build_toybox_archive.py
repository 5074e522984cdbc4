"""Build data_pipeline/toybox/subjects.zip from the npm packages `@lobehub/fluent-emoji-3d` and `unicode-emoji-json`.

    python scripts/build_toybox_archive.py                                   # fetches both with `npm pack`
    python scripts/build_toybox_archive.py --assets DIR --names data-by-emoji.json --output subjects.zip

The same input gives the same bytes: members are stored in order with a fixed time. A build that would hold out a
subject of the packaged archive's train or val split, which trained models have seen, is refused.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from data_pipeline.toybox.archive import CUTOUT_SIZE, DEFAULT_ARCHIVE, SubjectArchive
from data_pipeline.toybox.families import GROUPS, SCENERY, families, group_word_of, noun_of, picture_hash, split_of

PACKAGES = {"assets": "@lobehub/fluent-emoji-3d@1.1.0", "names": "unicode-emoji-json@0.9.0"}
WEBP_QUALITY = 82
FULL_COVERAGE = 0.9  # of the square: pictures of scenery, not things with an outline


def fetch(package: str, folder: Path) -> Path:
    """Download one npm package and unpack it; returns its folder."""
    name = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True)
    target = folder / package.replace("/", "-").replace("@", "")
    with tarfile.open(folder / name.stdout.strip().splitlines()[-1]) as archive:
        archive.extractall(target, filter="data")
    return target / "package"


def read_cutout(path: Path) -> np.ndarray:
    """(128, 128, 4) RGBA uint8, resized with premultiplied alpha so that edges stay clean."""
    bgra = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if bgra is None:
        raise SystemExit(f"error: {path}: not a picture")
    rgba = np.asarray(cv2.cvtColor(bgra, cv2.COLOR_BGRA2RGBA), np.float32) / np.float32(255)
    rgba[..., :3] *= rgba[..., 3:]
    small = np.asarray(cv2.resize(rgba, (CUTOUT_SIZE, CUTOUT_SIZE), interpolation=cv2.INTER_AREA), np.float32)
    small[..., :3] /= np.maximum(small[..., 3:], 1e-3)
    return (small.clip(0, 1) * 255).round().astype(np.uint8)


def collect(assets: Path, names: dict[str, dict[str, str]]) -> list[tuple[dict[str, str], np.ndarray]]:
    """Index entries and cut-outs of every usable emoji, in the order of the names file."""
    found: list[tuple[str, str, str, np.ndarray]] = []
    for emoji, entry in names.items():
        codes = [f"{ord(character):04x}" for character in emoji]
        candidates = ("-".join(codes), "-".join(code for code in codes if code != "fe0f"))
        path = next((p for p in (assets / f"{code}.webp" for code in candidates) if p.exists()), None)
        if entry["group"] not in GROUPS or entry["name"] in SCENERY or path is None:
            continue
        cutout = read_cutout(path)
        if (cutout[..., 3] > 127).mean() < FULL_COVERAGE:
            found.append((candidates[1], entry["name"], GROUPS[entry["group"]], cutout))
    of = families([name for _, name, _, _ in found], [picture_hash(cutout) for *_, cutout in found])
    return [
        (
            {
                "id": code, "name": name, "noun": noun_of(name), "group": group,
                "group_word": group_word_of(name, group), "family": family, "split": split_of(family),
            },
            cutout,
        )
        for (code, name, group, cutout), family in zip(found, of, strict=True)
    ]  # fmt: skip


def held_out_too_late(entries: Sequence[dict[str, str]], before: SubjectArchive) -> list[str]:
    """Names of subjects held out now that an earlier archive trained or validated on."""
    seen = {subject.id for subject in before.subjects if subject.split != "heldout"}
    return [entry["name"] for entry in entries if entry["split"] == "heldout" and entry["id"] in seen]


def write_archive(entries: list[tuple[dict[str, str], np.ndarray]], output: Path) -> None:
    """Write the zip: stored members, fixed time."""
    with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)

        add("subjects.json", json.dumps([entry for entry, _ in entries], indent=0, ensure_ascii=False).encode())
        for entry, cutout in entries:
            bgra = cv2.cvtColor(cutout, cv2.COLOR_RGBA2BGRA)
            done, data = cv2.imencode(".webp", bgra, [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY])
            assert done, entry["id"]
            add(f"{entry['id']}.webp", data.tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, help="folder of webp files named by code point")
    parser.add_argument("--names", type=Path, help="data-by-emoji.json")
    parser.add_argument("--output", type=Path, default=DEFAULT_ARCHIVE)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        assets = arguments.assets or fetch(PACKAGES["assets"], Path(temporary)) / "assets"
        names = arguments.names or fetch(PACKAGES["names"], Path(temporary)) / "data-by-emoji.json"
        entries = collect(assets, json.loads(names.read_text()))
        index = [entry for entry, _ in entries]
        late = held_out_too_late(index, SubjectArchive()) if DEFAULT_ARCHIVE.exists() else []
        if late:
            raise SystemExit(f"error: held out, but seen by trained models: {', '.join(late)}; settle their families")
        write_archive(entries, arguments.output)
    counts = {split: sum(entry["split"] == split for entry, _ in entries) for split in ("train", "val", "heldout")}
    print(f"{arguments.output}: {len(entries)} subjects {counts}, {arguments.output.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
