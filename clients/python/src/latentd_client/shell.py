"""What both shells have in common: what they are told, and how a request is said to httpx."""

from abc import ABC, abstractmethod
from typing import Any

import httpx

from latentd_client.progress import Progress
from latentd_client.steps import Policy, Send


class Shell(ABC):
    """The service at `url`.

    `timeout` is in seconds for a call, its repetitions included, where the call says none; `at_once` is how many
    requests a batch has in flight; `progress` is True for a bar of a batch (needs tqdm) or a function of (done, all or
    None).
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float | None = None,
        retries: int = 4,
        at_once: int = 4,
        progress: Progress = False,
        policy: Policy | None = None,
        transport: httpx.BaseTransport | httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.policy = policy or Policy(timeout, retries)
        self.at_once, self.progress = at_once, progress
        headers = {"Accept-Encoding": "identity"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._connect(base_url=url, headers=headers, timeout=None, transport=transport)

    @abstractmethod
    def _connect(self, **how: Any) -> None:
        """Makes the client of httpx."""


def arguments(send: Send) -> dict[str, Any]:
    """A request as httpx takes it."""
    return {"params": send.params, "headers": send.headers, "content": send.content, "timeout": send.timeout}
