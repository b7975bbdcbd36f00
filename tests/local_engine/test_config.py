import pytest
from pydantic import ValidationError

from local_engine.config import RESTART, Section, SimulatorConfig
from local_engine.simulator.__main__ import arguments, settings_from


def test_every_setting_is_an_option_of_the_simulator_with_the_same_default():
    defaults = vars(arguments().parse_args([]))
    settings = SimulatorConfig().model_dump(exclude={"replicas"})
    assert {name: defaults[name] for name in settings} == settings


def test_what_the_configuration_accepts_the_simulator_accepts():
    config = SimulatorConfig(num_blocks=64, max_model_len=1024, max_num_queued_reqs=0, time_scale=0)
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in config.model_dump(exclude={"replicas"}, exclude_none=True).items()
    ]
    assert settings_from(arguments().parse_args(options)).num_blocks == 64


def test_a_sequence_must_fit_into_the_blocks():
    with pytest.raises(ValidationError, match="raise num_blocks or lower max_model_len"):
        SimulatorConfig(num_blocks=10, max_model_len=161)


@pytest.mark.parametrize(
    "setting", [{"replicas": 0}, {"time_scale": -1}, {"load_factor": 0.5}, {"seed": "x"}]
)
def test_a_value_out_of_range_is_refused(setting):
    with pytest.raises(ValidationError):
        SimulatorConfig(**setting)


def test_a_section_is_immutable_and_refuses_unknown_keys_without_showing_values():
    class Example(Section):
        port: int = 1

    with pytest.raises(ValidationError, match="frozen"):
        Example().port = 2
    with pytest.raises(ValidationError) as caught:
        Example(prot="hunter2", port="hunter2")
    assert "hunter2" not in str(caught.value)


def test_the_restart_mark_is_one_that_schemas_may_carry():
    assert all(name.startswith("x-") for name in RESTART)
