"""Which nodes of a cluster trials run on, and which are left out because none runs well there.

A node with a broken driver or a full disk takes a trial, fails, and is free at once for the next:
left alone, it fails a whole search. So what fails on a node is tried again elsewhere, and a node
on which trials fail one after another gets no more of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

#: Failures on one node, with no good report between them, after which it is left out.
FAILURES_OF_A_NODE = 3

_ACTOR = re.compile(r"actor_id\W+([0-9a-f]{8,})")

#: The label that each node of a Ray has by itself.
_LABEL = "ray.io/node-id"


class NodeWatch:
    """Counts how trials fare on each node.

    Parameters
    ----------
    ray
        The module, connected; None where nodes are told by `started` alone (the tests).
    needs
        Resources of one trial, by name: a node that lacks one of them is none of ours.
    """

    def __init__(self, ray: Any, needs: Mapping[str, float] | None = None) -> None:
        self._ray = ray
        self._needs = dict(needs or {})
        self._at: dict[int, str] = {}
        self._failed: dict[str, list[int]] = {}
        #: Nodes that get no more trials, and what was said of the last failure there.
        self.left_out: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the connection: Ray Tune pickles its callbacks to disk."""
        return {**self.__dict__, "_ray": None}

    def usable(self) -> list[str]:
        """Return the ids of the nodes that are alive, large enough, and not left out."""
        if self._ray is None:
            return []
        return [
            node["NodeID"]
            for node in self._ray.nodes()
            if node["Alive"]
            and node["NodeID"] not in self.left_out
            and all(node["Resources"].get(name, 0) >= need for name, need in self._needs.items())
        ]

    def started(self, number: int, node: str | None) -> None:
        """Take note of where a trial runs."""
        self._at.pop(number, None)
        if node is not None:
            self._at[number] = node

    def died_as(self, number: int, error: str) -> None:
        """Take note of where a trial ran whose process died before it could begin.

        Parameters
        ----------
        number
            The trial.
        error
            What Ray says of the death: the id of the process's actor is in it.
        """
        found = None if number in self._at else _ACTOR.search(error)
        if found is not None:
            self.started(number, _node_of(found[1]))

    def worked(self, number: int) -> None:
        """A trial has given a figure: its node is in order."""
        if number in self._at:
            self._failed.pop(self._at[number], None)

    def failed(self, number: int, reason: str) -> bool:
        """A trial has failed; return whether its node may be to blame.

        It may where it is not the last node that is left: then the trial is worth another
        try.
        """
        node = self._at.pop(number, None)
        if node is None:
            return False
        if node in self.left_out:
            return True
        usable = self.usable()
        if node not in usable:
            return True  # it is gone, and takes no further trial
        if len(usable) == 1:
            return False
        failed = self._failed.setdefault(node, [])
        failed.append(number)
        if len(failed) >= FAILURES_OF_A_NODE:
            self.left_out[node] = reason
        return True

    def without_left_out(self, have: Mapping[str, float]) -> dict[str, float]:
        """Return a cluster's resources less those of the nodes that are left out."""
        left = dict(have)
        for node in self._ray.nodes() if self.left_out else ():
            if node["Alive"] and node["NodeID"] in self.left_out:
                for name, amount in node["Resources"].items():
                    left[name] = left.get(name, 0.0) - amount
        return left

    def address(self, node: str) -> str:
        """Return how a person finds a node: its host and address."""
        known = [] if self._ray is None else self._ray.nodes()
        for each in known:
            if each["NodeID"] == node:
                return f"{each['NodeManagerHostname']} ({each['NodeManagerAddress']}, {node[:8]})"
        return node[:8]

    def innocent(self, node: str) -> Sequence[int]:
        """Return the trials that failed on a node, once for each time."""
        return self._failed.get(node, ())

    def request(self) -> Any:
        """Return the resources of a trial as Ray Tune takes them, without the nodes left out."""
        from ray.tune import PlacementGroupFactory

        bundle = {name: need for name, need in self._needs.items() if need}
        if not self.left_out:
            return PlacementGroupFactory([bundle])
        where = {_LABEL: f"!in({', '.join(sorted(self.left_out))})"}
        return PlacementGroupFactory([bundle], bundle_label_selector=[where])


def node_of(trial: Any) -> str | None:
    """Return the id of the node that a trial's process runs on; None where it is not known."""
    actor = getattr(getattr(trial, "temporary_state", None), "ray_actor", None)
    if actor is None:
        return None
    return _node_of(actor._actor_id.hex())


def _node_of(actor_id: str) -> str | None:
    # The public state API needs the dashboard, which a search's own Ray does without.
    from ray._private.state import actors

    try:
        return str(actors(actor_id)["Address"]["NodeID"]) or None
    except (KeyError, AttributeError, TypeError):
        return None
