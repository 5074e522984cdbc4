"""The downloader's guard: no private address, no other scheme, no endless body; without img2dataset, in a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.sources.download import guard
from data_pipeline.sources.download.failures import reason_of
from tests.data_pipeline.sources.picture_server import picture_bytes, picture_server

# The hook stays for the life of a process, so it gets one of its own. It fetches every URL as img2dataset does.
FETCH = """
import json, sys, threading, time, urllib.request
sys.path.insert(0, sys.argv[1])
import guard
order = json.load(sys.stdin)
guard.install(guard.Limits(frozenset(order["allow_hosts"]), 200_000, 5.0))
answers = {}
def fetch(name, url):
    start = time.monotonic()
    try:
        with urllib.request.urlopen(urllib.request.Request(url), timeout=4.0) as response:
            answers[name] = [len(response.read()), ""]
    except Exception as error:
        answers[name] = [0, str(error)]
    answers[name].append(time.monotonic() - start)
threads = [threading.Thread(target=fetch, args=item) for item in order["urls"].items()]
for thread in threads: thread.start()
for thread in threads: thread.join()
import socket
for name, address in (("raw", ("127.0.0.1", 9)), ("name", ("localhost", 9)), ("of the host before", ("127.0.0.1", 9))):
    try:
        if name == "of the host before":
            socket.getaddrinfo("127.0.0.1", 9)  # may be private, but not as the address of the next host
            socket.getaddrinfo("8.8.8.8", 9)
        socket.socket().connect(address)
    except OSError as error:
        answers["socket " + name] = [0, str(error), 0.0]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str, float]]:
    """Bytes, message and seconds of every kind of URL; 127.0.0.1 may be private, all other names may not."""
    with picture_server() as server:
        urls = {
            "good": server.url("/good/1"),
            "redirect to allowed": server.url(f"/redirect?{server.url('/good/2')}"),
            "name that resolves to private": server.url("/good/3", "localhost"),
            "redirect to private": server.url(f"/redirect?{server.url('/good/4', 'localhost')}"),
            "number": server.url("/good/5", "2130706433"),
            "mapped": server.url("/good/6", "[::ffff:127.0.0.1]"),
            "metadata service": "http://169.254.169.254/latest/meta-data",
            "file": "file:///etc/hostname",
            "redirect to file": server.url("/redirect?file:///etc/hostname"),
            "ftp": "ftp://127.0.0.1/x",
            "endless": server.url("/endless"),
            "slow": server.url("/slow"),
            "slow headers": server.url("/drip-headers"),
            "short": server.url("/short"),
            "missing": server.url("/missing"),
        }
        finished = subprocess.run(
            [sys.executable, "-c", FETCH, str(Path(guard.__file__).parent)],
            input=json.dumps({"urls": urls, "allow_hosts": ["127.0.0.1"]}),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env={"http_proxy": "http://127.0.0.1:1", "PATH": ""},  # a proxy would connect where nobody sees it
        )
        unseen = [path for path in server.requested if path in ("/good/3", "/good/4", "/good/5", "/good/6")]
        assert not unseen
    return json.loads(finished.stdout)


def test_allowed_hosts_are_fetched_and_redirects_among_them_followed(answers: dict) -> None:
    assert answers["good"][0] == len(picture_bytes(1))
    assert answers["redirect to allowed"][0] == len(picture_bytes(2))


@pytest.mark.parametrize(
    "name", ["name that resolves to private", "redirect to private", "number", "mapped", "metadata service"]
)
def test_private_addresses_are_refused_however_they_are_written_or_reached(answers: dict, name: str) -> None:
    assert "private address" in answers[name][1]
    assert reason_of("failed_to_download", answers[name][1]) == "download_private_address"


@pytest.mark.parametrize("name", ["socket raw", "socket name", "socket of the host before"])
def test_other_libraries_cannot_connect_past_the_guard(answers: dict, name: str) -> None:
    assert "private address" in answers[name][1]


@pytest.mark.parametrize("name", ["file", "redirect to file", "ftp"])
def test_only_http_and_https_are_spoken(answers: dict, name: str) -> None:
    assert reason_of("failed_to_download", answers[name][1]) == "download_bad_url"


def test_a_body_ends_at_its_limit(answers: dict) -> None:
    assert reason_of("failed_to_download", answers["endless"][1]) == "download_too_large"


@pytest.mark.parametrize("name", ["slow", "slow headers"])
def test_an_answer_that_drips_ends_at_its_deadline(answers: dict, name: str) -> None:
    assert reason_of("failed_to_download", answers[name][1]) == "download_too_slow"
    assert answers[name][2] < 15


def test_a_body_that_ends_early_is_no_picture(answers: dict) -> None:
    assert "ended after" in answers["short"][1]
    assert reason_of("failed_to_download", answers["missing"][1]) == "download_http_404"


@pytest.mark.parametrize(
    "address",
    """127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 240.0.0.1
    255.255.255.255 :: ::1 fe80::1 fe80::1%eth0 fc00::1 fec0::1 ff02::1 ::ffff:10.0.0.1 ::10.0.0.1 64:ff9b::a00:1
    2002:0a00:0001::1 2001:0:4136:e378:8000:63bf:f5ff:fffe 2001:db8::1 example.org""".split(),
)
def test_addresses_that_are_not_of_the_public_internet(address: str) -> None:
    assert not guard.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_of_the_public_internet(address: str) -> None:
    assert guard.is_public(address)
