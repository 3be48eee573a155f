"""The cluster as a directed graph with capacities: max flow, how it is shared, what a loss leaves."""
