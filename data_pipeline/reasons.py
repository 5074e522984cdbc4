"""Why samples are left out: every reason that tables and statistics count, with a line for a person."""

from __future__ import annotations

from data_pipeline.sources.reasons import REASONS as SOURCE_REASONS

REASONS = {
    **SOURCE_REASONS,
    # of the picture itself (`images.py`)
    "image_empty": "no bytes",
    "image_too_many_bytes": "the file is larger than images.max_bytes",
    "image_unknown_format": "none of the formats that are read: a page, a drawing, a film",
    "image_too_large": "more pixels than images.max_pixels",
    "image_too_small": "the longer side is below rules.min_longer_side_px",
    "image_too_narrow": "one side is more than images.max_aspect_ratio times the other",
    "image_unsupported": "floating point, or more than 16 bits a channel",
    "image_corrupt": "truncated or damaged",
    "too_slow": "decoding took longer than engine.decode_timeout_s",
    "decoder_died": "the process that decoded it died",
    # between the stages
    "duplicate": "the same bytes as an earlier picture",
    "near_duplicate": "looks like an earlier picture",
    "nsfw": "above the limit of the check",
    "faces": "a face fills more of the picture than the check allows",
    "no_caption": "the captioner said nothing",
    "too_few_nouns": "fewer noun chunks than rules.nouns",
    "too_many_nouns": "more noun chunks than rules.nouns",
    "too_few_entities": "fewer entities found than rules.entities",
    "too_many_entities": "more entities found than rules.entities",
    "taken_down": "removed on request, by url or sha256",
    "sample_refused": "readers of shards would not take it",
}
