"""The options that say which nodes of a cluster run a model's layers.

In: what the parser found. Out: keywords of `Model.load`, or a UsageError.
"""

import dataclasses
import re
from typing import Annotated

from llamacli.cli.grammar import option
from llamacli.errors import UsageError

NONE = "none"  # the address that means no cluster and overrides the settings


def cluster_address(text: str, where: str) -> str | None:
    """HOST[:PORT]; None for "none"."""
    return None if text.strip().lower() == NONE else text


ClusterAddress = Annotated[
    str | None,
    option(
        "--cluster",
        metavar="ADDRESS",
        group="Model",
        setting=True,
        check=cluster_address,
        help="Run the layers on the nodes of the cluster at HOST[:PORT]; none: here. See docs/cluster.md.",
    ),
]


def _layer_counts(text: str, where: str) -> str:
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text.strip()):
        raise UsageError(f"{where}: expected counts of layers such as 24,24, found {text!r}")
    return text.strip()


ClusterLayers = Annotated[
    str | None,
    option(
        "--cluster-layers",
        metavar="N,N,...",
        group="Model",
        check=_layer_counts,
        help="Layers of each node, in the order of `cluster status` (default: by memory and speed).",
    ),
]


@dataclasses.dataclass
class OnCluster:
    """Where layers run, of every command that answers."""

    cluster: ClusterAddress = None
    cluster_layers: ClusterLayers = None

    @property
    def on_cluster(self) -> dict:
        """Keywords of `Model.load`."""
        if self.cluster is None and self.cluster_layers is not None:
            raise UsageError("--cluster-layers: expected --cluster with it, found none; add it or leave this out")
        layers = [int(n) for n in (self.cluster_layers or "").split(",") if n]
        return {} if self.cluster is None else {"cluster": self.cluster, "cluster_layers": layers}
