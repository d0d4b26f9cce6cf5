"""How long an all-reduce takes on published machines, by published figures.

A model in the manner of alpha and beta: so many steps of so many seconds each, and then the
bytes that a chip sends over its bandwidth; nothing else uses the links meanwhile. Bytes are
the payload, seconds those of one all-reduce.

Sources, of which the names below are used:

    NCCL    the tuner that chooses NCCL's algorithm, with its latencies (Hopper, x86):
            https://github.com/NVIDIA/nccl/blob/b6475625/src/graph/tuning.cc
    TPUs, GPUs, sharding    "How to Scale Your Model", parts 2, 12 and 3:
            https://jax-ml.github.io/scaling-book/tpus (/gpus, /sharding)
    Cloud   https://cloud.google.com/tpu/docs/v3 and /v4
"""

from __future__ import annotations

import math
from typing import NamedTuple


def sent(payload: float, chips: int) -> float:
    """Bytes that each chip sends in an all-reduce: 2 (n - 1) / n times the payload.

    No algorithm that adds up on the chips sends less; a ring sends just that.
    """
    return 2 * (chips - 1) / chips * payload


class Protocol(NamedTuple):
    """One of NCCL's ways to all-reduce.

    Attributes:
      ring: a ring through all chips; or a tree over the nodes, with a chain in each.
      base: seconds, whatever the number of chips.
      near, far: seconds of a step within a node, and from node to node.
      share: of the links' bandwidth that it has.
      most: bytes per second that it has at the most.
    """

    ring: bool
    base: float
    near: float
    far: float
    share: float = 1.0
    most: float = math.inf

    def seconds(self, payload: float, chips: int, nodes: int, bandwidth: float) -> float:
        """Of an all-reduce over `chips` in `nodes`, whose links carry `bandwidth`."""
        bandwidth = min(self.share * bandwidth, self.most)
        if self.ring:
            far = 2 * nodes if nodes > 1 else 0
            near, moved = 2 * (chips - 1) - far, sent(payload, chips)
        else:
            far, near, moved = 2 * math.log2(nodes), 2 * (chips // nodes - 1), 2 * payload
        return self.base + near * self.near + far * self.far + moved / bandwidth


# Source: NCCL. The last is the protocol for small messages, "LL", with its least bandwidth.
PROTOCOLS = (
    Protocol(True, 8.4e-6, 3.4e-6, 14e-6),
    Protocol(False, 0, 28e-6, 28e-6, share=0.92),
    Protocol(False, 6.8e-6, 0.6e-6, 5e-6, most=19e9),
)


class Switched(NamedTuple):
    """Nodes of chips behind a switch, on a network of switches; NCCL's best protocol.

    Attributes:
      name: of the machine.
      peak: FLOP per second and chip, bfloat16.
      node: chips in a node.
      within, out: bytes per second out of a chip within its node, and out of a node.
    """

    name: str
    peak: float
    node: int
    within: float
    out: float

    def all_reduce(self, payload: float, chips: int) -> float:
        """Seconds, over neighbours that fill their nodes."""
        if chips == 1:
            return 0.0
        nodes = math.ceil(chips / self.node)
        # NCCL's rings leave a node through all its adapters at once.
        bandwidth = self.within if nodes == 1 else min(self.within, self.out)
        return min(p.seconds(payload, chips, nodes, bandwidth) for p in PROTOCOLS)


class Torus(NamedTuple):
    """Chips in three dimensions, each linked to its neighbours.

    Reduce-scatter and all-gather on all axes at once. Axes are closed to rings from a full
    cube of 4 x 4 x 4 on (TPUs): half the steps, and both links of the axis at work.

    Attributes:
      name, peak: as in `Switched`.
      link: bytes per second of a link, one way.
      hop: seconds from a chip to its neighbour.
    """

    name: str
    peak: float
    link: float
    hop: float

    def all_reduce(self, payload: float, chips: int) -> float:
        """Seconds, over a whole slice of so many chips, or a block of it of less than 64."""
        if chips == 1:
            return 0.0
        closed, sides = chips >= 64, [s for s in self.sides(chips) if s > 1]
        links = (2 if closed else 1) * len(sides)
        hops = sum(s // 2 if closed else s - 1 for s in sides)
        return 2 * hops * self.hop + sent(payload, chips) / (links * self.link)

    @staticmethod
    def sides(chips: int) -> tuple[int, int, int]:
        """Of the block nearest to a cube, of a power of two chips."""
        power = chips.bit_length() - 1
        return tuple(2 ** ((power + i) // 3) for i in range(3))


# On an InfiniBand network. Source: GPUs, for all four numbers.
H100 = Switched("DGX H100", peak=9.9e14, node=8, within=450e9, out=400e9)
# Source: Cloud for the peak, TPUs for the link, sharding for the hop ("typically around 1us").
TPU_V4 = Torus("TPU v4", peak=2.75e14, link=45e9, hop=1e-6)
MACHINES = (H100, TPU_V4)
# Source: Cloud. FLOP per second and chip, bfloat16.
TPU_V3_PEAK = 1.23e14
