"""Files here or elsewhere, by path or URL: opened, listed, written, and tried again where a network fails.

http(s) is read in ranges by Python itself; any other scheme through fsspec, by the package that it names: hf:// (it is
there), s3:// (s3fs), gs:// (gcsfs), abfs:// (adlfs), file://. Keys and endpoints are those of that package, from its
environment variables. Nothing here remembers a connection, so a worker may be forked at any time.
"""

import glob
import http.client
import io
import os
import re
import secrets
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from common.errors import DataError, UnreachableDataError, first_line

BLOCK = 2**20  # bytes that are asked for at once
WAITS = (1, 4, 10)  # seconds before each further try
TIMEOUT = 60  # seconds without an answer
ABSENT = (FileNotFoundError, PermissionError)  # S3 says the latter of what isn't there, to whom it shows no lists


def is_url(place):
    return "://" in str(place)


def is_pattern(place):
    """Whether it names several files: numbers or words in braces, or a glob. A path that exists is that path."""
    return bool(_special(place).search(place)) and not os.path.exists(place)


def join(folder, name):
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def parent_of(place):
    """The folder of a file or of a pattern of files: what comes before the first folder with a pattern in it."""
    return _special(place).split(place)[0].rpartition("/")[0] or ("/" if place[0] == "/" else ".")


def _special(place):
    """What makes a pattern of it; a web server can't be asked for a glob, and its URLs have a ? of another meaning."""
    return re.compile(r"[{]" if is_web(place) else r"[*?{\[]")


def expand(pattern):
    """What a pattern with {000..123} or {a,b} in it names, in order, as webdataset and bash spell it."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    low, dots, high = found[1].partition("..")
    if dots and low.isdecimal() and high.isdecimal() and int(low) <= int(high):
        width = max(len(low), len(high)) if "0" in (low[0], high[0]) else 0
        words = [str(number).zfill(width) for number in range(int(low), int(high) + 1)]
    elif "," in found[1]:
        words = found[1].split(",")
    else:
        raise DataError(f"--data_dir {pattern}: {found[0]} is neither {{first..last}} nor {{one,other}}.")
    rest = expand(pattern[found.end() :])
    return [pattern[: found.start()] + word + tail for word in words for tail in rest]


def matching(pattern):
    """The sorted paths or URLs of a glob. Of a URL: raises UnreachableDataError where it can't be listed."""
    if not is_url(pattern):
        return sorted(glob.glob(pattern))
    if is_web(pattern):
        raise UnreachableDataError(
            f"{pattern}: a web server lists no files; name them, such as shards/{{00000..01023}}.tar, or an index by "
            "--shard_index."
        )
    files, path = _filesystem(pattern)
    return sorted(map(files.unstrip_protocol, persistently(pattern, lambda: files.glob(path))))


def open_file(place):
    """A binary file, buffered and seekable, of a path or URL."""
    if not is_url(place):
        return open(place, "rb")
    if is_web(place):
        return io.BufferedReader(WebFile(place), BLOCK)
    files, path = _filesystem(place)
    return files.open(path, "rb", block_size=BLOCK, cache_type="readahead")


def read_file(place):
    """The bytes of a small file, None where there is none."""

    def read():
        with open_file(place) as file:
            return file.read()

    try:
        return persistently(place, read)
    except FileNotFoundError:
        return None
    except PermissionError:
        if is_url(place):
            return None
        raise


def write_file(place, content):
    """Write bytes; a local file is there once it is whole. Raises OSError, or UnreachableDataError of a URL."""
    if not is_url(place):
        temporary = Path(place).with_name(f".{Path(place).name}.{secrets.token_hex(4)}.tmp")  # of several machines
        temporary.write_bytes(content)
        os.replace(temporary, place)
        return
    if is_web(place):
        raise UnreachableDataError(f"{place} can't be written: a web server takes no files.")
    files, path = _filesystem(place)
    try:
        with files.open(path, "wb") as file:
            file.write(content)
    except Exception as error:  # whatever the package of its scheme raises
        raise UnreachableDataError(f"{place} can't be written ({_why(error)}).") from None


def persistently(place, do):
    """What do() returns, which reads `place`; of a URL it is tried again, after each of WAITS, where a network fails.

    What it is that was read is no fault of a network: ValueError and TarError come through, as does FileNotFoundError.
    """
    if not is_url(place):
        return do()
    for wait in (*WAITS, None):
        try:
            return do()
        except (ValueError, tarfile.TarError, *ABSENT):
            raise
        except Exception as error:  # whatever the package of its scheme raises
            if wait is None:
                tries = len(WAITS) + 1
                raise UnreachableDataError(f"{place} can't be read, tried {tries} times ({_why(error)}).") from None
            time.sleep(wait)


def is_web(place):
    return place.startswith(("http://", "https://"))


def _why(error):
    return f"{type(error).__name__}: {first_line(error)}"


def _filesystem(url):
    """(fsspec's file system, the path in it) of a URL."""
    import fsspec  # here, because few runs need it

    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:  # a scheme that nobody knows, a package that isn't installed
        raise UnreachableDataError(f"{url} can't be opened ({first_line(error)}).") from None


class WebFile(io.RawIOBase):
    """A file on a web server that gives parts of files, each of which is asked for when it is read."""

    def __init__(self, url):
        self.url, self.place, self._size = url, 0, None

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.place

    def seek(self, offset, whence=os.SEEK_SET):
        from_there = {os.SEEK_SET: 0, os.SEEK_CUR: self.place}
        self.place = offset + (self.size() if whence == os.SEEK_END else from_there[whence])
        return self.place

    def size(self):
        if self._size is None:
            self._get(0, 1)
        return self._size

    def readinto(self, buffer):
        content = self._get(self.place, len(buffer)) if len(buffer) else b""
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)

    def _get(self, first, length):
        """Up to `length` bytes from byte `first` on; none behind the end."""
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={first}-{first + length - 1}"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
                if answer.status != 206 or not part or int(part[1]) != first:
                    content = b"" if first else answer.read(length + 1)  # a small file may come whole
                    if first or len(content) > length:
                        raise UnreachableDataError(f"{self.url}: its server gives no parts of files (HTTP ranges).")
                    self._size = len(content)
                    return content
                self._size = int(part[2])
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 416:  # it ends before
                total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
                self._size = int(total[1]) if total else first
                return b""
            if error.code in (404, 410):
                raise FileNotFoundError(error.code, error.reason, self.url) from None
            if error.code in (401, 403):
                raise PermissionError(error.code, error.reason, self.url) from None
            raise
        except http.client.HTTPException as error:
            raise OSError(_why(error)) from None
