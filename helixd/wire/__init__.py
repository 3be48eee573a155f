"""Frames (msgpack) and peer links (aiohttp websockets, or in memory). Knows no requests."""
