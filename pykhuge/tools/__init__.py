"""Programs about a machine. None of them imports another."""
