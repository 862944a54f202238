"""OpenTelemetry traces of requests, for those who ask for them: ``--otlp-traces-endpoint``, extra ``otel``.

One span for each request to an engine, a child of the caller's (W3C ``traceparent``), with the attributes of the GenAI
conventions (https://opentelemetry.io/docs/specs/semconv/gen-ai/) and vLLM's names for latencies.
"""

from __future__ import annotations

import time
from typing import Any

from ..errors import PeltonError
from ..metrics import RequestMetrics
from ..version import installed_version
from .http import Context

_NS = 1_000_000_000
_OPERATIONS = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}


class Tracer:
    """Sends spans to a collector, in a thread of its own.

    Args:
        endpoint: of the collector, for OTLP over HTTP: ``http://host:4318/v1/traces``.

    Raises:
        PeltonError: OpenTelemetry's SDK is not installed.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise PeltonError("traces need OpenTelemetry's SDK", "pip install 'pelton[otel]'") from None
        resource = Resource.create({"service.name": "pelton", "service.version": installed_version()})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("pelton")
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def record(
        self, context: Context, num_prompt_tokens: int, num_output_tokens: int, reason: str,
        metrics: RequestMetrics | None,
    ) -> None:  # fmt: skip
        """A request is over."""
        to_unix = time.time() - time.monotonic()

        def nanoseconds(seconds: float) -> int:
            return int((seconds + to_unix) * _NS)

        parent = self._propagator.extract({"traceparent": context.header(b"traceparent") or ""})
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": _OPERATIONS.get(context.scope["path"], "chat"),
            "gen_ai.request.model": self._model,
            "gen_ai.response.id": context.request_id,
            "gen_ai.response.finish_reasons": [reason],
            "gen_ai.usage.input_tokens": num_prompt_tokens,
            "gen_ai.usage.output_tokens": num_output_tokens,
        }
        if metrics is not None:
            times = {"time_to_first_token": metrics.ttft, "e2e": metrics.e2e, "time_in_queue": metrics.queue_time}
            attributes |= {f"gen_ai.latency.{name}": value for name, value in times.items() if value is not None}
        span = self._tracer.start_span(
            "llm_request", parent, attributes=attributes, start_time=nanoseconds(context.arrival_time)
        )
        if metrics is not None and metrics.token_times:
            if metrics.first_scheduled_time is not None:
                span.add_event("first step", timestamp=nanoseconds(metrics.first_scheduled_time))
            span.add_event("first token", timestamp=nanoseconds(metrics.token_times[0]))
        span.end(nanoseconds(time.monotonic()))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
