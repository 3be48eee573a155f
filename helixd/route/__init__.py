"""PURE. Plan + KV ledger -> Route: interleaved weighted round-robin under masks, reservation and release."""
