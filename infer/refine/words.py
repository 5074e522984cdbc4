"""What the methods that learn words have in common: prompts as tensors, a word's start, training, keeping, return.

`WordModule` is the plain case, Textual Inversion's: a frozen base, rows that are learnt, the denoising error. In a file
a plain word is `words.PLACEHOLDER` (K, D), as diffusers' files are read; of another word `words.PLACEHOLDER.KEY` are
the tensors of its `LearnedWord.state()`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BeforeValidator
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.toybox.archive import SubjectArchive
from infer.conditions import PictureRequest, build_inputs
from infer.pipeline import SubjectDiffusionPipeline
from infer.refine.method import Concept, RefineBase, RefineBatch, RefineModule, denoising_error
from infer.refine.refinement import Refinement
from infer.subjects import Subject
from model.attention_maps import cross_attention_layers
from model.inputs import SubjectInputs
from model.lasr.init_words import InitVectors, init_vectors
from model.learned_words import FixedRows, LearnedWord, LearnedWords, Mode, add_words
from model.prompt import PromptError, suffix_of
from train.denoising import NoisyLatents
from train.draws import SampleDraws
from train.starting_models import noise_schedule

Given = TypeVar("Given")


def _split(value: Given) -> Given | list[str]:
    return value.split() if isinstance(value, str) else value


SpacedWords = Annotated[tuple[str, ...], BeforeValidator(_split)]  # a list, or one text: "young dog"


class WordMethod:
    """What learned words settle of a `RefineMethod`."""

    pair_options: dict[str, Any] | None = None  # there is no word to learn
    has_strength = False

    def thing(self, concept: Concept, settings: Any) -> str:
        return concept.placeholder

    def joins(self, settings: Any) -> bool:
        return True

    def install(self, pipeline: SubjectDiffusionPipeline, refinements: Sequence[Refinement]) -> None:
        """Words are all that these methods learn, and `install_refinements` puts in those of all methods at once."""


class WordModule(RefineModule):
    """Words that are trained on a frozen base; the base's pipeline draws with them from now on.

    Args:
        words: at their start.
    """

    def __init__(self, base: RefineBase, words: Sequence[LearnedWord], mode: Mode = "exact") -> None:
        super().__init__(base)
        self.schedule = noise_schedule(base.pipeline.scheduler)
        self.learned = LearnedWords(words, mode)
        base.pipeline.words = self.learned

    def forward(self, batch: RefineBatch, draws: SampleDraws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.base.pipeline.subject_model
        noisy = noised(self.schedule, batch.latents, draws)
        inputs = prompt_inputs(self.base.pipeline, batch.prompts, batch.subjects)
        context, condition = model.encode(inputs, grid_of(batch), inference=True)
        prediction = model.denoise(noisy.noisy.to(model.unet.dtype), noisy.timesteps, context, condition)
        error = denoising_error(self.schedule, prediction, batch, noisy.noise, noisy.timesteps).mean()
        return error, {"denoising": error.detach()}

    def tensors(self) -> dict[str, Tensor]:
        return word_tensors(self.learned)

    def words(self) -> dict[str, dict[str, Any]]:
        return told_words(self.learned)


def noised(schedule: Any, latents: Tensor, draws: SampleDraws) -> NoisyLatents:
    """Latents (B, C, h, w) at the timesteps and with the noise that their samples draw."""
    timesteps = draws.integers(schedule.config.num_train_timesteps).to(latents.device)
    noise = draws.normal(*latents.shape[1:]).to(latents)
    return NoisyLatents(latents, noise, timesteps, schedule.add_noise(latents, noise, timesteps))


def grid_of(batch: RefineBatch) -> tuple[int, int]:
    """(h, w) of the latents."""
    return batch.latents.shape[2], batch.latents.shape[3]


def prompt_inputs(
    pipeline: SubjectDiffusionPipeline, prompts: Sequence[str], subjects: Sequence[Subject | None] | None = None
) -> SubjectInputs:
    """Prompts with placeholders of the pipeline's words, as the model takes them.

    Args:
        subjects: what is shown beside each prompt, None for nothing.
    Raises:
        UserError: a prompt is too long.
    """
    requests = [_request(*one) for one in zip(prompts, subjects or [None] * len(prompts), strict=True)]
    inputs = build_inputs(
        requests, pipeline.tokenizer, pipeline.image_encoder, pipeline.reference_features, pipeline.words
    )
    return inputs.to(pipeline.unet.device)


def _request(prompt: str, subject: Subject | None) -> PictureRequest:
    if subject is None:
        return PictureRequest(prompt)
    return PictureRequest(prompt, subjects=(subject,), boxes=None if subject.box is None else (subject.box,))


def fitting(pipeline: SubjectDiffusionPipeline, prompt: str, subject: Subject | None = None) -> str:
    """The prompt without the words at its end that the text encoder has no room for; for training texts only.

    Args:
        subject: shown beside the prompt, which needs room of its own.
    """
    expand = (lambda text: text) if pipeline.words is None else pipeline.words.expand
    suffix = "" if subject is None else suffix_of(subject.noun)
    words = prompt.split(" ")

    def used() -> int:
        return len(pipeline.tokenizer(expand(" ".join(words)) + suffix, verbose=False)["input_ids"])

    while len(words) > 1 and used() > pipeline.tokenizer.model_max_length:
        words.pop()
    return " ".join(words)


@functools.cache
def training_nouns() -> tuple[str, ...]:
    """What the toybox models were trained to draw; everyday words on any base."""
    return tuple(sorted({subject.noun for subject in SubjectArchive().of_split("train")}))


def new_ids(base: RefineBase, concept: Concept, num_vectors: int) -> tuple[int, ...]:
    """Add a concept's placeholder to the base's tokenizer.

    Raises:
        UserError: it is taken, an ordinary word, or none that a prompt could hold.
    """
    if "." in concept.placeholder:
        raise UserError(f"placeholder {concept.placeholder!r}: must hold no dot; give another word, like 'z'")
    common = (*training_nouns(), *concept.class_word.split())
    try:
        return add_words(base.pipeline.tokenizer, concept.placeholder, num_vectors, common)
    except PromptError as error:
        raise UserError(str(error)) from error


def named_vectors(base: RefineBase, words: Sequence[str], weights: Sequence[float] | None = None) -> InitVectors:
    """Embeddings of words that a person names for a start, with their weights.

    Raises:
        UserError: a word that the tokenizer does not know, or weights that do not fit.
    """
    try:
        found = init_vectors(
            base.pipeline.tokenizer, base.pipeline.text_encoder.embeddings.token_embedding, words, weights
        )
    except PromptError as error:
        raise UserError(str(error)) from error
    return InitVectors(found.vectors.cpu(), found.weights)


def class_vectors(base: RefineBase, class_word: str) -> InitVectors:
    """Embeddings of what a concept is; of a word that the tokenizer can only spell, those of its pieces.

    Raises:
        UserError: no letter or digit in it.
    """
    ids: list[int] = []
    weights: list[float] = []
    for word in class_word.split():
        if not any(letter.isalnum() for letter in word):
            continue
        pieces = base.pipeline.tokenizer.tokenize(word)
        ids += base.pipeline.tokenizer.convert_tokens_to_ids(pieces)
        weights += [1 / len(pieces)] * len(pieces)
    if not ids:
        raise UserError(f"class word {class_word!r}: says nothing; give what the subject is, like 'dog'")
    embedding = base.pipeline.text_encoder.embeddings.token_embedding
    vectors = embedding(torch.tensor(ids, device=embedding.weight.device)).detach().float().cpu()  # (N, D)
    shares = torch.tensor(weights)
    return InitVectors(vectors, shares / shares.sum())


def word_start(base: RefineBase, concept: Concept, words: Sequence[str], num_vectors: int) -> Tensor:
    """Rows (K, D) to start from: one a word where there are K words, else the mean of them in each row.

    Args:
        words: none for the concept's class word.

    Raises:
        UserError: a word that the tokenizer does not know.
    """
    found = [named_vectors(base, [word]) for word in words] or [class_vectors(base, concept.class_word)]
    means = torch.stack([one.weights @ one.vectors for one in found])  # (words, D)
    return means if len(means) == num_vectors else means.mean(dim=0).repeat(num_vectors, 1)


def told_words(words: LearnedWords) -> dict[str, dict[str, Any]]:
    """What a file says of its words: placeholder -> {"vectors": K}."""
    return {word.placeholder: {"vectors": word.num_vectors} for word in words}


def word_tensors(words: LearnedWords) -> dict[str, Tensor]:
    """What a file holds of its words, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for word in words:
        name = f"words.{word.placeholder}"
        if isinstance(word.static, FixedRows) and word.num_layers is None and word.scale == 1:
            tensors[name] = word.static.rows.detach().cpu().clone()  # (K, D)
        else:
            tensors |= {f"{name}.{key}": value for key, value in word.state().items()}
    return tensors


def word_states(refinement: Refinement) -> dict[str, dict[str, Tensor]]:
    """The words of a file, placeholder -> `LearnedWord.state()`; concepts without a word of their own are left out.

    Raises:
        UserError: the tensors of a word are not there.
    """
    states = {}
    for placeholder, told in refinement.words.items():
        name = f"words.{told.get('name', placeholder)}"  # the tensors of a renamed word keep their name
        if name in refinement.tensors:
            state = {"static.rows": refinement.tensors[name]}
        else:
            own = {key: value for key, value in refinement.tensors.items() if key.startswith(f"{name}.")}
            state = {key.removeprefix(f"{name}."): value for key, value in own.items()}
        if state:
            states[placeholder] = state
        elif "vectors" in told:
            raise UserError(f"{refinement.label}: the vectors of {placeholder!r} are not in it; it is damaged")
    return states


def install_words(
    pipeline: SubjectDiffusionPipeline,
    refinements: Sequence[Refinement],
    *,
    mode: Mode | None = None,
    scale: float | None = None,
    adaptive_weight: float | None = None,
) -> None:
    """Add the words of refinements to those of a pipeline, so that they can stand in one prompt.

    Args:
        mode, scale, adaptive_weight: as in `install.install_refinements`.

    Raises:
        UserError: a placeholder that is taken or an ordinary word; words that do not fit this base.
    """
    words = list(pipeline.words or ())
    owners = {word.placeholder.lower(): "a word that is there" for word in words}
    found = [(refinement, *item) for refinement in refinements for item in word_states(refinement).items()]
    for refinement, placeholder, _ in found:
        if placeholder.lower() in owners:
            owner = owners[placeholder.lower()]
            raise UserError(
                f"{refinement.label}: its placeholder {placeholder!r} is also that of {owner}; rename one of them"
            )
        owners[placeholder.lower()] = refinement.label
    if not found:
        return
    adapting = [refinement for refinement, _, state in found if any(name.startswith("adaptive.") for name in state)]
    fast = [refinement.settings.get("options", {}).get("mode") == "fast" for refinement in adapting]
    for refinement, placeholder, state in found:
        words.append(_restored(pipeline, refinement, placeholder, state))
        if scale is not None:
            words[-1].scale = scale
        if adaptive_weight is not None:
            words[-1].adaptive_weight = adaptive_weight
    try:
        pipeline.words = LearnedWords(words, mode or ("fast" if fast and all(fast) else "exact")).requires_grad_(False)
    except ValueError as error:
        raise UserError(str(error)) from error


def _restored(
    pipeline: SubjectDiffusionPipeline, refinement: Refinement, placeholder: str, state: dict[str, Tensor]
) -> LearnedWord:
    """A word of a file, its tokens added to the tokenizer."""
    shaped = state.get("static.rows", state.get("static.basis.bias"))  # (K, D) or (layers, K, D)
    if shaped is None:
        raise UserError(f"{refinement.label}: the tensors of {placeholder!r} make no learned word; it is damaged")
    width = pipeline.text_encoder.config.hidden_size
    layers = len(cross_attention_layers(pipeline.unet))
    if shaped.shape[-1] != width:
        raise UserError(
            f"{refinement.label}: the vectors of {placeholder!r} are {shaped.shape[-1]} wide, those of this base "
            f"{width}; it was made on another base"
        )
    if shaped.dim() == 3 and shaped.shape[0] != layers:
        raise UserError(
            f"{refinement.label}: {placeholder!r} has vectors for {shaped.shape[0]} cross-attention layers, this base "
            f"has {layers}; it was made on another base"
        )
    try:
        ids = add_words(pipeline.tokenizer, placeholder, shaped.shape[-2])
        return LearnedWord.from_state(placeholder, ids, state)
    except ValueError as error:
        raise UserError(f"{refinement.label}: {error}") from error
