"""HTTP: the OpenAI surface, the cluster surface, metrics. Knows the coordinator only through its Service seam."""
