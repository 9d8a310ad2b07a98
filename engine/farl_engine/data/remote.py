"""Shards on other machines: which a pattern names, and how one is copied into a file, with retries.

http:// and https:// are read with the standard library; s3://, gs://, hf:// and any other scheme through fsspec, with
the credentials and options of its own configuration (`FSSPEC_S3='{"anon": true}'` for public buckets). `pipe:COMMAND`
takes a command's standard output. The command is run without a shell, and patterns come from the command line alone:
nothing that data says is ever fetched or run.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import importlib
import random
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from farl_engine.data.shards import expand_braces

T = TypeVar("T")

PIPE = "pipe:"
ATTEMPTS = 6
FIRST_DELAY = 0.5
_LONGEST_DELAY = 60.0
# A server that is silent for so long has failed.
_TIMEOUT = 60.0
_CHUNK = 4 << 20
_PASSING_STATUS = frozenset({408, 425, 429})
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_GLOB = re.compile(r"[*?\[]")
_LOGIN = re.compile(r"(://[^/@\s:]*):[^/@\s]*@")
_QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\"]*")
# What fsspec's file systems call the version of a file.
_VERSION_KEYS = ("ETag", "etag", "sha256", "blob_id", "md5Hash", "last_commit", "LastModified", "mtime", "created")


class RemoteShardError(ValueError):
    """A remote shard that cannot be had; one line that names it and the cause."""


class _PassingError(Exception):
    """A failure that may be gone at the next try, after `wait` seconds if the server said so."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class StoppedError(Exception):
    """The download was told to stop."""


@dataclass(frozen=True)
class Version:
    """What is known of a remote file without its contents: size in bytes and a tag that changes with it, or None."""

    size: int | None
    tag: str | None


def is_remote(pattern: str) -> bool:
    """Whether a pattern of shards is a URL or a `pipe:` command rather than a path."""
    return pattern.startswith(PIPE) or _SCHEME.match(pattern) is not None


def shown(url: str) -> str:
    """A URL or command for messages and file names, without what may be secret: the password of a login, and the query
    of a web address, which may hold a key."""
    url = _LOGIN.sub(r"\1:...@", url)
    if url.startswith(PIPE):
        return _QUERY.sub(r"\1?...", url)
    address, question, _ = url.partition("?")
    return f"{address}?..." if question and address.startswith(("http://", "https://")) else url


def expand_remote(pattern: str) -> list[str]:
    """URLs that a pattern names: number ranges as in paths; globs where the server can list, so not over http.

    Raises:
        RemoteShardError: nothing matches, or the server cannot be asked.
    """
    urls: list[str] = []
    for url in expand_braces(pattern):
        path = url.partition("://")[2]
        if url.startswith(PIPE) or not (_GLOB.search(path) or path.endswith("/")):
            urls.append(url)
        elif not url.startswith(("http://", "https://")):
            glob = f"{url}*.tar" if url.endswith("/") else url
            matches = with_retries(lambda glob=glob: _glob(glob), url)
            if not matches:
                raise RemoteShardError(f"no shard matches {shown(url)}")
            urls += matches
        elif "*" in path or path.endswith("/"):
            raise RemoteShardError(f"{shown(url)}: web servers have no lists; write a range such as {{00000..00131}}")
        else:
            urls.append(url)
    return urls


def ask(url: str, stop: threading.Event | None = None) -> Version:
    """Size and tag of a remote file; nothing is known of a command's output before it ran.

    Raises:
        RemoteShardError: there is no such file, or it cannot be reached after all retries.
    """
    if url.startswith(PIPE):
        return Version(None, None)
    return with_retries(lambda: _ask_once(url), url, stop)


def download(
    url: str, file: IO[bytes], stop: threading.Event | None = None, on_bytes: Callable[[int], None] | None = None
) -> Version:
    """Copies a remote file into `file`, from its start, and returns what was copied.

    Args:
        stop: when set, the download ends soon with StoppedError.
        on_bytes: told of every piece; negative when a try failed and its bytes count no more.

    Raises:
        RemoteShardError: see `ask`.
        OSError: `file` cannot be written.
    """
    reader = _read_pipe if url.startswith(PIPE) else _read_http if url.startswith(("http:", "https:")) else _read_fsspec

    def copy() -> Version:
        file.seek(0)
        file.truncate()
        written = 0
        try:
            with reader(url) as (stream, version):
                while chunk := _read_chunk(stream):
                    if stop is not None and stop.is_set():
                        raise StoppedError
                    file.write(chunk)
                    written += len(chunk)
                    if on_bytes is not None:
                        on_bytes(len(chunk))
            if version.size not in (None, written):
                raise _PassingError(f"it ended after {written:,} of {version.size:,} bytes")
        except BaseException:
            if on_bytes is not None:
                on_bytes(-written)
            raise
        file.flush()
        return Version(written, version.tag)

    return with_retries(copy, url, stop)


def with_retries(action: Callable[[], T], url: str, stop: threading.Event | None = None) -> T:
    """`action()`, tried a few times with growing, jittered pauses where its failure may pass.

    Raises:
        RemoteShardError: it failed for good, or at every try.
    """
    stop = stop or threading.Event()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except (RemoteShardError, StoppedError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            cause = _cause(error)
            if not _may_pass(error):
                raise RemoteShardError(f"{shown(url)} cannot be fetched: {cause}") from error
            if attempt == ATTEMPTS:
                raise RemoteShardError(f"{shown(url)} cannot be fetched, tried {attempt} times: {cause}") from error
            wait = max(getattr(error, "wait", 0.0), FIRST_DELAY * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        if stop.wait(min(wait, _LONGEST_DELAY)):
            raise StoppedError
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    final = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError, TypeError)
    return isinstance(error, _PassingError) or not isinstance(error, (*final, NotImplementedError))


def _cause(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        error = error.reason if isinstance(error.reason, Exception) else error
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, (_PassingError, ImportError)) else f"{text} ({type(error).__name__})"


def _read_chunk(stream: Any) -> bytes:
    try:
        return stream.read(_CHUNK)
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        # By name, because a failure of the disk must not pass for one of the network.
        raise _PassingError(_cause(error)) from error


@contextlib.contextmanager
def _opened(url: str, method: str) -> Iterator[http.client.HTTPResponse]:
    if "@" in urllib.parse.urlsplit(url).netloc:
        # urllib takes a login for part of the host's name, and asks the network for it.
        raise RemoteShardError(f"{shown(url)} holds a login: leave that to `pipe:curl --netrc ...`")
    # identity: the size must be that of the bytes that come.
    headers = {"User-Agent": "farl-engine", "Accept-Encoding": "identity"}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            said = f"the server says {error.code} {error.reason}"
            if error.code in _PASSING_STATUS or error.code >= 500:
                after = error.headers.get("Retry-After", "")
                raise _PassingError(said, float(after) if after.isdigit() else 0.0) from None
            error_code = error.code
        raise _StatusError(f"{shown(url)} cannot be fetched: {said}", error_code) from None
    except http.client.InvalidURL:
        # What this error says quotes the whole address.
        raise RemoteShardError(f"{shown(url)} is no valid address: write a space as %20") from None
    with response:
        yield response


class _StatusError(RemoteShardError):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _ask_once(url: str) -> Version:
    if not url.startswith(("http:", "https:")):
        system, path = _file_system(url)
        return _version(system.info(path))
    try:
        with _opened(url, "HEAD") as response:
            return _http_version(response)
    except _StatusError as error:
        # Signed addresses are often good for GET alone.
        if error.status not in (403, 405, 501):
            raise
    with _opened(url, "GET") as response:
        return _http_version(response)


def _http_version(response: http.client.HTTPResponse) -> Version:
    length = response.headers.get("Content-Length", "")
    tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
    return Version(int(length) if length.isdigit() else None, tag)


@contextlib.contextmanager
def _read_http(url: str) -> Iterator[tuple[Any, Version]]:
    with _opened(url, "GET") as response:
        yield response, _http_version(response)


@contextlib.contextmanager
def _read_fsspec(url: str) -> Iterator[tuple[Any, Version]]:
    system, path = _file_system(url)
    version = _version(system.info(path))
    # Each read asks for its own range: no cache in between, no second copy of the bytes.
    with system.open(path, "rb", cache_type="none") as stream:
        yield _Translated(stream), version


class _Translated:
    """Reads of a file system whose errors are of any kind; here they are not the disk's."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except Exception as error:
            if _may_pass(error):
                raise _PassingError(_cause(error)) from error
            raise


@contextlib.contextmanager
def _read_pipe(url: str) -> Iterator[tuple[Any, Version]]:
    words = shlex.split(url.removeprefix(PIPE))
    if not words or shutil.which(words[0]) is None:
        raise RemoteShardError(
            f"{shown(url)}: there is no command {words[0] if words else ''!r}; a shell is `sh -c '...'`"
        )
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        try:
            with process.stdout:
                yield process.stdout, Version(None, None)
            if process.wait():
                errors.seek(0)
                said = errors.read().decode(errors="replace").split("\n")
                last = next((line.strip() for line in reversed(said) if line.strip()), "no message")
                raise _PassingError(f"the command ended with code {process.returncode}: {last[:200]}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL and the path in it. Raises RemoteShardError where a package is missing."""
    scheme = url.partition("://")[0]
    try:
        return importlib.import_module("fsspec").url_to_fs(url)
    except ImportError as error:
        raise RemoteShardError(
            f"{scheme}:// needs more packages: pip install 'farl-engine[remote]' ({_cause(error)})"
        ) from None
    except ValueError as error:
        if "Protocol not known" in str(error):
            raise RemoteShardError(
                f"{shown(url)}: nothing reads {scheme}:// here; use http, https, s3, gs or hf"
            ) from None
        raise


def _glob(pattern: str) -> list[str]:
    system, path = _file_system(pattern)
    return [system.unstrip_protocol(match) for match in system.glob(path)]


def _version(info: dict[str, Any]) -> Version:
    tag = next((str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None), None)
    return Version(None if info.get("size") is None else int(info["size"]), tag)
