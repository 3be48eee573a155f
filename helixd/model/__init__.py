"""A checkpoint on disk: config.json, safetensors index, tokenizer, chat template. No torch, no code from data."""
