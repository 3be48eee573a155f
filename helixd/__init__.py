"""helixd serves one language model over unequal machines: placement by max flow, a pipeline per request."""

__version__ = "0.1.0"
