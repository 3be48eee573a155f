"""Ids are types: none of them can be passed where another is meant.

A *peer* is a daemon (one process, one peer port). A *node* is a device of a worker daemon; a daemon with several
devices is one peer with several nodes. An *incarnation* is one life of a peer process: it only rises for a given peer.
"""

from typing import NewType

PeerId = NewType("PeerId", str)
NodeId = NewType("NodeId", str)
RequestId = NewType("RequestId", str)
SequenceId = NewType("SequenceId", int)
Epoch = NewType("Epoch", int)
Incarnation = NewType("Incarnation", int)
Attempt = NewType("Attempt", int)
