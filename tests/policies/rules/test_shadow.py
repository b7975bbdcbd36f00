import pytest

from policies.rules.shadow import Shadow
from tests.support.builders import a_model


async def test_a_share_of_requests_is_copied_and_always_the_same_ones():
    shadow = Shadow(a_model("new"), 5.0, 4)
    copied = [n for n in range(20_000) if shadow.takes(f"req_{n:x}")]
    assert len(copied) / 20_000 == pytest.approx(0.05, abs=0.006)
    assert copied == [n for n in range(20_000) if shadow.takes(f"req_{n:x}")]


async def test_all_of_them_is_all_of_them():
    assert all(Shadow(a_model("new"), 100.0, 4).takes(f"req_{n}") for n in range(1000))
