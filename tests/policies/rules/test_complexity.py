import json

import pytest

from backends.json_object import read_object
from policies.rules.complexity import complexity

TOOLS = [{"type": "function", "function": {"name": "search"}}]
CODE = [{"role": "user", "content": "fix this\n```python\nprint(1)\n```"}]


@pytest.mark.parametrize(
    ("body", "tokens", "turns", "level"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, 10, 1, "low"),
        ({"messages": [], "tools": TOOLS}, 10, 1, "low"),
        ({"messages": CODE, "tools": TOOLS}, 40, 1, "medium"),
        ({"input": "why", "reasoning": {"effort": "high"}}, 10, 1, "medium"),
        ({"messages": [], "reasoning_effort": "low"}, 10, 1, "low"),
        ({"messages": [], "thinking": {"type": "disabled"}}, 10, 1, "low"),
        ({"messages": [], "response_format": {"type": "json_schema", "json_schema": {}}}, 2_000, 1, "medium"),
        ({"messages": CODE, "tools": TOOLS}, 2_000, 1, "medium"),
        ({"messages": CODE, "tools": TOOLS}, 16_000, 1, "high"),
        ({"messages": CODE, "tools": TOOLS, "reasoning_effort": "medium"}, 100, 9, "high"),
        ({"messages": [], "tools": []}, 1_999, 7, "low"),
    ],
)
def test_complexity_is_told_by_the_shape_of_a_request(body, tokens, turns, level):
    values = read_object(json.dumps(body).encode()).values
    assert complexity(values, tokens, turns) == level
