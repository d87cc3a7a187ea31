"""Downloads against a server on the loopback address, which can be told to misbehave."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from desisky_tune.data.download import fetch, progress_bar
from desisky_tune.errors import DownloadError, StorageError

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves one content; `break_after` bytes of each answer arrive, where it is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.etag = '"one"'
        self.break_after: list[int] = []
        self.knows_ranges = True
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.fits"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        server.asked.append(wanted)
        start = 0
        same = self.headers.get("If-Range") in (None, server.etag)
        if wanted and server.knows_ranges and same:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start and start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path != "/file.fits":
            self.send_error(404)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.break_after:
            body = body[: server.break_after.pop(0)]
        with contextlib.suppress(ConnectionError):  # the reader may have gone
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_file_arrives_whole_and_alone(server: Server, tmp_path: Path) -> None:
    path = fetch(server.url, tmp_path / "sub" / "file.fits", sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path / "sub") == ["file.fits"]


def test_progress_grows_to_the_length(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    fetch(server.url, tmp_path / "f", progress=lambda done, total: seen.append((done, total)))
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_broken_connection_is_continued_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.break_after = [1_000_000, 500_000]
    path = fetch(server.url, tmp_path / "f", sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_later_call_continues_what_an_earlier_one_kept(server: Server, tmp_path: Path) -> None:
    server.break_after = [700_000]
    with pytest.raises(DownloadError, match=r"broke at 700000 of 3000000 bytes.*run again"):
        fetch(server.url, tmp_path / "f", sha256=SHA256, attempts=1)
    assert names(tmp_path) == ["f.part", "f.part.json"]
    fetch(server.url, tmp_path / "f", sha256=SHA256)
    assert server.asked == [None, "bytes=700000-"]
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert names(tmp_path) == ["f"]


def test_a_file_that_changed_meanwhile_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    server.break_after = [700_000]
    with pytest.raises(DownloadError):
        fetch(server.url, tmp_path / "f", attempts=1)
    server.content, server.etag = CONTENT[::-1], '"two"'
    assert fetch(server.url, tmp_path / "f").read_bytes() == CONTENT[::-1]


def test_a_server_without_ranges_is_read_from_the_start(server: Server, tmp_path: Path) -> None:
    server.break_after = [700_000]
    server.knows_ranges = False
    assert fetch(server.url, tmp_path / "f", sha256=SHA256).read_bytes() == CONTENT


def test_a_part_that_was_whole_already_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT)
    note = {"url": server.url, "validator": server.etag}
    (tmp_path / "f.part.json").write_text(json.dumps(note))
    assert fetch(server.url, tmp_path / "f", sha256=SHA256).read_bytes() == CONTENT
    assert server.asked == ["bytes=3000000-"]


@pytest.mark.parametrize("note", [None, "{", '{"url": "elsewhere", "validator": "x"}'])
def test_bytes_of_unknown_origin_are_not_continued(
    server: Server, tmp_path: Path, note: str | None
) -> None:
    (tmp_path / "f.part").write_bytes(b"x" * 1000)
    if note is not None:
        (tmp_path / "f.part.json").write_text(note)
    assert fetch(server.url, tmp_path / "f", sha256=SHA256).read_bytes() == CONTENT
    assert server.asked == [None]


def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=f"wrong checksum: SHA-256 {SHA256}, expected 0000"):
        fetch(server.url, tmp_path / "f", sha256="0" * 64)
    assert names(tmp_path) == []


def test_no_server_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(DownloadError, match=r"cannot be reached \(.*refused\).*place it at"):
            fetch(f"http://127.0.0.1:{port}/f", tmp_path / "f")


def test_an_answer_that_is_no_file_is_an_error(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="the server answers 404"):
        fetch(server.url.replace("file", "other"), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_two_downloads_of_one_file_do_not_mix(server: Server, tmp_path: Path) -> None:
    def second(done: int, total: int | None) -> None:
        with pytest.raises(DownloadError, match="another process is downloading it"):
            fetch(server.url, tmp_path / "f")

    fetch(server.url, tmp_path / "f", sha256=SHA256, progress=second)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_folder_that_cannot_be_made_is_a_storage_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        fetch(server.url, tmp_path / "file" / "f")


def test_a_disk_that_takes_no_more_is_a_storage_error(server: Server, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*f: File too large"):
            fetch(server.url, tmp_path / "f")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "f").exists()
    assert fetch(server.url, tmp_path / "f", sha256=SHA256).read_bytes() == CONTENT


def test_what_goes_wrong_with_a_download_ends_a_command_with_code_2() -> None:
    assert (DownloadError.exit_code, StorageError.exit_code) == (2, 2)


def test_the_bar_is_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("file") as progress:
        progress(1, 2)
    assert "".join(capsys.readouterr()).strip() == ""
