"""The service, which also tells how many asyncio tasks it has: python -m benchmarks.counted serve ..."""

import asyncio
import sys
from collections.abc import Iterator

from fastapi import FastAPI
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from app import cli, main
from app.settings import Settings


class Tasks:
    """Of the loop that answers the scrape."""

    def collect(self) -> Iterator[Metric]:
        """One gauge."""
        yield GaugeMetricFamily("asyncio_tasks", "Tasks that have not ended.", len(asyncio.all_tasks()))


def counted(settings: Settings) -> FastAPI:
    """The app, with that gauge."""
    app = create_app(settings)
    app.state.context.metrics.registry.register(Tasks())
    return app


if __name__ == "__main__":
    create_app = main.create_app
    main.create_app = counted  # type: ignore[assignment]  # its argument is always given here
    sys.exit(cli.main())
