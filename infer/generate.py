"""`subject-diffusion generate`: photos of subjects and a prompt in, numbered PNG files out.

    subject-diffusion generate --subject dog=dog.png --prompt "a dog on the beach" --output pictures
    subject-diffusion generate --config configs/infer/toybox.yaml --subject dog=a.png,b.png@0.1,0.3,0.6,0.9 \
        --subject ball=ball.png:strength=0.8 --prompt "a dog and a ball in the snow" --num-images 4 --grid

Arguments become `GenerateSettings`; files are checked before the model is loaded; every PNG carries what made it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from PIL import Image
from pydantic import Field

from data_pipeline.errors import CommandParser, UserError
from data_pipeline.settings import load_settings, write_settings
from infer.cutout import CutoutMethod, cut_out, load_picture
from infer.drawing import DrawSettings, Precision, SchedulerName, open_pipeline
from infer.grid import make_grid
from infer.picture_file import (
    PictureRecord,
    encode_picture,
    next_number,
    open_output_folder,
    write_new,
    write_picture,
)
from infer.subjects import SYNTAX, Box, Subject, SubjectArgument, check_strength, match_nouns, parse_subject

if TYPE_CHECKING:
    from infer.pipeline import SubjectDiffusionPipeline
    from infer.refine.refinement import Refinement

SUBJECT_HELP = (
    f"{SYNTAX}; once a subject. Commas are several photos of it, the box is in fractions of the picture, dog#2 is the "
    "second dog of the prompt"
)
REFINEMENT_HELP = "FILE[:strength=W], what `refine --pairs` has learnt; several work together"
DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "infer" / "toybox.yaml"


class GenerateSettings(DrawSettings):
    """One run of `generate`; how pictures are drawn is said in `infer/drawing.py`."""

    prompt: str = Field(min_length=1)  # names each subject's noun
    subjects: tuple[str, ...] = ()  # NAME=FILE[,FILE…][@x0,y0,x1,y1][:strength=W][:mask=FILE[,FILE…]]
    refinements: tuple[str, ...] = ()  # FILE[:strength=W], learnt from pairs: how everything is drawn, without a word
    output: Path = Path("outputs")  # folder; pictures are numbered on from what is there
    seed: int = Field(0, ge=0, lt=2**63)  # of the first picture; the next ones have seed + 1, seed + 2, …
    num_images: int = Field(1, ge=1)
    batch_size: int = Field(1, ge=1)  # pictures drawn at once; at 1 a picture is bit for bit the same in any run
    cutout: CutoutMethod = "auto"  # alpha if the picture has one, else GrabCut
    device: str = "auto"  # auto: cuda if there is one, else cpu
    precision: Precision = "fp32"
    grid: bool = False  # also write grid.png with the references beside the pictures


@dataclass(frozen=True)
class _Reference:
    """One cut-out and where it came from."""

    noun: str
    file: Path
    cutout: Image.Image


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with its arguments (without the program's name); raises UserError for a mistake in them."""
    paths = run(read_settings(sys.argv[1:] if argv is None else argv))
    if len(paths) > 1:
        print(f"{len(paths)} pictures in {paths[0].parent}, the first is")
    print(paths[0])
    return 0


def run(settings: GenerateSettings) -> list[Path]:
    """Draw and write the pictures.

    Returns:
        Paths of the pictures in the order of their seeds.
    Raises:
        UserError: any mistake in the settings or the files they name; pictures written before it stay.
    """
    given = [parse_subject(text) for text in settings.subjects]
    arguments = [argument for argument in given if not argument.is_refined]
    refined = [argument for argument in given if argument.is_refined]
    references = [_load_references(argument, settings.cutout) for argument in arguments]
    subjects = [
        Subject(a.noun, [reference.cutout for reference in found], a.box, a.strength, a.occurrence)
        for a, found in zip(arguments, references, strict=True)
    ]
    match_nouns(settings.prompt, subjects)
    learnt = _read_refined(refined, settings.prompt)
    shown = [
        [replace(one, box=argument.box) for one in refinement.subjects()]
        for argument, refinement in zip(refined, learnt, strict=True)
    ]  # the photos that they were refined with
    subjects += [one for own in shown for one in own]
    refinements = learnt + _read_wordless(settings.refinements)
    folder = open_output_folder(settings.output)
    pipeline = open_pipeline(settings, settings.device, settings.precision)
    if refinements:
        from infer.refine.install import install_refinements

        install_refinements(pipeline, refinements, f"{settings.model} (plain)" if settings.plain else settings.model)
    model = pipeline.fingerprint()

    paths: list[Path] = []
    for seed, picture, boxes in _draw(pipeline, settings, subjects):
        places = iter(boxes or ())
        described = [_describe(argument, next(places, None)) for argument in arguments]
        for argument, own in zip(refined, shown, strict=True):
            own_places = [next(places, None) for _ in own]
            described.append(_describe(argument, own_places[0] if own else None))
        record = PictureRecord(settings.prompt, seed, model, settings.model_dump(mode="json"), described)
        paths.append(write_picture(folder, picture, record))
        if len(paths) == 1:
            flat = [reference for found in references for reference in found]
            _write_cutouts(folder, flat)
            _write_settings(settings, paths[0].with_suffix(".yaml"))
    if settings.grid:
        _write_grid(folder, paths, subjects)
    return paths


def read_settings(argv: Sequence[str]) -> GenerateSettings:
    """Merge, later wins: `--config` files (without any: configs/infer/toybox.yaml), options, `key=value`."""
    parser = _parser()
    options, rest = parser.parse_known_args(list(argv))
    for word in rest:
        if word.startswith("-"):
            known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
            near = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.0)
            raise UserError(f"generate: unknown option {word}; did you mean {near[0]}?")
        if "=" not in word:
            raise UserError(f"generate: unexpected {word!r}; expected options or key=value (a prompt goes in quotes)")
    given = {key: value for key, value in vars(options).items() if value is not None and key not in ("config", "size")}
    if options.size is not None:
        given["width"], given["height"] = _parse_size(options.size)
    # As JSON, which is YAML too: a prompt may hold colons and quotes.
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]
    files = options.config or ([DEFAULT_CONFIG] if DEFAULT_CONFIG.exists() else [])
    return load_settings(GenerateSettings, [Path(file) for file in files], [*overrides, *rest])


def _parser() -> CommandParser:
    parser = CommandParser(
        "generate",
        usage="%(prog)s [options] [key=value …]",
        description="Draw subjects from photos of them.",
        epilog="Every setting can be given as key=value too; infer/generate.py and infer/drawing.py document each.",
    )
    add = parser.add_argument
    add("--config", action="append", metavar="FILE", help="YAML settings; several: later wins")
    add("--subject", action="append", dest="subjects", metavar="NAME=FILE", help=SUBJECT_HELP)
    add("--refinement", action="append", dest="refinements", metavar="FILE", help=REFINEMENT_HELP)
    add("--prompt", metavar="TEXT", help="what to draw; names each subject")
    add("--negative-prompt", metavar="TEXT", help="what to stay away from")
    add("--output", metavar="FOLDER", help="where pictures go, numbered on from what is there (outputs)")
    add("--seed", type=int, metavar="N", help="of the first picture (0); the next ones count on")
    add("--num-images", type=int, metavar="N", help="number of pictures (1)")
    add("--batch-size", type=int, metavar="N", help="pictures drawn at once (1)")
    add("--model", metavar="NAME", help="shipped name, folder or hub id (toybox)")
    add("--base", metavar="NAME", help="another base for trained parts than the one they name")
    add("--scheduler", choices=get_args(SchedulerName), help="sampler (the model's own)")
    add("--steps", type=int, metavar="N", help="denoising steps")
    add("--guidance", choices=("separate", "joint", "none"), help="three branches, two, or one")
    add("--guidance-scale", type=float, metavar="X", help="how closely the text is followed")
    add("--subject-guidance-scale", type=float, metavar="X", help="how closely the references are followed")
    add("--subject-until", type=float, metavar="SHARE", help="share of the steps after which the plain base takes over")
    add("--layout", choices=("seeded", "none"), help="places of subjects without a box")
    add("--cutout", choices=("auto", "alpha", "grabcut", "none"), help="how references lose their background (auto)")
    add("--size", metavar="N|WxH", help="pixels")
    add("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, …")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="of the weights (fp32)")
    add("--grid", action="store_true", default=None, help="also write grid.png with the references beside the pictures")
    return parser


def _parse_size(text: str) -> tuple[int, int]:
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise UserError(f"--size {text}: expected pixels as N or WIDTHxHEIGHT, for example 512 or 768x512")
    return int(numbers[0]), int(numbers[-1])


def _load_references(argument: SubjectArgument, method: CutoutMethod) -> list[_Reference]:
    masks = argument.masks or (None,) * len(argument.files)
    found = []
    for file, mask in zip(argument.files, masks, strict=True):
        mask_picture = None if mask is None else load_picture(mask)
        cutout = cut_out(load_picture(file), mask=mask_picture, method=method, name=str(file))
        found.append(_Reference(argument.noun, file, cutout))
    return found


def _draw(
    pipeline: SubjectDiffusionPipeline, settings: GenerateSettings, subjects: Sequence[Subject]
) -> Iterator[tuple[int, Image.Image, list[Box] | None]]:
    """Seed, picture and boxes of each picture, one batch after another."""
    import torch

    for first in range(0, settings.num_images, settings.batch_size):
        seeds = [settings.seed + i for i in range(first, min(first + settings.batch_size, settings.num_images))]
        pipeline.set_progress_bar_config(desc=f"picture {first + len(seeds)}/{settings.num_images}")
        drawn = pipeline(
            settings.prompt,
            list(subjects),
            **settings.call_arguments(),
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        yield from zip(seeds, drawn.images, drawn.boxes, strict=True)


def _read_refined(arguments: Sequence[SubjectArgument], prompt: str) -> list[Refinement]:
    """The refinements that are named as subjects, their placeholders called as the prompt calls them."""
    if not arguments:
        return []
    from infer.refine.refinement import read_refinement, rename_placeholders

    found = []
    for argument in arguments:
        where = f"subject {argument.noun}"
        if argument.masks or argument.occurrence or len(argument.files) > 1:
            raise UserError(f"{where}: a refined subject is one file, without mask or number")
        refinement = replace(read_refinement(argument.files[0]), strength=argument.strength)
        if argument.box is not None and len(refinement.references) != 1:
            raise UserError(
                f"{where}: {refinement.label} cannot be given a box; only one subject, refined with references, can"
            )
        if not refinement.words:
            raise UserError(
                f"{where}: {refinement.label} was learnt from pairs, without a word; give it as --refinement"
            )
        names = argument.noun.split("+")
        if len(names) != len(refinement.words):
            raise UserError(
                f"{where}: {refinement.label} holds {len(refinement.words)} words ({', '.join(refinement.words)}); "
                "name as many, joined by +"
            )
        match_nouns(prompt, [Subject(name, []) for name in names])
        pairs = [pair for pair in zip(list(refinement.words), names, strict=True) if pair[0] != pair[1]]
        found.append(rename_placeholders(refinement, pairs))
    return found


def _read_wordless(texts: Sequence[str]) -> list[Refinement]:
    """The refinements of `--refinement FILE[:strength=W]`."""
    if not texts:
        return []
    from infer.refine.refinement import read_refinement

    found = []
    for text in texts:
        file, colon, strength = text.partition(":strength=")
        where = f"--refinement {text}"
        try:
            factor = check_strength(float(strength), where) if colon else 1.0
        except ValueError:
            raise UserError(f"{where}: strength {strength!r} is no number; expected FILE[:strength=W]") from None
        refinement = replace(read_refinement(Path(file).expanduser()), strength=factor)
        if refinement.words:
            named = "+".join(refinement.words)
            raise UserError(
                f"{where}: has learnt a word; give it as --subject {named}={file} and name it in the prompt"
            )
        found.append(refinement)
    return found


def _describe(argument: SubjectArgument, box: Box | None) -> dict[str, Any]:
    return {
        "noun": argument.noun,
        "occurrence": argument.occurrence,
        "files": [str(file) for file in argument.files],
        "box": None if box is None else [round(value, 4) for value in box],
        "strength": argument.strength,
    }


def _write_cutouts(folder: Path, references: Sequence[_Reference]) -> None:
    """`cutouts/NOUN-HASH.png`, named by content: equal cut-outs are written once."""
    target = open_output_folder(folder / "cutouts")
    for reference in references:
        content = hashlib.sha256(reference.cutout.tobytes()).hexdigest()[:8]
        noun = "".join(letter if letter.isalnum() else "_" for letter in reference.noun)
        write_new(target / f"{noun}-{content}.png", encode_picture(reference.cutout))


def _write_settings(settings: GenerateSettings, path: Path) -> None:
    try:
        write_settings(settings, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another --output folder") from error


def _write_grid(folder: Path, paths: Sequence[Path], subjects: Sequence[Subject]) -> None:
    pictures = [Image.open(path) for path in paths]
    sheet = make_grid(pictures, [reference for subject in subjects for reference in subject.references])
    if not write_new(folder / "grid.png", encode_picture(sheet)):
        write_new(folder / f"grid-{next_number(folder) - len(paths):05d}.png", encode_picture(sheet))
