"""A run's results as lines of text, so that they can travel through a job's log.

Ray's job server takes files and gives none back; what it does give, over the same
connection and behind the same token, is a job's log. Each file is one line: a mark and a
JSON object with the path in the run, the SHA-256 and the content. A last line counts them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from desisky_tune.errors import RunError
from desisky_tune.files import leads_inside
from desisky_tune.search.folder import RunFolder

#: How a line of a parcel begins.
MARK = "desisky-tune-parcel "

#: What is fetched of a run: enough to look at it, to rank it and to evaluate it again. Not the
#: trials' own weights, nor what only a resume needs.
RESULTS: tuple[str, ...] = (
    "search.json",
    "features.parquet",
    "ledger.jsonl",
    "finalists.jsonl",
    "out_of_fold.parquet",
    "trials.parquet",
    "curves.parquet",
    "evaluation.json",
    "best/*.eqx",
    "ensemble/*",
    "report/*",
)

#: The files without which a run is not finished.
REQUIRED: tuple[str, ...] = ("search.json", "ledger.jsonl", "evaluation.json")

#: More than a log should carry (bytes).
LARGEST = 64 * 1024**2


def is_result(path: str) -> bool:
    """Return whether a path, relative to the run's folder, is one of `RESULTS`."""
    parts = path.split("/")
    if not leads_inside(path) or any(part.startswith(".") for part in parts):
        return False
    return any(
        len(parts) == pattern.count("/") + 1 and fnmatchcase(path, pattern) for pattern in RESULTS
    )


def require_finished(paths: Iterable[str], where: str) -> list[str]:
    """Return the results among `paths`, sorted.

    Raises
    ------
    RunError
        When it is no run, or one that has no winner yet.
    """
    results = sorted(path for path in paths if is_result(path))
    if "search.json" not in results:
        raise RunError(f"{where} is not a run of desisky-tune: it has no search.json")
    if not set(REQUIRED) <= set(results) or not any(p.endswith(".eqx") for p in results):
        raise RunError(f"{where} has no winner yet: its search has not finished")
    return results


def pack(run_dir: str | Path) -> Iterator[str]:
    """Yield a run's results as lines.

    Raises
    ------
    RunError
        When there is no finished run, or its results are too large for a log.
    """
    folder = RunFolder.open(run_dir).path
    paths = require_finished(
        (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()), str(folder)
    )
    size = sum((folder / path).stat().st_size for path in paths)
    if size > LARGEST:
        raise RunError(
            f"{folder}: {size // 1024**2} MiB of results are too much for a job's log; "
            "fetch them from the folder itself with --runs"
        )
    for path in paths:
        content = (folder / path).read_bytes()
        yield MARK + json.dumps(
            {
                "path": path,
                "sha256": hashlib.sha256(content).hexdigest(),
                "content": base64.b64encode(zlib.compress(content)).decode(),
            }
        )
    yield MARK + json.dumps({"files": len(paths)})


def unpack(log: str) -> dict[str, bytes]:
    """Return the files of a parcel from the log that it travelled in.

    Parameters
    ----------
    log
        With other lines before, between and after.

    Returns
    -------
    dict
        Content by path in the run's folder. Paths are checked: none leads out of it.

    Raises
    ------
    RunError
        When a line is damaged, a file is missing, or a path is none of `RESULTS`.
    """
    files: dict[str, bytes] = {}
    expected = None
    for line in log.splitlines():
        if not line.startswith(MARK):
            continue
        try:
            entry = json.loads(line[len(MARK) :])
            if "files" in entry:
                expected = int(entry["files"])
                continue
            path = str(entry["path"])
            inflate = zlib.decompressobj()
            content = inflate.decompress(base64.b64decode(entry["content"]), LARGEST)
            whole = hashlib.sha256(content).hexdigest() == entry["sha256"]
        except (ValueError, KeyError, TypeError, binascii.Error, zlib.error) as error:
            raise RunError(f"the results arrived damaged: {error}") from error
        if not whole or not is_result(path):
            what = "is no result of a run" if whole else "does not have the checksum it left with"
            raise RunError(f"the results arrived damaged: {path!r} {what}")
        files[path] = content
    if expected is None or len(files) != expected:
        raise RunError(
            f"the results arrived damaged: {len(files)} files of "
            f"{'an unknown number' if expected is None else expected}"
        )
    return files
