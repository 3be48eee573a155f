"""The coordinator role: membership, planning epochs, the truth of every request, recovery."""
