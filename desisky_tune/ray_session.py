"""The one place that starts Ray, and ends it by its own handle.

Ray binds its ports to every interface unless
``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`` stands in the environment before
``import ray``; and with ``RAY_AUTH_MODE`` unset it writes a token file under the
user's home. Both are settled here, before Ray is imported.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from desisky_tune.errors import InputError

#: Environment of a Ray that lives inside this process and listens on loopback alone.
LOOPBACK_ENVIRONMENT: Mapping[str, str] = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

#: What the workers of a Ray of ours must see.
WORKER_ENVIRONMENT: Mapping[str, str] = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONWARNINGS": "ignore",
}

#: What a Ray that listens on the loopback address alone has, and so have those that join it.
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

#: What a person does where a cluster refuses.
HOW_TO_SEND_A_TOKEN = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or the file ~/.ray/auth_token) to the "
    "cluster's; 'ray get-auth-token' on its head shows it"
)

#: How long a cluster's address may take to answer (s).
CONNECT_SECONDS = 10.0

#: Memory that a local Ray's object store may take (bytes).
OBJECT_STORE_BYTES = 512 * 1024**2


_cut_off = threading.Event()


def start_was_cut_off() -> bool:
    """Whether a start of Ray has failed in this process: what it left half-made may crash."""
    return _cut_off.is_set()


@contextmanager
def ray_session(
    *,
    address: str | None = None,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    dashboard: bool = False,
    object_store_bytes: int = OBJECT_STORE_BYTES,
) -> Iterator[Any]:
    """Yield the `ray` module, connected.

    A Ray that this process already runs is used and left running. Otherwise one is
    started inside the process, on the loopback address alone (or the cluster at
    `address` is joined), and ended on the way out.

    Parameters
    ----------
    address
        ``None`` for a local Ray; ``"auto"`` or ``HOST:PORT`` for a cluster.
    num_cpus, num_gpus
        What a local Ray may use; the machine's own by default.
    dashboard
        Start Ray's dashboard, on 127.0.0.1.
    object_store_bytes
        Size of a local Ray's object store.

    Raises
    ------
    InputError
        When no Ray answers at `address`, or it wants another token.
    SystemExit
        On SIGTERM while Ray starts, as Ray has it.
    """
    if address is None:
        for name, value in LOOPBACK_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    else:
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        _refuse_silence(address)
        if _on_loopback_alone(address):
            os.environ.setdefault(LOOPBACK_VARIABLE, LOOPBACK_ENVIRONMENT[LOOPBACK_VARIABLE])
    import ray
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():
        yield ray
        return
    common: dict[str, Any] = {
        "logging_level": "ERROR",
        "log_to_driver": False,
        "configure_logging": True,
    }
    heard: list[int] = []
    try:
        if address is None:
            # Inherited by what Ray starts here. As a runtime environment of the job it would be
            # another one than that of the processes that Ray holds ready, and none would do.
            with environment(WORKER_ENVIRONMENT), _hearing_signals(heard):
                ray.init(
                    # Not without an address: Ray would follow RAY_ADDRESS, or join a Ray that it
                    # finds on this machine.
                    address="local",
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                    include_dashboard=dashboard,
                    dashboard_host="127.0.0.1",
                    object_store_memory=object_store_bytes,
                    **common,
                )
        else:
            with _hearing_signals(heard):
                ray.init(address=address, runtime_env={"env_vars": _worker_environment()}, **common)
    except AuthenticationError as error:
        raise InputError(f"no token for the Ray at {address!r}: {HOW_TO_SEND_A_TOKEN}") from error
    except ConnectionError as error:
        if address == "auto":
            raise InputError(f"no Ray cluster answers at {address!r}: {error}") from error
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"cannot join the Ray at {address!r} ({reason}); if it wants a token, "
            f"{HOW_TO_SEND_A_TOKEN}"
        ) from error
    except BaseException:
        cancel_abort()
        _cut_off.set()
        raise
    try:
        if signal.SIGTERM in heard:
            # What Ray's handler raised was lost in its own code.
            raise SystemExit(signal.SIGTERM)
        yield ray
    finally:
        cancel_abort()
        ray.shutdown()


def _worker_environment() -> dict[str, str]:
    """Return `WORKER_ENVIRONMENT` without what the job that this is sets itself.

    Ray refuses a variable that both set, whatever its value.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    its_own = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in WORKER_ENVIRONMENT.items() if name not in its_own}


@contextmanager
def _hearing_signals(heard: list[int]) -> Iterator[None]:
    """Note the signals that come meanwhile, whatever becomes of what their handlers raise."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        with suppress(BlockingIOError):
            heard += os.read(reading, 256)
        os.close(reading)
        os.close(writing)


def cancel_abort() -> None:
    """Take back what Ray's handler of SIGTERM sets: an alarm that aborts after three seconds.

    While Ray starts, that handler (absl's, of a process's failures) is called before Python's:
    ours, or the one of Ray that raises SystemExit. What follows, Ray's end above all, may take
    longer than three seconds.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGALRM) in (signal.SIG_DFL, None):
        signal.alarm(0)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the time of a block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _on_loopback_alone(address: str) -> bool:
    """Whether a Ray at 127.0.0.1 answers there and not at this machine's own address.

    Ray takes the one for the other, and would then try for minutes.
    """
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost"):
        return False
    try:
        own = _own_address()
        socket.create_connection((own, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError:
        return True
    return own == "127.0.0.1"


def _own_address() -> str:
    """Return the address by which this machine reaches others."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # of no network; nothing is sent
        return str(probe.getsockname()[0])


def _refuse_silence(address: str) -> None:
    """Refuse an address at which nobody listens: Ray itself would try for minutes.

    Raises
    ------
    InputError
        When nothing answers at HOST:PORT, or `address` has another form.
    """
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit()) or "://" in address:
        raise InputError(f"address {address!r}: must be 'auto' or HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"no Ray cluster answers at {address!r}: {error}") from error
