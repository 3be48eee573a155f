"""PURE. A discrete-event world that runs the real plan/ and route/ code."""
