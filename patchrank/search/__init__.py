"""The search for golden rankings."""
