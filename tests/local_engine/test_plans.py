import pytest

from local_engine.presets import describe, presets
from tests.local_engine.plan_cases import CASES, FOLDER, MODELS, plan, preset_plans, text


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_as_it_was_read(name):
    written = (FOLDER / f"{name}.txt").read_text()
    assert text(plan(name)) == written, "read the difference, then: python -m tests.local_engine.plan_cases"


def test_every_plan_that_was_read_has_its_case():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(CASES)


def test_the_same_plan_comes_of_the_same_specification():
    assert plan("replicas") == plan("replicas")


@pytest.mark.parametrize("name", MODELS)
def test_a_preset_is_found_by_a_models_name(name):
    found = describe(MODELS[name], None).preset
    assert found is not None
    assert found.name == name


def test_every_preset_has_a_model_to_be_tried_with_and_a_source():
    assert MODELS.keys() == presets().keys()
    assert all(preset.source for preset in presets().values())


def test_no_plan_shows_a_secret():
    for name in CASES:
        shown = text(plan(name))
        assert "the-key-of-this-start" not in shown
        assert "hf-secret" not in shown
        assert "the-key-of-this-start" not in repr(plan(name))
        assert "hf-secret" not in repr(plan(name))


def test_every_engine_is_asked_for_what_the_gateway_needs():
    for _, found in preset_plans():
        for replica in found.replicas:
            assert "--enable-prompt-tokens-details" in replica.argv
            assert "--enable-request-id-headers" in replica.argv
            assert "--shutdown-timeout" in replica.argv
            assert replica.argv[replica.argv.index("--host") + 1] == "127.0.0.1"
            assert replica.env["VLLM_API_KEY"] == replica.api_key
            assert replica.api_key not in " ".join(replica.argv)
