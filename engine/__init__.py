"""The engine: sequences, their state, the network, and the process that runs them. Speaks no HTTP."""
