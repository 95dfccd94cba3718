"""Files of a folder over HTTP: which file a path means, and which none (S26)."""

import os
from pathlib import Path
from typing import Any

import pytest
import trio

from hibernation.replies import Reply
from hibernation.static_files import WHOLE_BYTES_MAX, StaticFiles


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder, and beside it what is none of its files."""
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "public"
    (folder / "sub" / "empty").mkdir(parents=True)
    (folder / ".well-known").mkdir()
    (folder / ".git").mkdir()
    for name, text in {
        "index.html": "<p>front</p>",
        "sub/index.html": "<p>sub</p>",
        "page.css": "a {}",
        "grüße &.txt": "grüße",
        "data.bin": "01234567890",
        "archive.tar.gz": "x",
        ".env": "TOKEN=1",
        ".git/config": "secret",
        "sub/.hidden": "secret",
        ".well-known/security.txt": "mail us",
    }.items():
        (folder / name).write_text(text)
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "inner.txt").symlink_to("page.css")
    (folder / "out").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    return folder


def get(root: Path, path: str, method: str = "GET", *, query: bytes = b"", **headers: Any) -> Reply | None:
    pairs = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return StaticFiles(root).answer(method, path, path, query, pairs)


def found(root: Path, path: str, method: str = "GET", **headers: Any) -> tuple[int, dict[str, str], bytes]:
    reply = get(root, path, method, **headers)
    assert reply is not None
    body = reply.body if isinstance(reply.body, bytes) else trio.run(_whole, reply.body)
    return reply.status, dict(reply.headers), body


async def _whole(pieces: Any) -> bytes:
    try:
        return b"".join([piece async for piece in pieces])
    finally:
        await pieces.aclose()


def test_files_and_their_types(root: Path) -> None:
    status, headers, body = found(root, "/page.css")
    assert (status, body, headers["content-type"]) == (200, b"a {}", "text/css; charset=utf-8")
    assert headers["content-length"] == "4"
    assert headers["x-content-type-options"] == "nosniff"
    assert found(root, "/")[2] == b"<p>front</p>"
    assert found(root, "/sub/")[2] == b"<p>sub</p>"
    assert found(root, "/grüße &.txt")[2].decode() == "grüße"
    assert found(root, "/data.bin")[1]["content-type"] == "application/octet-stream"
    assert found(root, "/archive.tar.gz")[1]["content-type"] == "application/octet-stream"
    assert found(root, "/.well-known/security.txt")[2] == b"mail us"


def test_a_folder_is_reached_with_its_slash(root: Path) -> None:
    reply = get(root, "/sub", query=b"a=1")
    assert reply is not None
    assert (reply.status, dict(reply.headers)["location"]) == (308, "/sub/?a=1")
    assert get(root, "/sub/empty") is None
    assert get(root, "/sub/empty/") is None


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/..",
        "/../secret.txt",
        "/sub/../../secret.txt",
        "/sub/../page.css",
        "/./page.css",
        "//page.css",
        "//example.com/..",
        "/sub//index.html",
        "/.env",
        "/.git/config",
        "/sub/.hidden",
        "/sub/.well-known/x",
        "/link.txt",
        "/inner.txt",
        "/out/secret.txt",
        "/out",
        "/pipe",
        "/page.css/",
        "/page.css/x",
        "/page.css\0",
        "/sub\\index.html",
        "page.css",
        "",
        "/" + "x" * 5000,
        "/\udcff",
    ],
)
def test_what_is_not_there(root: Path, path: str) -> None:
    """Nothing outside of the folder, no links, nothing hidden."""
    assert get(root, path) is None
    assert get(root, path, "HEAD") is None
    assert get(root, path, "POST") is None


def test_the_folder_itself_may_be_a_link(root: Path) -> None:
    other = root.parent / "current"
    other.symlink_to(root)
    assert found(other, "/page.css")[0] == 200


def test_head_and_other_methods(root: Path) -> None:
    status, headers, body = found(root, "/page.css", "HEAD")
    assert (status, headers["content-length"], body) == (200, "4", b"")
    status, headers, _ = found(root, "/page.css", "POST")
    assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_what_a_client_has_is_not_sent_again(root: Path) -> None:
    """RFC 9110, section 13: the tag goes before the date."""
    _, headers, _ = found(root, "/page.css")
    tag, modified = headers["etag"], headers["last-modified"]
    for same in ({"if_none_match": tag}, {"if_none_match": f'"x", W/{tag}'}, {"if_modified_since": modified}):
        status, again, body = found(root, "/page.css", **same)
        assert (status, body, again["etag"]) == (304, b"", tag)
        assert "content-length" not in again
    assert found(root, "/page.css", if_none_match="*")[0] == 304
    assert found(root, "/page.css", if_none_match='"x"', if_modified_since=modified)[0] == 200
    assert found(root, "/page.css", if_modified_since="Thu, 01 Jan 1970 00:00:00 GMT")[0] == 200
    assert found(root, "/page.css", if_modified_since="nonsense")[0] == 200
    assert found(root, "/page.css", if_match='"x"')[0] == 412
    assert found(root, "/page.css", if_match=tag)[0] == 200
    assert found(root, "/page.css", if_unmodified_since="Thu, 01 Jan 1970 00:00:00 GMT")[0] == 412
    (root / "page.css").write_text("b {}")
    os.utime(root / "page.css", (1e9, 1e9))
    assert found(root, "/page.css", if_none_match=tag)[0] == 200


@pytest.mark.parametrize(
    ("given", "status", "body", "shown"),
    [
        ("bytes=0-0", 206, b"0", "bytes 0-0/11"),
        ("bytes=2-4", 206, b"234", "bytes 2-4/11"),
        ("bytes=9-", 206, b"90", "bytes 9-10/11"),
        ("bytes=9-100", 206, b"90", "bytes 9-10/11"),
        ("bytes=-3", 206, b"890", "bytes 8-10/11"),
        ("bytes=11-", 416, b"", "bytes */11"),
        ("bytes=4-2", 200, b"01234567890", None),
        ("bytes=0-1,4-5", 200, b"01234567890", None),
        ("lines=0-1", 200, b"01234567890", None),
        ("nonsense", 200, b"01234567890", None),
    ],
)
def test_parts_of_a_file(root: Path, given: str, status: int, body: bytes, shown: str | None) -> None:
    """RFC 9110, section 14."""
    got = found(root, "/data.bin", range=given)
    assert (got[0], got[2], got[1].get("content-range")) == (status, body, shown)
    if status != 416:
        assert got[1]["content-length"] == str(len(body))


def test_a_part_of_another_version_is_all_of_this_one(root: Path) -> None:
    tag = found(root, "/data.bin")[1]["etag"]
    modified = found(root, "/data.bin")[1]["last-modified"]
    for condition, status in ((tag, 206), (modified, 206), ('"x"', 200), (f"W/{tag}", 200)):
        assert found(root, "/data.bin", range="bytes=0-1", if_range=condition)[0] == status, condition


@pytest.mark.parametrize("size", [0, WHOLE_BYTES_MAX, WHOLE_BYTES_MAX + 1, 3 * WHOLE_BYTES_MAX + 1])
def test_large_files_come_in_pieces(root: Path, size: int) -> None:
    data = os.urandom(size)
    (root / "large").write_bytes(data)
    reply = get(root, "/large")
    assert reply is not None
    assert isinstance(reply.body, bytes) == (size <= WHOLE_BYTES_MAX)
    assert found(root, "/large")[2] == data
    before = len(os.listdir("/proc/self/fd"))
    found(root, "/large", "HEAD")
    found(root, "/large", range="bytes=5-")
    assert len(os.listdir("/proc/self/fd")) == before
