"""PURE. ClusterSpec -> Plan: graph and max flow, T(j), placement, bounds, explanation. No torch, sockets, clock.

`cluster` is what there is, `graph` what it can carry, `search` and `baselines` find placements; here are the judges of
a placement and the two who ask for one, `planner` and `replan`.
"""
