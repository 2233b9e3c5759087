"""What request bodies may hold and what answers look like, one module a group of routes."""
