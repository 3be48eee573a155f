"""The messages that coordinator and workers exchange, typed and checked. Knows neither of them."""
