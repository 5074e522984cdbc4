"""One file that anybody can judge with: `index.html`, pictures and all, and `key.json`, which the raters do not get.

The page is told nothing but prompts, pictures and opaque ids; pictures are encoded anew, since those of a run carry the
settings that drew them.
"""

from __future__ import annotations

import base64
import difflib
import json
from collections.abc import Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from random import Random

import jinja2
from PIL import Image

from data_pipeline.errors import UserError
from infer.evaluate.human.pairs import Key, Pair, choose_pairs, read_key
from infer.evaluate.results import Results
from infer.picture_file import open_output_folder

LOSSLESS_PX = 256  # larger pictures are kept at a quality where no eye sees a difference, in a fifth of the bytes


def write_kit(
    results: Results, folder: Path, pairs: int = 60, seed: int = 0, methods: Sequence[str] | None = None
) -> Path:
    """Write the kit of a run; the same arguments give the same kit.

    Args:
        pairs: how many different ones; rounded down so that every two methods meet equally often. A tenth as many come
            twice.
        seed: of the choice of cases, sides and order.
        methods: names, bounds and sweep values too; None: all contenders or, where there is only one, the bounds too.
    Returns:
        the page, `folder/index.html`; works without a network, from a disk or a mail.
    Raises:
        UserError: unknown method, fewer than two, too few pairs, no case in common, a picture that cannot be read, or a
            folder that holds another kit.
    """
    names = _contenders(results) if methods is None else _known(results, methods)
    if len(names) < 2:
        raise UserError(
            f"human kit: only {', '.join(names) or 'no method'} has pictures; a comparison needs two methods"
        )
    random = Random(seed)
    table = results.table[results.table["group"].map(lambda group: bool(results.references.get(group)))]
    chosen = choose_pairs(table, names, pairs, random)
    shown = _Pictures(results)
    asked = [shown.asked(pair) for pair in chosen]
    key = Key(
        kit=_fingerprint(chosen, shown.digests),
        name=results.name,
        methods=tuple(names),
        pairs=chosen,
    )
    page = _page({"kit": key.kit, "pairs": asked, "pictures": shown.uris})
    open_output_folder(folder)
    if (folder / "key.json").exists() and (old := read_key(folder).kit) != key.kit:
        raise UserError(
            f"{folder}: holds another kit ({old}), and its answers are worthless without that key; move or remove the "
            "folder, then run again"
        )
    try:
        (folder / "key.json").write_text(key.model_dump_json(indent=1), encoding="utf-8")
        (folder / "index.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); free the disk, then run again") from error
    return folder / "index.html"


def _contenders(results: Results) -> list[str]:
    drawn = set(results.table["method"])
    rows = [method for method in results.methods if method.sweep is None and method.name in drawn]
    contenders = [method.name for method in rows if not method.bound]
    return contenders if len(contenders) > 1 else [method.name for method in rows]


def _known(results: Results, methods: Sequence[str]) -> list[str]:
    known = [method.name for method in results.methods]
    for name in methods:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UserError(f"human kit: no method {name!r}; did you mean {near[0]!r}?")
    return list(dict.fromkeys(methods))


class _Pictures:
    """The pictures of a page, each once, as data URIs."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.rows = {(row.method, row.part, row.case): row for row in results.table.itertuples()}
        self.uris: list[str] = []
        self.digests: list[str] = []  # of the pixels: encoders differ between machines
        self._places: dict[str, int] = {}

    def asked(self, pair: Pair) -> dict[str, object]:
        """A pair as the page knows it; pictures by their places in `uris`."""
        left, right = (self.rows[method, pair.part, pair.case] for method in (pair.a, pair.b))
        references = [self._add(path) for path in self.results.references[pair.group]]
        return {
            "id": pair.id,
            "prompt": left.prompt,
            "words": left.words.split(", "),
            "references": references,
            "a": self._add(left.picture),
            "b": self._add(right.picture),
        }

    def _add(self, relative: str) -> int:
        if relative not in self._places:
            uri, digest = _encode(self.results.folder / relative)
            self._places[relative] = len(self.uris)
            self.uris.append(uri)
            self.digests.append(digest)
        return self._places[relative]


def _encode(path: Path) -> tuple[str, str]:
    """A picture as a data URI without anything but its pixels, and their fingerprint."""
    try:
        with Image.open(path) as opened:
            transparent = opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info
            picture = opened.convert("RGBA" if transparent else "RGB")
    except OSError as error:  # Pillow's "cannot identify image file" is one
        raise UserError(f"{path}: a picture that cannot be read; remove it and run evaluate again") from error
    picture.info.clear()
    content = BytesIO()
    picture.save(content, "WEBP", lossless=max(picture.size) <= LOSSLESS_PX, quality=95, exact=True)
    uri = f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
    return uri, sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).hexdigest()


def _fingerprint(pairs: Sequence[Pair], digests: Sequence[str]) -> str:
    told = json.dumps([[pair.model_dump() for pair in pairs], list(digests)], sort_keys=True)
    return sha256(told.encode()).hexdigest()[:12]


def _page(kit: dict[str, object]) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("page.html.j2").render(kit=kit)
