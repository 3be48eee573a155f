"""What a planner is told of a cluster: its file, its hardware, how long layers take, what nodes hold."""
