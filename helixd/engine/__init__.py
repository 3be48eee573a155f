"""torch. Decoder layers, KV pool, batching, sampling, layer timing. Knows no sockets."""
