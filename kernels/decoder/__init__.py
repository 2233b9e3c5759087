"""The whole network, from token ids to logits, as one kernel."""
