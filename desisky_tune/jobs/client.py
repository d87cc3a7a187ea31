"""The cluster as its job server shows it: Ray's client, with answers that a person can act on."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from desisky_tune.errors import ClusterError
from desisky_tune.ray_session import HOW_TO_SEND_A_TOKEN

#: Where the dashboard is when nothing else is said: at the near end of an SSH tunnel.
DEFAULT_ADDRESS = "http://127.0.0.1:8265"

#: What Ray takes an address from, in this order; the first counts for `--address` left out.
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

#: Job states from which nothing follows.
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")

#: The key of a job's metadata that marks a search of ours, with the version that submitted it.
MARK = "desisky_tune"

_POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """A job of a cluster.

    Attributes
    ----------
    id
        As Ray knows it.
    status
        ``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED`` or ``STOPPED``.
    message
        What Ray says of the status.
    metadata
        What was recorded at submission: ``name``, ``space``, ``runs``, ``data``, ...
    started, ended
        Unix time (s); None where it has not come to that.
    """

    id: str
    status: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    started: float | None = None
    ended: float | None = None

    @property
    def name(self) -> str:
        """The run's name; empty for a job that is no search of ours."""
        return self.metadata.get("name", "")

    @property
    def has_ended(self) -> bool:
        """Whether it is over, one way or another."""
        return self.status in ENDED


class Cluster:
    """A Ray cluster, reached through its dashboard.

    Parameters
    ----------
    address
        ``http://HOST:PORT`` of the dashboard (``https`` behind a proxy). By default that of
        the environment (``RAY_API_SERVER_ADDRESS``, ``RAY_ADDRESS``), else
        `DEFAULT_ADDRESS`.

    Raises
    ------
    ClusterError
        When nothing answers there, it is no dashboard, or it wants another token.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = dashboard_address(address)
        _send_token()
        with _explained(self.address), _address_from_us():
            from ray.job_submission import JobSubmissionClient

            _quiet()
            self._client = JobSubmissionClient(self.address)

    def submit(
        self, entrypoint: str, *, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> str:
        """Start a job; return its id."""
        with _explained(self.address):
            return str(
                self._client.submit_job(
                    entrypoint=entrypoint, runtime_env=dict(runtime_env), metadata=dict(metadata)
                )
            )

    def job(self, id: str) -> Job:
        """Return a job by its id."""
        with _explained(self.address):
            return _job(self._client.get_job_info(id))

    def jobs(self) -> list[Job]:
        """Return the searches that were submitted, the newest first."""
        with _explained(self.address):
            found = self._client.list_jobs()
        jobs = [_job(detail) for detail in found if detail.submission_id]
        ours = [job for job in jobs if MARK in job.metadata and job.name]
        return sorted(ours, key=lambda job: job.started or 0.0, reverse=True)

    def known(self, job: str) -> Job | None:
        """Return what `find` does; None where there is no such search."""
        found = [each for each in self.jobs() if job in (each.id, each.name)]
        # Of one name, what goes on counts before what came to nothing after it.
        return min(found, key=lambda each: each.has_ended, default=None)

    def find(self, job: str) -> Job:
        """Return a search by its job's id or by the name of its run.

        Of several of that name it is the newest that has not ended, else the newest.

        Raises
        ------
        ClusterError
            When there is none.
        """
        found = self.known(job)
        if found is not None:
            return found
        names = ", ".join(dict.fromkeys(each.name for each in self.jobs()[:10]))
        raise ClusterError(
            f"{self.address} has no job {job!r}"
            + (f"; it has {names}" if names else ": no search was submitted there")
        )

    def log(self, id: str) -> str:
        """Return all that a job has written so far."""
        with _explained(self.address):
            return str(self._client.get_job_logs(id))

    def follow(self, id: str) -> Iterator[str]:
        """Yield the lines of a job's log, from its beginning, as they come, until it ends."""
        loop = asyncio.new_event_loop()
        # Ray's annotation says iterator; what it returns is an async generator.
        chunks: Any = self._client.tail_job_logs(id)
        rest = ""
        coming: asyncio.Future[str] | None = None
        try:
            while True:
                coming = asyncio.ensure_future(anext(chunks), loop=loop)
                try:
                    with _explained(self.address):
                        chunk = loop.run_until_complete(coming)
                except StopAsyncIteration:
                    break
                *lines, rest = (rest + chunk).split("\n")
                yield from lines
            if rest:
                yield rest
        finally:
            if coming is not None and not coming.done():  # Ctrl-C
                coming.cancel()
                with suppress(asyncio.CancelledError):
                    loop.run_until_complete(coming)
            loop.run_until_complete(chunks.aclose())
            loop.close()

    def wait(self, id: str, *, timeout: float) -> Job:
        """Wait until a job has ended.

        Raises
        ------
        ClusterError
            When it has not after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            job = self.job(id)
            if job.has_ended:
                return job
            if time.monotonic() > deadline:
                raise ClusterError(f"job {id} is {job.status} after {timeout:g} s")
            time.sleep(_POLL_S)

    def stop(self, id: str) -> bool:
        """Ask a job to end; return False where it had ended already."""
        with _explained(self.address):
            return bool(self._client.stop_job(id))

    def forget(self, id: str) -> None:
        """Take a job that has ended off the cluster's list."""
        with _explained(self.address):
            self._client.delete_job(id)


def dashboard_address(address: str | None) -> str:
    """Return the address of a dashboard as a URL without a path.

    Raises
    ------
    ClusterError
        When it is no HTTP address, such as the one of Ray's own protocol.
    """
    given = address or next(
        (os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), DEFAULT_ADDRESS
    )
    url = given if "://" in given else f"http://{given}"
    if not re.fullmatch(r"https?://[A-Za-z0-9._\[\]:-]+/*", url) or url.count(":") < 2:
        raise ClusterError(
            f"address {given!r}: the dashboard's is wanted, such as {DEFAULT_ADDRESS} "
            "(http://HOST:PORT)"
        )
    return url.rstrip("/")


def _send_token() -> None:
    """Let Ray's client send a token where the user has one and says nothing else.

    To a dashboard, which ignores one that it does not want. Not to Ray itself: the workers of a
    cluster without tokens refuse a driver that has one.
    """
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    return Path("~/.ray/auth_token").expanduser().is_file()


@contextmanager
def _address_from_us() -> Iterator[None]:
    """Hide the environment's addresses: Ray would let them overrule the one that was given."""
    hidden = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn what Ray's client raises into one line that says what to do."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(_about_the_token(address, str(error))) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise ClusterError(
            f"no Ray dashboard answers at {address}: is the cluster up, and the SSH tunnel "
            "to it open?"
        ) from error
    except aiohttp.ClientError as error:
        raise ClusterError(f"the connection to {address} broke: {error}") from error
    except RuntimeError as error:
        raise ClusterError(f"{address}: {_first_line(error)}") from error


def _about_the_token(address: str, answer: str) -> str:
    if "failed" in answer.splitlines()[0]:
        return f"{address} refuses the token (403): {HOW_TO_SEND_A_TOKEN}"
    return f"{address} wants a token (401): {HOW_TO_SEND_A_TOKEN}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A server's traceback comes with the answer; what matters is its last line.
    if len(lines) > 1 and "Traceback" in str(error):
        return f"{lines[0].partition(': Traceback')[0]}: {lines[-1]}"
    return lines[0] if lines else type(error).__name__


def _quiet() -> None:
    """Keep the client's notes on its own doings out of our output."""
    import logging

    for name in (
        "ray.dashboard.modules.dashboard_sdk",
        "ray.dashboard.modules.job.sdk",
        "ray._private.runtime_env.packaging",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)


def _job(detail: Any) -> Job:
    return Job(
        id=str(detail.submission_id),
        status=str(getattr(detail.status, "value", detail.status)),
        message=str(detail.message or ""),
        metadata={str(key): str(value) for key, value in (detail.metadata or {}).items()},
        started=None if detail.start_time is None else detail.start_time / 1000,
        ended=None if not detail.end_time else detail.end_time / 1000,
    )
