"""What is found becomes members whose names are stable and show no address."""

from backends.discovery.found import Found, members_of


def test_names_follow_from_keys_and_hide_addresses():
    one, two = (
        Found("10.0.0.1:8000", "http://10.0.0.1:8000/v1"),
        Found("pod-7:8000", "http://10.0.0.9:8000/v1"),
    )
    first = {member.base_url: member.name for member in members_of("gpu", [one, two])}
    again = {member.base_url: member.name for member in members_of("gpu", [two])}
    assert first[two.url] == again[two.url]
    assert len(set(first.values())) == 2
    assert all(name.startswith("gpu/") and "10.0" not in name for name in first.values())
    moved = two._replace(url="http://10.0.0.33:8000/v1")  # a pod that came back elsewhere
    assert members_of("gpu", [moved])[0].name == again[two.url]


def test_ranks_are_members_of_their_own():
    found = Found("k", "http://a/v1", "prefill", 2.0, ranks=2, is_open=False, name="big")
    members = members_of("gpu", [found, found])
    assert [(m.name, m.rank, m.engine, m.role, m.weight, m.is_open) for m in members] == [
        ("gpu/big.r0", 0, "0", "prefill", 2.0, False),
        ("gpu/big.r1", 1, "1", "prefill", 2.0, False),
    ]


def test_many_names_do_not_meet():
    members = members_of("p", [Found(f"k{n}", f"http://h{n}/v1") for n in range(4096)])
    assert len({member.name for member in members}) == 4096
