"""The HTTP side: one asyncio process that speaks the OpenAI API, supervises the engine and never computes."""
