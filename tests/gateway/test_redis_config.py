import pytest
from pydantic import ValidationError

from gateway.redis_config import RedisConfig, node_name

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "url", ["redis://10.0.0.5", f"rediss://:{SECRET}@redis.acme.example:6380/2", "unix:///run/redis.sock"]
)
def test_an_address_of_redis_is_taken_and_its_password_not_shown(url) -> None:
    config = RedisConfig(url=url)
    assert config.url.get_secret_value() == url
    assert SECRET not in repr(config)
    assert SECRET not in config.model_dump_json()
    assert SECRET not in str(config.model_dump())


@pytest.mark.parametrize(
    "url", ["", f"http://:{SECRET}@h", "redis://", f"redis://:{SECRET}@h:port", "unix://", f"{SECRET}"]
)
def test_another_address_is_refused_and_not_repeated(url) -> None:
    with pytest.raises(ValidationError) as caught:
        RedisConfig(url=url)
    assert SECRET not in str(caught.value)
    assert "redis://" in str(caught.value)


def test_a_node_keeps_its_name(tmp_path) -> None:
    config = RedisConfig(url="redis://h")
    first = node_name(tmp_path / "one", config)
    assert node_name(tmp_path / "one", config) == first
    assert node_name(tmp_path / "two", config) != first
    assert node_name(tmp_path / "one", RedisConfig(url="redis://h", node="eu-1")) == "eu-1"


def test_a_name_with_odd_characters_is_refused() -> None:
    with pytest.raises(ValidationError):
        RedisConfig(url="redis://h", node="a b")
    with pytest.raises(ValidationError):
        RedisConfig(url="redis://h", prefix="{a}")
