"""JSON schemas as people's libraries emit them, put into the part of JSON Schema that llguidance keeps answers to."""
