"""What the configuration says of receivers of webhooks, whoever they are told by."""

import ipaddress
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, model_validator

from gateway.webhooks import ANYWHERE, Network, Networks, Receiver, check_url, read_secret
from local_engine.config import Secret, Section


def _readable(secret: SecretStr) -> SecretStr:
    if secret.get_secret_value():
        read_secret(secret.get_secret_value())
    return secret


def _network(text: str) -> str:
    read_network(text)
    return text


def read_network(text: str) -> Network:
    """`10.0.5.0/24`, or one address. ValueError with a sentence."""
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(
            "is written as a network, 10.0.5.0/24 or fd00:1::/64, with no bits set beyond"
        ) from None


NetworkText = Annotated[str, AfterValidator(_network)]


class WebhookConfig(Section):
    """A receiver. What it gets is signed as Standard Webhooks has it."""

    url: str = Field(min_length=1, max_length=2048)
    """Where messages are posted: `https://...`."""
    secrets: tuple[Annotated[Secret, AfterValidator(_readable)], ...] = Field(min_length=1, max_length=4)
    """What they are signed with, `whsec_...`, from the environment; several while one replaces another. All empty:
    the entry is off."""
    private: bool = False
    """Whether it may be at a private address, without TLS and at any port."""

    @model_validator(mode="after")
    def _may_go_there(self) -> "WebhookConfig":
        check_url(self.url, self.allowed)
        return self

    @property
    def allowed(self) -> Networks:
        return ANYWHERE if self.private else ()

    @property
    def is_on(self) -> bool:
        return any(secret.get_secret_value() for secret in self.secrets)

    def receiver(self) -> Receiver:
        return Receiver(
            self.url,
            tuple(read_secret(text) for secret in self.secrets if (text := secret.get_secret_value())),
            self.allowed,
        )
