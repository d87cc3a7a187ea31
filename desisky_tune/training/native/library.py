"""The native core as a shared library: compiled once per machine and version, kept in the cache.

Like any jitted program it is made for the processor that it runs on, at its first use. Where no C
compiler is found, and nothing was compiled before, `library` gives None and XLA trains.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import threading
from contextlib import suppress
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from desisky_tune.errors import StorageError
from desisky_tune.files import atomic_path

#: Square roots need no errno, which would keep them out of vectors.
FLAGS = (
    "-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno",
    "-shared", "-fPIC",
)  # fmt: skip

#: Seconds that a compile may take (it takes two).
PATIENCE = 120


class NoLibraryError(Exception):
    """The native core cannot be had here; the message says why."""


_ONE_AT_A_TIME = threading.Lock()


def library() -> ctypes.CDLL | None:
    """Return the compiled core, or None where it cannot be had."""
    with _ONE_AT_A_TIME:
        return _library()


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    try:
        return _load()
    except NoLibraryError:
        return None


def make_ready() -> None:
    """Compile the core, where it has to be, beside what the caller does next."""

    def compile_it() -> None:
        with suppress(Exception):  # who asks for the core will hear of it
            library()

    threading.Thread(target=compile_it, name="native core").start()


def missing_because() -> str | None:
    """Say in one line why there is no native core; None where there is one."""
    if library() is not None:
        return None
    try:
        _load()
    except NoLibraryError as reason:
        return str(reason)
    return None


def cache_folder() -> Path:
    """Return where compiled cores are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "desisky_tune" / "native"


def _load() -> ctypes.CDLL:
    source = files("desisky_tune.training.native").joinpath("training.c").read_bytes()
    path = cache_folder() / f"{_fingerprint(source)}.so"
    try:
        if not path.exists():
            with atomic_path(path) as temporary:
                _compile(source, temporary)
        core = ctypes.CDLL(str(path))
    except (StorageError, OSError) as error:
        raise NoLibraryError(f"{path}: {error}") from error
    core.parameter_count.restype = core.train.restype = ctypes.c_int64
    core.parameter_count.argtypes = [ctypes.c_int64] * 4
    core.train.argtypes = [ctypes.c_void_p]
    return core


def _compile(source: bytes, out: Path) -> None:
    compiler = os.environ.get("CC") or next(
        filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None
    )
    if compiler is None:
        raise NoLibraryError("no C compiler was found (cc, gcc, clang, or CC in the environment)")
    command = [*compiler.split(), *FLAGS, "-x", "c", "-", "-o", str(out), "-lm"]
    try:
        done = subprocess.run(command, input=source, capture_output=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoLibraryError(f"{compiler} did not run: {error}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise NoLibraryError(f"{compiler} failed: {lines[0]}")


def _fingerprint(source: bytes) -> str:
    """Name the library after all that it depends on: a home may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    except OSError:
        features = [platform.processor()]
    parts = [*FLAGS, platform.system(), platform.machine(), *features]
    return hashlib.sha256(source + "\n".join(parts).encode()).hexdigest()[:32]
