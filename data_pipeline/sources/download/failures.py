"""Why pictures were not downloaded: img2dataset's table of a shard, its messages sorted into a few reasons."""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_pipeline.record import Drop
from data_pipeline.sources.files import Place
from data_pipeline.sources.keys import clean_key, faithful_key
from data_pipeline.sources.metadata import clean_text

COLUMNS = ("key", "url", "caption", "status", "error_message")

# The first that is found in the message, in lower case; our guard's own words among them.
REASONS_BY_WORDS = (
    ("x-robots-tag", "download_disallowed"),
    ("private address", "download_private_address"),
    ("body larger than", "download_too_large"),
    ("took longer than", "download_too_slow"),
    ("timed out", "download_too_slow"),
    ("unknown url type", "download_bad_url"),
    ("no host given", "download_bad_url"),
    ("control characters", "download_bad_url"),
    ("name or service not known", "download_no_host"),
    ("name resolution", "download_no_host"),
    ("no address associated", "download_no_host"),
    ("nodename nor servname", "download_no_host"),
    ("certificate", "download_tls"),
    ("ssl", "download_tls"),
)


def reason_of(status: str, message: str) -> str:
    """One of `data_pipeline.sources.reasons.REASONS`, or download_http_NNN."""
    if status == "failed_to_resize":
        return "download_undecodable"
    lower = message.lower()
    if found := re.match(r"http error ([1-5]\d\d)\b", lower):
        return "download_bad_url" if " - redirection to url " in lower else f"download_http_{found[1]}"
    return next((reason for words, reason in REASONS_BY_WORDS if words in lower), "download_failed")


def read_failures(place: Place, path: str, name: str, prefix: str = "") -> Iterator[Drop]:
    """The rows that were not downloaded, of the table `path` if there is one and img2dataset wrote it."""
    import pyarrow
    from pyarrow import parquet

    try:
        if not place.system.exists(path):
            return
        with place.system.open(path, "rb") as file, parquet.ParquetFile(file) as table:
            present = [column for column in COLUMNS if column in table.schema_arrow.names]
            if not {"key", "status", "error_message"} <= set(present):
                return
            for batch in table.iter_batches(columns=present, batch_size=4096):
                for row in batch.to_pylist():
                    status = str(row["status"])
                    if status != "success":
                        message = clean_text(str(row["error_message"] or ""))[:300]
                        key = prefix + faithful_key(str(row["key"]))
                        url, alt_text = row.get("url"), row.get("caption")
                        yield Drop(
                            key,
                            reason_of(status, message),
                            message,
                            clean_text(str(url)) if url else None,
                            alt_text=clean_text(str(alt_text or "")),
                        )
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield Drop(clean_key(name), "bad_metadata", f"{path}: {' '.join(str(error).split())[:200]}")
