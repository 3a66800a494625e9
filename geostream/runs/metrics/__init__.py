"""Export metrics of trainings and flows: by OTLP to a collector, or on an endpoint for Prometheus."""
