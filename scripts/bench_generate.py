"""Seconds of ours beside diffusers': whole toybox pictures, one UNet step at SD 2.1 shape, single adapter layers.

    python scripts/bench_generate.py
    python scripts/bench_generate.py --part toybox --steps 20 --repeats 9 --batch 4
    python scripts/bench_generate.py --part sd21 --device cuda --dtype bf16

What one table compares runs in one process, turn about; only ratios of medians are judged, as rounded to hundredths.

    toybox  shipped weights: `StableDiffusionPipeline` on the plain base, ours with 0 to 3 subjects (references encoded
            anew for every picture); same prompt, steps, size and guidance
    sd21    one evaluation of an SD 2.1 UNet with random weights, the two rows of guidance at 512 px: plain, with our
            adapter (keys and values at hand, null row skipped, as the pipeline does), as diffusers' GLIGEN UNet
    layers  one adapter layer, one row, at each level of SD 2.1: ours and diffusers' `GatedSelfAttentionDense`

Gated self-attention: GLIGEN, arXiv 2301.07093.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention import GatedSelfAttentionDense
from PIL import Image
from torch import Tensor, nn

from data_pipeline.arguments import positive
from data_pipeline.errors import CommandParser, UserError, run_command
from data_pipeline.machine import processor_name
from infer.conditions import ReferenceFeatures
from infer.loading import SHIPPED, hush_libraries
from infer.pipeline import Guidance, SubjectDiffusionPipeline
from infer.subjects import Subject
from model.inputs import SubjectInputs
from model.sampling import branch_inputs, guidance_branches
from model.subject_adapter import SubjectAdapter, SubjectCondition
from model.subject_adapter.attachment import transformer_blocks
from model.subject_adapter.fuser import SubjectFuser
from train.settings import load_model_settings

Work = Callable[[], object]

NOUNS = ("penguin", "turtle", "watermelon")
PROMPT = "a penguin, a turtle and a watermelon on the beach"
EXAMPLES = Path(__file__).resolve().parent.parent / "infer" / "examples"
GUIDANCE_SCALE = 3.0
SD21 = Path("configs/model/sd21.yaml")
TEXT_TOKENS = 77
PATCHES, PATCH_WIDTH = 256, 1280  # of a reference: ViT-H-14 at 224 px
GATE = 0.5  # an untrained gate is 0 and would hide what stands behind it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def median_seconds(works: Mapping[str, Work], repeats: int, device: torch.device, calls: int = 1) -> dict[str, float]:
    """Median seconds of one call of each work.

    Args:
        works: what is compared; each is called once before the clock starts.
        repeats: rounds; in each every work has its turn, in an order that is reversed from round to round.
        device: waited for before the clock is read.
        calls: calls between two readings, for work shorter than what reading costs.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds: dict[str, list[float]] = {name: [] for name in works}
    with torch.no_grad():
        for work in works.values():
            work()
        for repeat in range(repeats):
            for name in list(works)[:: 1 if repeat % 2 == 0 else -1]:
                wait()
                start = time.perf_counter()
                for _ in range(calls):
                    works[name]()
                wait()
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def toybox_works(
    plain: StableDiffusionPipeline,
    ours: SubjectDiffusionPipeline,
    prompt: str,
    subjects: Sequence[Subject],
    steps: int,
    batch: int,
) -> dict[str, Work]:
    """Whole pictures: plain, ours with 0, 1, … subjects under joint guidance, ours with three branches."""
    options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE, "num_images_per_prompt": batch}

    def draw_plain() -> object:
        return plain(prompt, generator=torch.Generator().manual_seed(0), **options).images

    def draw(count: int, guidance: Guidance) -> object:
        ours.reference_features = ReferenceFeatures()  # a whole picture has its references looked at too
        generator = torch.Generator().manual_seed(0)
        return ours(prompt, subjects[:count] or None, guidance=guidance, generator=generator, **options).images

    works: dict[str, Work] = {"plain": draw_plain}
    works |= {f"ours, {counted(count)}": partial(draw, count, "joint") for count in range(len(subjects) + 1)}
    return works | {"ours, 1 subject, three branches": partial(draw, 1, "separate")}


def step_works(
    unet: UNet2DConditionModel, patches: int, patch_width: int, subject_counts: Sequence[int]
) -> dict[str, Work]:
    """One UNet evaluation of one picture under joint guidance, each returning (2, C, h, w): null row, full row.

    Args:
        unet: stays plain; the other contenders stand on the same weights in memory.
        patches, patch_width: of one reference; each subject has one.
        subject_counts: how many subjects, one contender of each kind a number.
    """
    config = unet.config
    adapter = SubjectAdapter.from_unet(
        unet, text_dim=config.cross_attention_dim, pooled_dim=1, patch_dim=patch_width, num_patches=patches
    )
    for name, parameter in adapter.named_parameters():
        if "alpha" in name:
            nn.init.constant_(parameter, GATE)
    adapter.to(unet.device, unet.dtype).eval()
    ours, diffusers = same_weights(unet), gligen_unet(unet, adapter)
    adapter.attach(ours)

    generator = torch.Generator().manual_seed(0)
    size = config.sample_size
    latents = torch.randn(1, config.in_channels, size, size, generator=generator).repeat(2, 1, 1, 1)  # (2, C, h, w)
    context = torch.randn(2, TEXT_TOKENS, config.cross_attention_dim, generator=generator)  # (2, L, D)
    call = {
        "sample": latents.to(unet.device, unet.dtype),
        "timestep": torch.full((2,), 500, device=unet.device),
        "encoder_hidden_states": context.to(unet.device, unet.dtype),
        "return_dict": False,
    }

    def evaluate(network: UNet2DConditionModel, grounding: Mapping[str, object] | None) -> Tensor:
        attention = None if grounding is None else {"gligen": dict(grounding)}
        return network(**call, cross_attention_kwargs=attention)[0]  # (2, C, h, w)

    works: dict[str, Work] = {"plain": partial(evaluate, unet, None)}
    for count in subject_counts:
        inputs = branch_inputs(random_inputs(count, patches, patch_width), guidance_branches("joint", True))
        with torch.no_grad():
            condition = adapter.condition(inputs.to(unet.device, unet.dtype), (size, size), skip_null_rows=True)
            condition = adapter.precompute(condition)
        works[f"ours, {counted(count)}"] = partial(evaluate, ours, {"objs": condition})
        works[f"diffusers, {counted(count)}"] = partial(evaluate, diffusers, {"input": condition.tokens})
    return works


def same_weights(unet: UNet2DConditionModel, **options: str) -> UNet2DConditionModel:
    """Another UNet whose parameters are those of `unet` in memory; what `options` add has none yet."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config, **options)
    other.load_state_dict(unet.state_dict(), strict=False, assign=True)
    return other.eval()


def gligen_unet(unet: UNet2DConditionModel, adapter: SubjectAdapter) -> UNet2DConditionModel:
    """diffusers' own UNet with gated self-attention, on the weights of `unet` and of the adapter's layers.

    Its position net, which embeds boxes and phrases, gives way to the identity: tokens arrive finished.
    """
    gligen = same_weights(unet, attention_type="gated")
    gligen.position_net = nn.Identity()
    blocks = transformer_blocks(gligen)
    for name, fuser in adapter.fusers.items():
        blocks[name.replace("-", ".")].fuser.load_state_dict(fuser.state_dict(), assign=True)
    return gligen


def random_inputs(subjects: int, patches: int, patch_width: int) -> SubjectInputs:
    """One picture whose subjects stand side by side, one random reference each. The text is encoded elsewhere."""
    no_text = torch.zeros(1, TEXT_TOKENS, dtype=torch.int64)
    left = torch.arange(subjects) / subjects  # (S,)
    corners = (left, torch.full_like(left, 0.2), left + 0.9 / subjects, torch.full_like(left, 0.8))
    generator = torch.Generator().manual_seed(0)
    return SubjectInputs(
        input_ids=no_text,
        plain_input_ids=no_text,
        empty_input_ids=no_text,
        placeholder_positions=torch.arange(subjects)[None],
        noun_ids=torch.zeros(1, subjects, 1, dtype=torch.int64),
        pooled=torch.zeros(1, subjects, 1),
        patches=torch.randn(1, subjects, 1, patches, patch_width, generator=generator),
        reference_keep=torch.ones(1, subjects, 1, dtype=torch.bool),
        subject_keep=torch.ones(1, subjects, dtype=torch.bool),
        boxes=torch.stack(corners, dim=-1)[None],  # (1, S, 4)
        location_keep=torch.ones(1, dtype=torch.bool),
        strength=torch.ones(1, subjects),
    )


def layer_works(
    width: int, heads: int, side: int, context_width: int, subject_tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Work]:
    """One adapter layer on side x side image tokens of one row: ours and diffusers', each returning (1, T, width)."""
    torch.manual_seed(0)
    diffusers = GatedSelfAttentionDense(width, context_width, heads, width // heads)
    nn.init.constant_(diffusers.alpha_attn, GATE)
    nn.init.constant_(diffusers.alpha_dense, GATE)
    ours = SubjectFuser("layer", width, context_width, heads, width // heads)
    ours.load_state_dict(diffusers.state_dict())
    for layer in (ours, diffusers):
        layer.to(device, dtype).eval()
    image = torch.randn(1, side * side, width).to(device, dtype)
    tokens = torch.randn(1, subject_tokens, context_width).to(device, dtype)
    factor, location = torch.ones(1, device=device, dtype=dtype), torch.zeros(1, 1, side, side, device=device)
    with torch.no_grad():
        key_values = {"layer": ours.keys_values(tokens)}
    condition = SubjectCondition(tokens, None, factor, location, key_values=key_values)
    return {"ours": lambda: ours(image, condition), "diffusers": lambda: diffusers(image, tokens)}


def bench_toybox(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Print the table; the lines of its bars."""
    ours = SubjectDiffusionPipeline.from_pretrained("toybox", dtype=dtype).to(device)
    plain = StableDiffusionPipeline.from_pretrained(
        SHIPPED / "toybox" / "base",
        dtype=dtype,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device)
    for pipeline in (plain, ours):
        pipeline.set_progress_bar_config(disable=True)
    subjects = [Subject(noun, [Image.open(EXAMPLES / f"{noun}.png").convert("RGBA")]) for noun in NOUNS]
    works = toybox_works(plain, ours, PROMPT, subjects, options.steps, options.batch)
    seconds = median_seconds(works, options.repeats, device)
    print_table(f"toybox, {options.batch} picture(s) of {options.steps} steps", seconds, "plain")
    joint = [seconds[f"ours, {counted(count)}"] / seconds["plain"] for count in range(len(NOUNS) + 1)]
    return [bar("whole image under joint guidance", 1.4, "plain", joint)]


def bench_sd21(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Print the table; the lines of its bars."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**load_model_settings(SD21).architecture["unet"]).to(device, dtype).eval()
    counts = (1, 2)
    seconds = median_seconds(step_works(unet, PATCHES, PATCH_WIDTH, counts), options.repeats, device)
    print_table("one step at SD 2.1 shape, two rows at 512 px", seconds, "plain")
    ours, diffusers = ([seconds[f"{whose}, {counted(count)}"] for count in counts] for whose in ("ours", "diffusers"))
    to_diffusers = [mine / theirs for mine, theirs in zip(ours, diffusers, strict=True)]
    return [
        bar("one SD 2.1 step under joint guidance", 1.4, "plain", [mine / seconds["plain"] for mine in ours]),
        bar("one SD 2.1 step with our adapter", 1.0, "with diffusers'", to_diffusers),
    ]


def bench_layers(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Print a table a level and number of subjects; the line of their bar."""
    config = load_model_settings(SD21).architecture["unet"]
    ratios = []
    for level, (width, heads) in enumerate(
        zip(config["block_out_channels"], config["attention_head_dim"], strict=True)  # the latter are heads, by mistake
    ):
        side = config["sample_size"] // 2**level
        for count in (1, 2, 3):
            works = layer_works(width, heads, side, config["cross_attention_dim"], count * PATCHES, device, dtype)
            # On a GPU one layer is over sooner than its kernels are launched.
            seconds = median_seconds(works, options.repeats, device, calls=20 if device.type == "cuda" else 1)
            print_table(f"adapter layer {width} wide on {side} x {side} tokens, {counted(count)}", seconds, "diffusers")
            ratios.append(seconds["ours"] / seconds["diffusers"])
    return [bar("our adapter layer", 1.0, "diffusers'", ratios)]


def print_table(title: str, seconds: Mapping[str, float], against: str) -> None:
    """One line a contender: name, median, ratio to `against`."""
    print(title)
    for name, value in seconds.items():
        print(f"  {name:<34} {value:10.4f} s  {value / seconds[against]:6.2f} x {against}", flush=True)


def bar(what: str, limit: float, whom: str, ratios: Iterable[float]) -> str:
    """One line: the worst of the ratios beside what was asked of all. Clocks do not tell more than hundredths."""
    worst = round(max(ratios), 2)
    return f"bar: {what} <= {limit:g} x {whom}: {worst:.2f} ({'met' if worst <= limit else 'missed'})"


def counted(count: int) -> str:
    return "no subject" if count == 0 else "1 subject" if count == 1 else f"{count} subjects"


PARTS = {"toybox": bench_toybox, "sd21": bench_sd21, "layers": bench_layers}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser("bench_generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.prog = "scripts/bench_generate.py"
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--steps", type=positive, default=50, help="denoising steps of a toybox picture")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds; medians are taken over them")
    parser.add_argument("--batch", type=positive, default=1, help="toybox pictures drawn at once")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; give --device cpu")
    device = torch.device(options.device)
    hush_libraries()
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor_name()
    print(f"{name}, {torch.get_num_threads()} threads, {options.dtype}, medians of {options.repeats}", flush=True)
    chosen = PARTS if options.part == "all" else {options.part: PARTS[options.part]}
    lines = [line for part in chosen.values() for line in part(options, device, DTYPES[options.dtype])]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
