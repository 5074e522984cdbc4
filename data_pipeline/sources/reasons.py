"""Reasons for which a source leaves a sample out, beside those of `data_pipeline.rules` and of the decoder."""

from __future__ import annotations

REASONS = {
    "unreadable": "the file could not be read",
    "too_large": "the file or member is larger than source.max_image_mb, or its text than 1 MB",
    "bad_metadata": "the JSON beside the picture, or a mask or reference that it names, does not fit its format",
    "no_image": "text or metadata without a picture",
    "repeated_key": "the shard has met this key before",
    "unsafe_member": "a link, a device or a name that leads out of the shard's folder",
    "broken_tar": "the shard ends early or is damaged: what came before is kept",
    "no_given_entities": "the annotations name nothing in the picture that is kept",
    "download_disallowed": "the server's X-Robots-Tag forbids the use",
    "download_private_address": "the address is or leads to a private one, or a redirect does",
    "download_bad_url": "not http or https, or no URL at all",
    "download_no_host": "the host's name is unknown",
    "download_tls": "no trusted certificate, or no encryption that both sides know",
    "download_too_slow": "not there within source.timeout_s or source.deadline_s",
    "download_too_large": "the body is larger than source.max_image_mb",
    "download_undecodable": "what came is no picture",
    "download_failed": "any other failure; HTTP errors are counted by number: download_http_404 …",
}
