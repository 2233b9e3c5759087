"""The networks that the engine can run."""
