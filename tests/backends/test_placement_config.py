"""What cannot be followed is refused when the configuration is read."""

import pytest
from pydantic import ValidationError

from backends import placement_config
from backends.placement_config import PlacementConfig


def test_kv_events_are_for_the_policy_that_looks_at_caches():
    with pytest.raises(ValidationError, match="kv_events is for the policy prefix"):
        PlacementConfig(kv_events=True)
    assert PlacementConfig(policy="prefix", kv_events=True).kv_events


def test_kv_events_without_the_library_say_what_to_install(monkeypatch):
    monkeypatch.setattr(placement_config, "find_spec", lambda _: None)
    with pytest.raises(ValidationError, match=r"pip install 'headgate\[kv-events\]'"):
        PlacementConfig(policy="prefix", kv_events=True)
    assert not PlacementConfig(policy="prefix").kv_events
