"""PURE. ClusterSpec -> Plan: graph and max flow, T(j), placement, bounds, explanation. No torch, sockets, clock."""
