"""The planner in a process of its own: what is asked of it, the process, and how others run it."""
