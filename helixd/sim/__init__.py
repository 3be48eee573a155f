"""PURE. A discrete-event world: a ClusterSpec, a placement and the real `helixd.route` code under a load."""
