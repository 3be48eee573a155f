"""The HTTP surface: OpenAI's chat and completions, models, tokenise, health, the cluster's state, metrics."""
