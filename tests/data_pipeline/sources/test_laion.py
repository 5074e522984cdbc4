"""LAION: rows are chosen before any request, then fetched by the real img2dataset from a server on loopback."""

from __future__ import annotations

import getpass
import hashlib
import io
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.record import Drop
from data_pipeline.settings import settings_of
from data_pipeline.sources import SourceSample
from data_pipeline.sources.download.environment import prepare_environment
from data_pipeline.sources.download.failures import reason_of
from data_pipeline.sources.laion import LaionSettings, LaionSource
from tests.data_pipeline.sources.picture_server import PictureServer, picture_bytes, picture_server


def row(url: str, **changes: Any) -> dict[str, Any]:
    """A row of LAION's metadata that passes every filter."""
    usual = {
        "URL": url,
        "TEXT": f"a picture of {url[-6:]}",
        "WIDTH": 1000,
        "HEIGHT": 700,
        "similarity": 0.31,
        "punsafe": 0.01,
        "pwatermark": 0.2,
        "AESTHETIC_SCORE": 5.5,
    }
    return {**usual, **changes}


def laion(tmp_path: Path, rows: list[dict[str, Any]], **keys: Any) -> LaionSource:
    file = tmp_path / "metadata.parquet"
    pandas.DataFrame(rows).to_parquet(file)
    values = {"metadata": str(file), "download": str(tmp_path / "download"), "number_sample_per_shard": 4, **keys}
    return settings_of(LaionSettings, values, "the test").open()


def chosen(source: LaionSource) -> list[str]:
    assert source.selection.rows >= 0
    parts = sorted((source.folder / "metadata").glob("*.parquet"))
    return [url for part in parts for url in pandas.read_parquet(part)["url"]]


def test_rows_are_left_out_by_the_first_filter_they_fail(tmp_path: Path) -> None:
    rows = [
        row("http://a/kept"),
        row("HTTPS://a/kept-too", WIDTH=599, HEIGHT=600, punsafe=0.1, pwatermark=0.5, similarity=0.3),
        row("ftp://a/scheme"),
        row("http://a/small", WIDTH=599, HEIGHT=599, punsafe=0.9),
        row("http://a/unsafe", punsafe=0.11),
        row("http://a/marked", pwatermark=0.51),
        row("http://a/ugly", AESTHETIC_SCORE=4.4),
        row("http://a/unlike", similarity=0.29),
        row("http://a/unknown", punsafe=None),
        row("http://a/no-size", WIDTH=None),
    ]
    source = laion(tmp_path, rows, min_aesthetic=4.5, min_similarity=0.3)
    assert chosen(source) == ["http://a/kept", "HTTPS://a/kept-too"]
    assert source.selection.left_out == {
        "aesthetic": 1,
        "no_web_address": 1,
        "punsafe": 2,
        "pwatermark": 1,
        "similarity": 1,
        "too_small": 2,
    }


def test_units_are_known_before_the_download_and_number_the_rows_that_passed(tmp_path: Path) -> None:
    source = laion(tmp_path, [row(f"http://a/{i}", WIDTH=1000 if i % 2 else 10, HEIGHT=10) for i in range(18)])
    assert [(unit.name, unit.count) for unit in source.units()] == [("00000", 4), ("00001", 4), ("00002", 1)]
    with pytest.raises(UserError, match="00000 is not downloaded yet"):
        list(source.samples(source.units()[0]))


def test_parts_hold_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.sources.download.selection.PART_ROWS", 10)
    source = laion(tmp_path, [row(f"http://a/{i}") for i in range(19)])
    assert chosen(source) == [f"http://a/{i}" for i in range(19)]
    parts = sorted((source.folder / "metadata").glob("*.parquet"))
    assert [len(pandas.read_parquet(part)) for part in parts] == [8, 8, 3]


def test_columns_may_have_other_names_and_scores_may_be_missing(tmp_path: Path) -> None:
    rows = [{"LINK": "http://a/1", "caption": "one", "Width": 700, "Height": 10}]
    source = laion(tmp_path, rows, columns={"url": "LINK"}, max_punsafe=None, max_pwatermark=None)
    assert chosen(source) == ["http://a/1"]


def test_a_missing_column_is_one_line_with_the_columns_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metadata.parquet: no column punsafe; found URL, WIDTH, HEIGHT; name it with"):
        _ = laion(tmp_path, [{"URL": "http://a/1", "WIDTH": 700, "HEIGHT": 700}]).selection


def test_metadata_that_is_no_parquet_is_one_line(tmp_path: Path) -> None:
    source = laion(tmp_path, [row("http://a/1")])
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="no parquet file that can be read"):
        _ = source.selection


def test_other_filters_on_a_used_folder_are_refused(tmp_path: Path) -> None:
    _ = laion(tmp_path, [row("http://a/1")]).selection
    with pytest.raises(UserError, match="holds pictures of other metadata, filters or shard sizes"):
        _ = laion(tmp_path, [row("http://a/1")], max_punsafe=0.5).selection


def test_nothing_left_says_what_took_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no row passes the filters \(.*punsafe 1"):
        laion(tmp_path, [row("http://a/1", punsafe=1.0)]).units()


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        ("failed_to_download", "HTTP Error 404: certificate", "download_http_404"),
        ("failed_to_download", "<urlopen error [Errno -2] Name or service not known>", "download_no_host"),
        ("failed_to_download", "<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] x>", "download_tls"),
        ("failed_to_download", "The read operation timed out", "download_too_slow"),
        ("failed_to_download", "Use of image disallowed by X-Robots-Tag directive", "download_disallowed"),
        ("failed_to_download", "Remote end closed connection without response", "download_failed"),
        ("failed_to_resize", "Image decoding error", "download_undecodable"),
    ],
)
def test_messages_of_the_downloader_become_few_reasons(status: str, message: str, reason: str) -> None:
    assert reason_of(status, message) == reason


def test_a_folder_that_is_no_environment_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="neither empty nor a Python environment"):
        prepare_environment(str(tmp_path), None)
    assert (tmp_path / "thesis.tex").exists()


def test_an_interpreter_that_img2dataset_cannot_use_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source.python=/bin/false: img2dataset==\S+ runs on Python 3.10 to 3.12"):
        prepare_environment(str(tmp_path / "new"), "/bin/false")


@pytest.mark.slow
def test_a_registry_out_of_reach_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot install img2dataset==\S+ there \(ERROR: No matching distribution"):
        prepare_environment(str(tmp_path / "new"), None)


# From here on the real img2dataset runs; its environment takes two minutes to install, once a machine.


@pytest.fixture(scope="session")
def environment() -> str:
    folder = Path(tempfile.gettempdir()) / f"subject-diffusion-tests-of-{getpass.getuser()}" / "img2dataset"
    prepare_environment(str(folder), None)
    return str(folder)


def rows_of_all_kinds(server: PictureServer) -> list[dict[str, Any]]:
    """Twelve rows that are asked for, and one that is not."""
    bad = ["missing", "slow", "endless", "text", "noai", "short", "drip-headers"]
    return [
        row(server.url("/good/0")),
        *[row(server.url(f"/{name}"), TEXT=f"the {name} one") for name in bad],
        row(server.url(f"/redirect?{server.url('/good/1')}")),
        row(server.url(f"/redirect?{server.url('/good/2', 'localhost')}")),  # a private name that is not allowed
        row(server.url("/good/3", "localhost")),
        row(server.url("/tagged")),  # the tag is for another robot
        row(server.url("/good/4"), punsafe=0.99),
        row(server.url("/good/5?large"), TEXT=None),
    ]


def fast(environment: str) -> dict[str, Any]:
    limits = {"timeout_s": 1.0, "deadline_s": 2.0, "max_image_mb": 2.0, "retries": 0, "image_size": 64}
    return {"environment": environment, "processes": 2, "threads": 8, "allow_hosts": ["127.0.0.1"], **limits}


def processes_of(environment: str) -> list[str]:
    """Command lines of all that runs on the environment's Python."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith(environment)]


@pytest.mark.slow
def test_a_download_gives_the_good_pictures_and_the_reason_for_each_other_one(tmp_path: Path, environment: str) -> None:
    seen: list[tuple[int, int]] = []
    with picture_server() as server:
        source = laion(tmp_path, rows_of_all_kinds(server), **fast(environment))
        source.fetch(lambda done, total: seen.append((done, total)))
        first = list(server.requested)
        source.fetch()
        assert server.requested == first
    assert not [path for path in first if path in ("/good/2", "/good/3", "/good/4")]
    assert seen[-1] == (13, 13) and sorted(seen) == seen

    answers = [answer for unit in source.units() for answer in source.samples(unit)]
    samples = {answer.url: answer for answer in answers if isinstance(answer, SourceSample)}
    drops = [answer for answer in answers if isinstance(answer, Drop)]
    assert len(answers) == 13 and len({answer.key for answer in answers}) == 13
    good = samples[server.url("/good/0")]
    assert good.image == picture_bytes(0)  # small enough: its bytes are kept
    assert good.alt_text == "a picture of good/0"
    assert good.scores == {"similarity": 0.31, "punsafe": 0.01, "pwatermark": 0.2, "aesthetic": 5.5}
    large = samples[server.url("/good/5?large")]
    assert max(Image.open(io.BytesIO(large.image)).size) == 64
    assert large.sha256 == hashlib.sha256(picture_bytes(5, (900, 700))).hexdigest()
    assert len(samples) == 4
    assert Counter(drop.reason for drop in drops) == {
        "download_http_404": 1,
        "download_too_slow": 2,
        "download_too_large": 1,
        "download_undecodable": 1,
        "download_disallowed": 1,
        "download_failed": 1,
        "download_private_address": 2,
    }
    assert {drop.alt_text for drop in drops if drop.reason == "download_disallowed"} == {"the noai one"}


@pytest.mark.slow
def test_an_interrupted_download_leaves_no_process_and_goes_on_where_it_was(tmp_path: Path, environment: str) -> None:
    with picture_server() as server:
        rows = [row(server.url(f"/good/{i}" if i < 8 else "/slow")) for i in range(12)]
        source = laion(tmp_path, rows, **{**fast(environment), "deadline_s": 5.0, "processes": 1})

        def interrupt(done: int, total: int) -> None:
            if done >= 8:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            source.fetch(interrupt)
        time.sleep(0.5)
        assert not processes_of(environment)
        (source.folder / "shards" / "00001_stats.json").write_text('{"cou')  # as if killed while writing it
        before = len(server.requested)
        source.fetch()
    again = Counter(server.requested[before:])
    assert again == {**{f"/good/{i}": 1 for i in range(4, 8)}, "/slow": 4}


@pytest.mark.slow
def test_a_builder_that_is_killed_takes_the_download_with_it(tmp_path: Path, environment: str) -> None:
    with picture_server() as server:
        source = laion(tmp_path, [row(server.url("/slow"))] * 4, **{**fast(environment), "deadline_s": 60.0})
        code = (
            "import sys; from data_pipeline.sources.laion import LaionSettings as S; "
            "S.model_validate_json(sys.argv[1]).open().fetch()"
        )
        command = [sys.executable, "-c", code, source.settings.model_dump_json()]
        builder = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        while not server.requested and time.monotonic() < deadline:
            time.sleep(0.1)
        assert server.requested and processes_of(environment)
        builder.kill()
        builder.wait()
        time.sleep(1)
        assert not processes_of(environment)


def test_numbers_of_the_table_are_finite(tmp_path: Path) -> None:
    source = laion(tmp_path, [row("http://a/1", similarity=np.nan), row("http://a/2")], min_similarity=0.1)
    assert chosen(source) == ["http://a/2"]
