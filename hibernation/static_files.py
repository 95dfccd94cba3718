"""Files of a folder over HTTP: `static = "public"` on the main party (S26).

Owns which file a path means, and that nothing else is ever opened; what conditional and partial requests get.
Must not know links or Quart. Peer: `hibernation.exchanges`.

A path is taken apart at its slashes after percent-decoding, and each part is opened beneath the one before,
following no symbolic link, so whatever a path says, and whatever changes meanwhile, it stays in the folder.
Parts that begin with a dot are not there, but for `.well-known` (RFC 8615).
"""

import mimetypes
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import trio
from werkzeug.http import (
    http_date,
    parse_date,
    parse_etags,
    parse_if_range_header,
    parse_range_header,
)

from hibernation.replies import Reply

__all__ = ["StaticFiles"]

#: A smaller file is read at once, on the loop; a larger one in pieces, on a thread.
WHOLE_BYTES_MAX: Final = 256 * 1024
PIECE_BYTES: Final = 256 * 1024
INDEX: Final = "index.html"

_FOLDER_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_TEXT_TYPES: Final = ("application/javascript", "application/json", "image/svg+xml")


class StaticFiles:
    """The files of one folder.

    Args:
        root: The folder; itself it may be a symbolic link.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def answer(
        self, method: str, path: str, raw_path: str, query: bytes, headers: Sequence[tuple[str, str]]
    ) -> Reply | None:
        """Answer a request if the folder has what it asks for; None if it has not.

        Args:
            method: GET and HEAD give the file; others are 405.
            path: Percent-decoded.
            raw_path: As it was sent, for a redirect.
            query: The same.
            headers: Lower-case names and values.
        """
        parts = path.split("/")
        if len(parts) < 2 or parts[0] or "\\" in path or "\0" in path:
            return None
        names = parts[1:]
        if names[-1] == "":
            names[-1] = INDEX
        if any(not _may_be_seen(name, first=number == 0) for number, name in enumerate(names)):
            return None
        found = self._open(names)
        if found is None:
            return None
        descriptor, facts = found
        if stat.S_ISDIR(facts.st_mode):
            os.close(descriptor)
            inside = self._open([*names, INDEX])
            if inside is None:
                return None
            os.close(inside[0])
            if not stat.S_ISREG(inside[1].st_mode):
                return None
            target = f"{raw_path}/" + (f"?{query.decode('ascii', 'replace')}" if query else "")
            return Reply(308, [("location", target)], b"")
        if not stat.S_ISREG(facts.st_mode):
            os.close(descriptor)
            return None
        if method not in ("GET", "HEAD"):
            os.close(descriptor)
            return Reply(405, [("allow", "GET, HEAD"), _PLAIN], b"a file answers GET and HEAD\n")
        return _file_reply(method, names[-1], descriptor, facts, dict(headers))

    def _open(self, names: Sequence[str]) -> tuple[int, os.stat_result] | None:
        """Open what these names lead to, one beneath the other."""
        try:
            folder = os.open(self._root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for name in names[:-1]:
                    inner = os.open(name, _FOLDER_FLAGS, dir_fd=folder)
                    os.close(folder)
                    folder = inner
                descriptor = os.open(names[-1], _FILE_FLAGS, dir_fd=folder)
            finally:
                os.close(folder)
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return None
        return descriptor, os.fstat(descriptor)


_PLAIN: Final = ("content-type", "text/plain; charset=utf-8")


def _may_be_seen(name: str, *, first: bool) -> bool:
    return bool(name) and (not name.startswith(".") or (first and name == ".well-known"))


def _file_reply(
    method: str, name: str, descriptor: int, facts: os.stat_result, headers: Mapping[str, str]
) -> Reply:
    """The answer that the file, the conditions and the range of the request make (RFC 9110, 13 and 14)."""
    size, modified = facts.st_size, int(facts.st_mtime)
    tag = f"{facts.st_mtime_ns:x}-{size:x}"
    common = [
        ("etag", f'"{tag}"'),
        ("last-modified", http_date(modified)),
        ("cache-control", "no-cache"),
        ("x-content-type-options", "nosniff"),
        ("accept-ranges", "bytes"),
    ]
    status = _precondition(tag, modified, headers)
    if status:
        os.close(descriptor)
        return Reply(status, common)
    common.append(("content-type", _type_of(name)))
    start, stop, status = 0, size, 200
    if method == "GET" and "range" in headers and _range_counts(tag, modified, headers):
        wanted = parse_range_header(headers["range"])
        if wanted is not None and wanted.units == "bytes" and len(wanted.ranges) == 1:
            span = wanted.range_for_length(size)
            if span is None:
                os.close(descriptor)
                return Reply(416, [*common, ("content-range", f"bytes */{size}")])
            (start, stop), status = span, 206
            common.append(("content-range", f"bytes {start}-{stop - 1}/{size}"))
    common.append(("content-length", str(stop - start)))
    if method == "HEAD":
        os.close(descriptor)
        return Reply(status, common)
    if stop - start > WHOLE_BYTES_MAX:
        return Reply(status, common, _Pieces(descriptor, start, stop))
    try:
        return Reply(status, common, os.pread(descriptor, stop - start, start))
    finally:
        os.close(descriptor)


def _precondition(tag: str, modified: int, headers: Mapping[str, str]) -> int:
    """The status that the conditions of a request come to; 0 if it goes on (RFC 9110, 13.2.2)."""
    if "if-match" in headers:
        if not parse_etags(headers["if-match"]).contains(tag):
            return 412
    elif "if-unmodified-since" in headers:
        since = parse_date(headers["if-unmodified-since"])
        if since is not None and modified > since.timestamp():
            return 412
    if "if-none-match" in headers:
        return 304 if parse_etags(headers["if-none-match"]).contains_weak(tag) else 0
    if "if-modified-since" in headers:
        since = parse_date(headers["if-modified-since"])
        if since is not None and modified <= since.timestamp():
            return 304
    return 0


def _range_counts(tag: str, modified: int, headers: Mapping[str, str]) -> bool:
    """Whether the client has a part of this very file (RFC 9110, 13.1.5)."""
    if "if-range" not in headers:
        return True
    known = parse_if_range_header(headers["if-range"])
    if known.date is not None:
        return known.date.timestamp() == modified
    return known.etag == tag and not headers["if-range"].startswith("W/")


def _type_of(name: str) -> str:
    kind, encoding = mimetypes.guess_type(name)
    if kind is None or encoding is not None:
        return "application/octet-stream"
    return f"{kind}; charset=utf-8" if kind.startswith("text/") or kind in _TEXT_TYPES else kind


class _Pieces:
    """A file's bytes from `start` to `stop`; closes it."""

    def __init__(self, descriptor: int, start: int, stop: int) -> None:
        self._descriptor = descriptor
        self._at = start
        self._stop = stop

    def __aiter__(self) -> "_Pieces":
        return self

    async def __anext__(self) -> bytes:
        count = min(PIECE_BYTES, self._stop - self._at)
        if not count:
            raise StopAsyncIteration
        piece = await trio.to_thread.run_sync(os.pread, self._descriptor, count, self._at)
        if not piece:
            raise OSError("the file has become shorter while it was sent")
        self._at += len(piece)
        return piece

    async def aclose(self) -> None:
        """No more is wanted."""
        await trio.lowlevel.checkpoint()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
