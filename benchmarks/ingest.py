"""How fast, how lean and how right the way from spectra to a feature table is.

    python benchmarks/ingest.py [--file VAC.fits] [--tenfold] [--repeat 3] [--cpus 2]

Prints the machine, the versions, the command and tables in Markdown:

- seconds from FITS to feature table, Ray's workers cold and warm, cache empty, for all
  rows (every spectrum is read) and for the moonlit ones, with the largest sum of
  proportional set sizes (PSS) over all processes, the object store included;
- with ``--tenfold``, the same for a file of ten times the rows;
- magnitudes beside speclite's;
- contacts and magnitudes of five lunar eclipses beside the published ones.

Without ``--file`` a catalogue of the VAC's size is simulated first. Every repetition
is a fresh process, so that cold means cold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from desisky_tune.data.geometry import configure_offline_iers, umbral_magnitude

SUBSETS = ("all", "moon")

#: UTC of U1, U2, U3, U4 (partial eclipse: U1 and U4) and umbral magnitude, as NASA's
#: catalogue of lunar eclipses gives them.
ECLIPSES: dict[str, tuple[dict[str, str], float]] = {
    "2019-01-21": (
        {"U1": "03:33:54", "U2": "04:41:17", "U3": "05:43:16", "U4": "06:50:39"},
        1.1953,
    ),
    "2021-05-26": (
        {"U1": "09:44:58", "U2": "11:11:25", "U3": "11:25:55", "U4": "12:52:22"},
        1.0095,
    ),
    "2021-11-19": ({"U1": "07:18:41", "U4": "10:47:04"}, 0.9742),
    "2022-05-16": (
        {"U1": "02:27:53", "U2": "03:29:03", "U3": "04:53:56", "U4": "05:55:07"},
        1.4137,
    ),
    "2022-11-08": (
        {"U1": "09:09:12", "U2": "10:16:39", "U3": "11:41:37", "U4": "12:49:03"},
        1.3589,
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(description="Benchmark of the ingest.")
    parser.add_argument("--file", type=Path, help="a catalogue (default: one is simulated)")
    parser.add_argument("--exposures", type=int, default=9176, help="rows of a simulated one")
    parser.add_argument("--tenfold", action="store_true", help="also ten times the rows")
    parser.add_argument("--repeat", type=int, default=3, help="fresh processes per figure")
    parser.add_argument("--cpus", type=int, default=2, help="cores that Ray may use")
    parser.add_argument("--folder", type=Path, help="for the files made here")
    parser.add_argument("--measure", metavar="SUBSET", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.file, options.measure, options.cpus)))
        return
    print(describe_machine(options.cpus))
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        file = options.file or simulate(Path(scratch) / "vac.fits", options.exposures)
        rows = [timing_row(file, subset, options) for subset in SUBSETS]
        if options.tenfold:
            tenfold = repeat_rows(file, Path(scratch) / "tenfold.fits", times=10)
            rows += [timing_row(tenfold, subset, options) for subset in SUBSETS]
        header = ("rows x pixels", "subset", "cold s", "warm s", "cached s", "peak PSS GiB", "out")
        print_table("From FITS to feature table", header, rows)
        print_table("Photometry", ("band", "largest difference from speclite, mag"), bands(file))
    print_table(
        "Eclipses",
        ("eclipse", "contacts: computed - published, s", "magnitude", "published"),
        eclipses(),
    )


def describe_machine(cpus: int) -> str:
    """Return the machine, the versions and the command, as lines of text."""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    packages = ("ray", "astropy", "pyarrow", "numpy", "pandas", "speclite")
    return "\n".join(
        (
            f"machine: {model}, {os.cpu_count()} cores, {cpus} given to Ray",
            f"python {platform.python_version()}, "
            + ", ".join(f"{name} {version(name)}" for name in packages),
            f"command: python {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
        )
    )


def simulate(path: Path, exposures: int) -> Path:
    """Make a catalogue of the VAC's layout."""
    from desisky_tune.data import simulate_vac

    begun = time.perf_counter()
    simulate_vac(path, exposures=exposures, seed=0)
    print(f"simulated {exposures} exposures in {time.perf_counter() - begun:.1f} s")
    return path


def repeat_rows(file: Path, path: Path, times: int) -> Path:
    """Write a file with every row `times` times; only the EXPIDs are made different."""
    from astropy.io import fits

    with fits.open(file, memmap=True) as hdus:
        flux, table = hdus["FLUX"], hdus["METADATA"]
        rows, width = flux.shape
        metadata = np.concatenate([np.asarray(table.data)] * times)
        numbers = np.asarray(table.data["EXPID"], dtype=np.int64)
        metadata["EXPID"] = np.concatenate([numbers + i * 10_000_000 for i in range(times)])
        wavelength = fits.ImageHDU(hdus["WAVELENGTH"].data, name="WAVELENGTH")
        fits.HDUList([fits.PrimaryHDU(), wavelength]).writeto(path)
        header = fits.ImageHDU(np.zeros((1, 1), ">f4"), name="FLUX").header
        header["NAXIS1"], header["NAXIS2"] = width, rows * times
        with open(path, "ab") as stream:
            stream.write(header.tostring().encode("ascii"))
            for _ in range(times):
                for start in range(0, rows, 512):
                    piece = np.asarray(flux.section[start : start + 512], dtype=">f4")
                    stream.write(piece.tobytes())
            stream.write(b"\0" * (-rows * times * width * 4 % 2880))
        fits.append(path, metadata, header=fits.Header({"EXTNAME": "METADATA"}))
    return path


def timing_row(file: Path, subset: str, options: argparse.Namespace) -> tuple[Any, ...]:
    """Measure one file and subset in fresh processes; medians, and the largest memory."""
    command = [sys.executable, __file__, "--file", str(file), "--measure", subset]
    command += ["--cpus", str(options.cpus)]
    results = []
    for _ in range(options.repeat):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    medians = (statistics.median(r[name] for r in results) for name in ("cold", "warm", "cached"))
    peak = max(r["peak_pss"] for r in results) / 2**30
    return (
        results[0]["shape"],
        subset,
        *(f"{seconds:.2f}" for seconds in medians),
        f"{peak:.2f}",
        results[0]["rows"],
    )


def measure(file: Path, subset: str, cpus: int) -> dict[str, Any]:
    """Load a file cold (Ray's start included), warm, and from the cache."""
    from desisky_tune.data import SpectraFile, load_features
    from desisky_tune.ray_session import ray_session

    layout = SpectraFile.open(file)
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as memory:

        def timed(cache: str) -> tuple[float, Any]:
            begun = time.perf_counter()
            table = load_features(file, subset, cache_dir=Path(folder) / cache)
            return time.perf_counter() - begun, table

        begun = time.perf_counter()
        with ray_session(num_cpus=cpus):
            started = time.perf_counter() - begun
            cold, _ = timed("one")
            warm, table = timed("two")
            cached, _ = timed("two")
    return {
        "shape": f"{layout.rows} x {len(layout.wavelength)}",
        "cold": started + cold,
        "warm": warm,
        "cached": cached,
        "rows": len(table.frame),
        "peak_pss": memory.peak,
    }


class PeakMemory:
    """Samples the summed PSS of this process and all below it (Linux), in bytes."""

    def __init__(self, interval: float = 0.1) -> None:
        self.peak = 0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self.peak = max(self.peak, sum(map(pss, descendants(os.getpid()))))


def descendants(root: int) -> list[int]:
    """Return a process and all that it started, directly or not."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it ended meanwhile
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    family = [root]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


def pss(process: int) -> int:
    """Return the proportional set size of a process, in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def bands(file: Path, sample: int = 200) -> list[tuple[str, str]]:
    """Compare magnitudes with speclite's, spectrum by spectrum."""
    import astropy.units as u
    from speclite.filters import load_filters

    from desisky_tune.data import BANDS, SpectraFile, magnitudes
    from desisky_tune.data.photometry import FILTERS

    catalogue = SpectraFile.open(file)
    rows = np.unique(np.linspace(0, catalogue.rows - 1, sample).astype(int))
    flux = catalogue.flux(rows)
    ours = magnitudes(flux, catalogue.wavelength)
    filters = load_filters(*(FILTERS[band] for band in BANDS))
    grid = catalogue.wavelength * u.AA
    theirs = np.empty_like(ours)
    for row, spectrum in enumerate(flux.astype(np.float64)):
        padded, longer = filters.pad_spectrum(
            spectrum * 1e-17 * u.erg / (u.s * u.cm**2 * u.AA), grid, method="zero"
        )
        table = filters.get_ab_magnitudes(padded, longer)
        theirs[row] = [table[FILTERS[band]][0] for band in BANDS]
    worst = np.nanmax(np.abs(ours - theirs), axis=0)
    return [(band, f"{value:.1e}") for band, value in zip(BANDS, worst, strict=True)]


def eclipses() -> list[tuple[str, ...]]:
    """Compare contacts and magnitudes with the published ones."""
    configure_offline_iers()
    return [eclipse_row(day, *published) for day, published in ECLIPSES.items()]


def eclipse_row(day: str, contacts: dict[str, str], magnitude: float) -> tuple[str, ...]:
    """Find the contacts and the greatest magnitude of one eclipse."""
    from scipy.optimize import brentq, minimize_scalar

    midnight = int((np.datetime64(day) - np.datetime64("1858-11-17")) / np.timedelta64(1, "D"))

    def at(mjd: float) -> float:
        return float(umbral_magnitude(np.array([mjd]))[0])

    differences = []
    for name, clock in contacts.items():
        published = midnight + day_fraction(clock)
        level = 0.0 if name in ("U1", "U4") else 1.0
        crossing = crossing_of(at, level, published, brentq)
        differences.append(f"{name} {(crossing - published) * 86400:+.0f}")
    between = tuple(midnight + day_fraction(contacts[name]) for name in ("U1", "U4"))
    greatest = minimize_scalar(lambda t: -at(t), bounds=between, method="bounded")
    return day, ", ".join(differences), f"{-greatest.fun:.4f}", f"{magnitude:.4f}"


def day_fraction(clock: str) -> float:
    """Return hh:mm:ss as a fraction of a day."""
    hours, minutes, seconds = map(int, clock.split(":"))
    return (hours * 3600 + minutes * 60 + seconds) / 86400


def crossing_of(at: Callable[[float], float], level: float, near: float, solve: Any) -> float:
    """Return when the magnitude crosses a level, within four minutes of a time."""
    window = 4 / 1440
    return float(solve(lambda t: at(t) - level, near - window, near + window, xtol=1e-7))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table."""
    print(f"\n**{title}**\n")
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
