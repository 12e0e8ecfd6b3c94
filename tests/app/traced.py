"""For workers that are to write their spans to a file: ``--include=tests.app.traced``."""

import os

from celery.signals import worker_process_init
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor


@worker_process_init.connect(weak=False)
def write_spans(**_kwargs):
    """One JSON object a line, in the file that the environment names."""
    out = open(os.environ["CONDUCTOR_TEST_SPANS"], "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    provider = TracerProvider()
    provider.add_span_processor(
        SimpleSpanProcessor(ConsoleSpanExporter(out=out, formatter=lambda span: f"{span.to_json(indent=None)}\n"))
    )
    trace.set_tracer_provider(provider)
