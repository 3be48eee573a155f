"""Methods that find placements; each result is judged by its true max flow."""
