"""Where log lines go: stderr, coloured for a person at a terminal, else one JSON object a line."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import Processor

from lattice_serve.engine import standard_error


def configure(level: str) -> None:
    """Set up structlog, and the standard library's loggers for the libraries below, for this process. A line that
    cannot be written is lost, and fails nothing."""
    standard_error.outlive_it()
    facts: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[Processor]
    if sys.stderr.isatty():
        # The plain traceback, for the rich one shows local variables, which hold prompts.
        renderer = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    else:
        renderer = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[*facts, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*facts, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
