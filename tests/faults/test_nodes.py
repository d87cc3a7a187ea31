"""Nodes of a cluster: one on which every trial fails is left out, a lost one is done without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from searches import RANDOM, assert_nothing_lost, assert_the_same, search, spec_of

from desisky_tune.search.nodes import FAILURES_OF_A_NODE, NodeWatch
from desisky_tune.search.records import TrialRecord

ONE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100 * 1024**2}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster of nodes of one CPU each; `cluster_utils` gives each its own raylet."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**ONE, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def test_a_search_outlives_a_bad_node_and_a_lost_one(
    tmp_path: Path, cluster: Any, undisturbed: list[TrialRecord]
) -> None:
    # XLA ends every process there at its first compile, as a broken driver would.
    cluster.add_node(**ONE, env_vars={"XLA_FLAGS": "--xla_no_such_flag=1"})
    doomed = cluster.add_node(**ONE)
    overrides = (*RANDOM, "resources.workers=3")
    command = search(tmp_path, "nodes", overrides, "--address", cluster.address)
    said = command.until("gets no more trials")
    assert f"{FAILURES_OF_A_NODE} failed there one after another" in said
    command.until("at epoch", "COMPLETE")
    cluster.remove_node(doomed, allow_graceful=False)
    assert command.ends() == 0, command.lines
    assert sum("gets no more trials" in line for line in command.lines) == 1
    assert_the_same(assert_nothing_lost(tmp_path / "nodes", spec_of(RANDOM)), undisturbed)


class FakeRay:
    """As much of Ray as `NodeWatch` asks for."""

    def __init__(self, *names: str) -> None:
        self.alive = dict.fromkeys(names, True)

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": name,
                "Alive": alive,
                "Resources": {"CPU": 4.0},
                "NodeManagerHostname": f"{name}.cluster",
                "NodeManagerAddress": "10.0.0.1",
            }
            for name, alive in self.alive.items()
        ]


def watch(*names: str) -> NodeWatch:
    return NodeWatch(FakeRay(*names), {"CPU": 1.0, "GPU": 0.0})


def test_a_node_is_left_out_after_failures_one_after_another() -> None:
    nodes = watch("good", "bad")
    for number in range(FAILURES_OF_A_NODE):
        nodes.started(number, "bad")
        assert "bad" not in nodes.left_out
        assert nodes.failed(number, "no CUDA device")
    assert nodes.left_out == {"bad": "no CUDA device"}
    assert nodes.usable() == ["good"]
    assert nodes.innocent("bad") == [0, 1, 2]
    assert nodes.without_left_out({"CPU": 8.0}) == {"CPU": 4.0}


def test_one_good_report_clears_a_node() -> None:
    nodes = watch("one", "two")
    for number in range(3 * FAILURES_OF_A_NODE):
        nodes.started(number, "one")
        if number % FAILURES_OF_A_NODE == 1:
            nodes.worked(number)
        else:
            assert nodes.failed(number, "killed")
    assert not nodes.left_out


def test_the_last_node_is_never_left_out() -> None:
    nodes = watch("only")
    nodes.started(0, "only")
    assert not any(nodes.failed(0, "raised") for _ in range(9))
    assert not nodes.left_out


def test_a_node_that_is_gone_needs_no_leaving_out() -> None:
    nodes = watch("one", "two")
    nodes._ray.alive["two"] = False
    nodes.started(0, "two")
    assert all(nodes.failed(0, "its node died") for _ in range(9))
    assert not nodes.left_out


def test_trials_are_placed_elsewhere() -> None:
    nodes = watch("one", "two")
    assert nodes.request().required_resources == {"CPU": 1.0}
    nodes.left_out = {"abc": "", "def": ""}
    where = nodes.request()._bound.kwargs["bundle_label_selector"]
    assert where == [{"ray.io/node-id": "!in(abc, def)"}]
