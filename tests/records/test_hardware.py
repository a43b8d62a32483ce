"""What a machine was measured to do, in a file of its own and inside configs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from traces import make_spec

from adapmoe_lab.records import HardwareProfile, PrecisionPlan, RecordError, TunedConfig

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tuned_config_v1.json"
SIZES = np.array([10_000, 100_000, 1_000_000])


def a_profile(**values):
    times = {"copy_bytes": SIZES, "copy_s": 20e-6 + SIZES / 25e9}
    return HardwareProfile(
        **{
            "device": "a GPU",
            "link": "pcie",
            "dense_step_s": 2e-3,
            "expert_s": 3e-5,
            **times,
            **values,
        }
    )


def whole():
    return a_profile(
        pageable_copy_s=30e-6 + SIZES / 10e9,
        expert_s_by_precision={"int4": 1e-5, "bfloat16": 3e-5},
        layer_host_s=1e-4,
        host_sync_s=21e-6,
        launch_s=6e-6,
        host_memory_bytes_per_s=80e9,
        host_matmul_bytes_per_s=40e9,
    )


def test_bandwidth_and_latency_are_those_the_copies_were_made_of():
    profile = whole()
    assert profile.link_bytes_per_s == pytest.approx(25e9)
    assert profile.link_latency_s == pytest.approx(20e-6)
    assert profile.pageable_bytes_per_s == pytest.approx(10e9)
    assert a_profile().pageable_bytes_per_s is None


def test_the_fit_is_as_close_for_small_copies_as_for_large_ones():
    noisy = (20e-6 + SIZES / 25e9) * [1.0, 1.0, 1.05]
    assert a_profile(copy_s=noisy).link_latency_s == pytest.approx(20e-6, rel=0.05)


def test_a_link_of_another_speed_is_a_real_one():
    spec = make_spec(n_layers=4, top_k=2)
    emulated = a_profile(
        link="emulated:x",
        copy_bytes=[500, 1000],
        copy_s=[6e-5, 1.12e-4],
        host_copy_s=1e-5,
        miss_s=2e-5,
        wait_s=1e-5,
    )
    assert emulated.load_ratio(spec) == pytest.approx(1.12e-4 / (2e-3 / 4 + 2 * 3e-5))
    faster = emulated.at_load_ratio(spec, 0.1)
    assert faster.load_s(1000) == pytest.approx(1.12e-4 / 2)
    assert faster.load_s(500) == pytest.approx(6e-5 / 2)
    assert (faster.host_copy_s, faster.miss_s, faster.wait_s) == (None, None, None)
    assert faster.dense_step_s == emulated.dense_step_s
    real = replace(emulated, link="pcie", wait_s=-1e-5)
    assert real.at_load_ratio(spec, 0.1).wait_s == -1e-5


def test_one_size_says_nothing_of_latency():
    profile = a_profile(copy_bytes=[1000], copy_s=[1e-3])
    assert (profile.link_latency_s, profile.link_bytes_per_s) == (0.0, pytest.approx(1e6))


def test_copies_that_all_take_as_long_are_latency():
    profile = a_profile(copy_s=[2e-5, 2e-5, 1.9e-5])
    assert profile.link_latency_s == pytest.approx(1.97e-5, rel=0.01)
    assert profile.link_bytes_per_s == np.inf


def test_it_comes_back_from_its_file_as_it_was(tmp_path):
    profile = whole()
    again = HardwareProfile.load(profile.save(tmp_path / "machine.json"))
    assert again.to_json() == profile.to_json()
    assert again.pageable_copy_s == pytest.approx(profile.pageable_copy_s)
    assert not again.copy_s.flags.writeable


def test_profiles_in_old_configs_lack_what_was_not_measured_then():
    hardware = TunedConfig.load(FIXTURE).hardware
    assert (hardware.dense_step_s, hardware.expert_s) == (0.001, 0.0001)
    assert hardware.miss_s is None
    assert hardware.expert_s_by_precision is None
    assert hardware.host_matmul_bytes_per_s is None


def test_it_says_in_a_few_lines_what_was_measured_and_what_is_emulated():
    told = str(whole()).splitlines()
    assert "25 GB/s + 20 us pinned, 10 GB/s pageable" in told[1]
    assert "emulated" not in str(whole())
    assert "int4 10 us, bfloat16 30 us" in told[4]
    assert "synchronising 21 us, a launch 6 us" in told[5]
    assert "a copy 80 GB/s, a matrix-vector product 40 GB/s" in told[6]
    few = str(a_profile(link="emulated:some/machine")).splitlines()
    assert len(few) == 4
    assert "emulated: real copies, each held as long as on the named machine" in few[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"miss_s": -1e-3}, "cannot hold negative times: miss_s"),
        ({"dense_step_s": float("nan")}, "cannot hold negative times: dense_step_s"),
        ({"wait_s": float("inf")}, "wait_s must be a number of seconds, got inf"),
        ({"copy_s": [1.0, 2.0]}, r"copy_s must have shape \[3\]"),
        ({"copy_bytes": [3, 2, 1]}, "in ascending order"),
        ({"expert_s_by_precision": {"int4": -1.0}}, "negative times of an expert"),
        ({"host_memory_bytes_per_s": 0.0}, "host_memory_bytes_per_s must be above zero, got 0"),
    ],
)
def test_impossible_numbers_are_refused(values, message):
    with pytest.raises(RecordError, match=message):
        a_profile(**values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "hardware-prof', "is not a readable hardware-profile: it is damaged, cut short"),
        ('{"kind": "tuned-config"}', "holds a 'tuned-config'; expected a 'hardware-profile'"),
        ("[]", "is not a readable hardware-profile"),
        (json.dumps({"kind": "hardware-profile", "schema_version": 9}), "has schema version 9"),
        (json.dumps({"kind": "hardware-profile", "schema_version": 1}), "lacks 'device', 'link'"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "machine.json"
    path.write_text(content)
    with pytest.raises(RecordError, match=message):
        HardwareProfile.load(path)
    with pytest.raises(FileNotFoundError, match="No hardware-profile at"):
        HardwareProfile.load(tmp_path / "none.json")


ALONE = {"float32": 4e-5, "int8": 2e-5, "int4": 1e-5}
MIXED = PrecisionPlan([["int4", "int8"], ["float32", "int4"]], [[1, 2], [4, 1]])


def probed(conditions, alone=ALONE):
    profile = HardwareProfile("cpu", "pcie", [100], [1.0], 0.1, 3e-5, conditions)
    return replace(profile, expert_s_by_precision=alone)


def test_an_expert_takes_what_its_precision_does_against_what_was_probed():
    in_int8 = probed({"experts_by_precision": {"int8": 64}})
    same = in_int8.expert_times(PrecisionPlan.uniform("int8", (2, 2)))
    np.testing.assert_array_equal(same, np.full((2, 2), in_int8.expert_s))
    expected = 3e-5 * np.array([[0.5, 1], [2, 0.5]])
    np.testing.assert_allclose(in_int8.expert_times(MIXED), expected)
    np.testing.assert_array_equal(probed({"dtype": "int8"}).expert_times(MIXED), expected)


def test_experts_of_a_mixed_store_take_what_was_measured_on_average():
    times = probed({"experts_by_precision": MIXED.counts}).expert_times(MIXED)
    assert times.mean() == pytest.approx(3e-5)
    assert times[1, 0] == pytest.approx(2 * times[0, 1]) == pytest.approx(4 * times[0, 0])


@pytest.mark.parametrize(
    "hardware",
    [
        probed({"experts_by_precision": {"int8": 1}}, None),
        probed({}),
        probed({"dtype": "mixed"}),
        probed({"experts_by_precision": {"int2": 3, "int8": 1}}),
    ],
    ids=["not timed", "not said", "said to be mixed", "timed in part"],
)
def test_what_is_not_known_of_the_probe_leaves_one_time_for_all(hardware):
    np.testing.assert_array_equal(hardware.expert_times(MIXED), np.full((2, 2), 3e-5))


def test_a_precision_or_layout_that_is_not_known_takes_what_was_measured():
    hardware = probed({"experts_by_precision": {"int8": 64}})
    times = hardware.expert_times(PrecisionPlan([["int2", "float32"]], [[1, 4]]))
    np.testing.assert_allclose(times, [[3e-5, 6e-5]])
    unknown = PrecisionPlan(None, [[4, 4]])
    np.testing.assert_array_equal(hardware.expert_times(unknown), [[3e-5, 3e-5]])
