"""The cluster file passes Ray's own check and leaves nothing to Ray's defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER_FILE = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER_FILE.read_text())


@pytest.fixture(scope="module")
def prepared(given: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(given)
    validate_config(config)
    return config


def start_commands(config: dict[str, Any]) -> dict[str, str]:
    """The one command of each kind of node that starts Ray."""
    found = {}
    for kind in ("head", "worker"):
        starts = [c for c in config[f"{kind}_start_ray_commands"] if "ray start" in c]
        assert len(starts) == 1
        found[kind] = starts[0]
    return found


def test_rays_own_check_accepts_it(prepared: dict[str, Any]) -> None:
    assert prepared["provider"]["type"] == "aws"


def test_no_command_is_left_to_rays_defaults(given: dict[str, Any]) -> None:
    for key in (
        "initialization_commands",
        "setup_commands",
        "head_setup_commands",
        "worker_setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    ):
        assert key in given
    assert given["setup_commands"]


def test_what_ray_filled_in_opens_nothing_and_installs_nothing(prepared: dict[str, Any]) -> None:
    text = yaml.safe_dump(prepared)
    assert "0.0.0.0" not in text
    assert ".whl" not in text
    assert "nightly" not in text


def test_the_dashboard_listens_on_loopback(prepared: dict[str, Any]) -> None:
    head = start_commands(prepared)["head"]
    assert re.findall(r"--dashboard-host[= ](\S+)", head) == ["127.0.0.1"]


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_every_ray_asks_for_the_token(prepared: dict[str, Any], kind: str) -> None:
    assert "RAY_AUTH_MODE=token" in start_commands(prepared)[kind].split("ray start")[0]


def test_every_node_gets_the_token(prepared: dict[str, Any]) -> None:
    user = prepared["auth"]["ssh_user"]
    assert f"/home/{user}/.ray/auth_token" in prepared["file_mounts"]


def test_workers_have_gpus_at_spot_prices_and_the_head_takes_no_trial(
    prepared: dict[str, Any],
) -> None:
    types = dict(prepared["available_node_types"])
    head = types.pop(prepared["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert types
    for node in types.values():
        assert node["resources"]["GPU"] >= 1
        assert node["min_workers"] == 0
        assert node["max_workers"] >= 1
        assert node["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert all(isinstance(amount, int) for amount in node["resources"].values())


def test_three_lines_are_marked_for_editing() -> None:
    lines = CLUSTER_FILE.read_text().splitlines()
    for mark in ("(1)", "(2)", "(3)"):
        assert sum(mark in line for line in lines if not line.startswith("# Edit")) == 1


def test_the_commands_of_its_comment_exist() -> None:
    import typer

    from desisky_tune.cli.app import app

    command = re.search(r'"desisky-tune (\w+) ([^"]*)"', CLUSTER_FILE.read_text())
    assert command is not None
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {name for param in commands[command[1]].params for name in param.opts}
    assert set(re.findall(r"--[a-z-]+", command[2])) <= options
