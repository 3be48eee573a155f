"""Workers that behave like machines of a cluster file on the wire, but only take the time. No torch."""
