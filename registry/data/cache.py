"""What was made of a large file is kept in a folder, and is there at once the next time.

Two kinds of files lie in the folder. Each is written whole or not at all; one that is cut short or made otherwise is as
good as none, and is made again.

- `features-….safetensors`: what was read, as `mapped` writes it.
- `hash-….json`: the SHA-256 that a file had when it was so large and changed last then, since hashing a file takes
  longer than finding what is kept of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from .mapped import read_mapped, size_of, sweep, write_mapped, write_whole

WORTH_KEEPING = 32 << 20
"""bytes; what is smaller is read within a blink and not kept"""

SPARE = 1 << 30
"""bytes of the disk that are left to others"""


class Cache:
    """What is kept of one file; nothing is, where there is no folder or the file is small.

    Args:
        folder: where it is kept; it need not exist.
        path: the file.
        variant: what else decides the content, fit for a file name; variants are kept side by side.
        version: of the content's format; another one is never used.
    """

    def __init__(self, folder: Path | None, path: Path, *, variant: str, version: int) -> None:
        self.path = path
        self.variant = variant
        self.version = version
        self._stamp = stamp(path)
        self._folder = folder if self._stamp and self._stamp["size"] >= WORTH_KEEPING else None

    def sha256(self) -> str | None:
        """Return the file's SHA-256 if it is remembered and the file has not been touched since."""
        known = self._remembered()
        return known["sha256"] if known and known["file"] == self._stamp else None

    def load(self, sha256: str) -> dict[str, Any] | None:
        """Return what was kept of the content of this hash, as it was given to `save`, or None.

        Arrays can be written to; what is written stays in this process.
        """
        if self._folder is None:
            return None
        try:
            content = read_mapped(self._kept(sha256), self._key(sha256))
        except Exception:  # not there, or damaged, which can make any step fail
            return None
        if self.sha256() != sha256:
            with suppress(OSError):
                self._remember(sha256)
        return content

    def save(self, sha256: str, content: dict[str, Any]) -> int:
        """Keep what was made of the file, and its hash; return the size in bytes, 0 where it is not kept.

        What cannot be kept is made again the next time: a full disk or a folder that cannot be written is no fault.

        Args:
            sha256: the file's, taken after this object was made.
            content: as for `write_mapped`.
        """
        if self._folder is None or stamp(self.path) != self._stamp:  # perhaps it changed between hashing and reading
            return 0
        size = size_of(content)
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            sweep(self._folder)
            self._remember(sha256)
            if shutil.disk_usage(self._folder).free >= size + SPARE:
                write_mapped(self._kept(sha256), content, self._key(sha256))
                return size
        return 0

    def _kept(self, sha256: str) -> Path:
        assert self._folder is not None
        return self._folder / f"features-{sha256[:24]}-{self.variant}.safetensors"

    def _key(self, sha256: str) -> list[Any]:
        return [self.version, sha256, self.variant]

    def _memo(self) -> Path:
        assert self._folder is not None
        assert self._stamp is not None
        return self._folder / f"hash-{hashlib.sha256(self._stamp['path'].encode()).hexdigest()[:24]}.json"

    def _remembered(self) -> dict[str, Any] | None:
        """Return what is remembered of the path: its `sha256` and its stamp at that time, `file`."""
        if self._folder is None:
            return None
        try:
            known = json.loads(self._memo().read_text("utf-8"))
            return known if "file" in known and re.fullmatch("[0-9a-f]{64}", known["sha256"]) else None
        except Exception:  # not there, or damaged
            return None

    def _remember(self, sha256: str) -> None:
        """Remember the hash, and drop what was kept of the path's former content: files are large."""
        assert self._folder is not None
        if stamp(self.path) != self._stamp:
            return
        before = self._remembered()
        write_whole(self._memo(), [json.dumps({"file": self._stamp, "sha256": sha256}).encode()])
        if before and before["sha256"] != sha256:
            for former in self._folder.glob(f"features-{before['sha256'][:24]}-*.safetensors"):
                former.unlink(missing_ok=True)


def stamp(path: Path) -> dict[str, Any] | None:
    """Return what tells whether a file is as it was, None where it cannot be said."""
    try:
        found, place = path.stat(), os.fsencode(path.resolve()).decode("utf-8", "backslashreplace")
    except OSError:
        return None
    return {
        "path": place,
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,  # that another file in its place cannot be made to have
        "inode": found.st_ino,
    }
