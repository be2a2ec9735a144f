import numpy as np
import pytest

from jdetune import pipeline, verification
from jdetune.checkpoint import open_checkpoint, read_tensor, save_safetensors
from jdetune.cli.verify import render
from jdetune.errors import InputError
from jdetune.status import Status
from tests import pico

NAME = "encoder.layer.0.query.weight"


@pytest.fixture
def recovered(tmp_path):
    family = pico.make(tmp_path)
    pico.write(tmp_path / "truth", family.base)
    pipeline.run(family.paths, tmp_path / "out", recover_fn=pico.truth_teller(family.base))
    return family


def spoil(folder, change, file="model.safetensors"):
    checkpoint = open_checkpoint(folder / file)
    tensors = {name: read_tensor(checkpoint, name) for name in checkpoint.tensors}
    change(tensors)
    save_safetensors(folder / file, tensors)


def test_a_perfect_recovery_passes(tmp_path, recovered):
    found = verification.verify(tmp_path / "out", tmp_path / "truth")
    assert found["w_error"] == -40.0
    assert found["exact_fraction"] == 1.0
    assert found["copied"] == found["copied_equal"] == 5
    assert found["ulp"]["0"] == 4 * 48 * 32
    assert found["failures"] == []
    assert len(found["models"]) == 3
    assert all(model["worst"] < 1.0 for model in found["models"])


def test_a_wrong_element_is_measured(tmp_path, recovered):
    def change(tensors):
        tensors[NAME] = tensors[NAME].copy()
        tensors[NAME][0, 0] += 1e-3

    spoil(tmp_path / "out" / "base", change)
    found = verification.verify(tmp_path / "out", tmp_path / "truth")
    row = next(row for row in found["tensors"] if row["name"] == NAME)
    assert row["w_error"] == pytest.approx(np.log10(1e-6 / (48 * 32)), abs=1e-2)
    assert row["exact_fraction"] == 1 - 1 / (48 * 32)
    assert row["ulp"][">8"] == 1
    assert len(found["failures"]) == 3
    assert NAME in found["failures"][0]


def test_a_wrong_factor_fails_one_model(tmp_path, recovered):
    def change(tensors):
        key = next(key for key in tensors if "lora_A" in key)
        tensors[key] = tensors[key] * np.float32(1.001)

    spoil(tmp_path / "out" / "adapters" / "tune-1", change, "adapter_model.safetensors")
    found = verification.verify(tmp_path / "out")
    assert len(found["failures"]) == 1
    assert found["failures"][0].startswith("tune-1: ")


def test_a_copied_tensor_that_changed_is_found(tmp_path, recovered):
    def change(tensors):
        tensors["classifier.bias"] = tensors["classifier.bias"] + np.float32(1e-6)

    spoil(tmp_path / "out" / "base", change)
    found = verification.verify(tmp_path / "out", tmp_path / "truth")
    assert found["copied_equal"] == found["copied"] - 1
    assert "classifier.bias" in found["failures"][0]


def test_models_can_be_given_or_must_be_there(tmp_path, recovered):
    moved = []
    for path in recovered.paths:
        path.rename(path.with_name(f"moved-{path.name}"))
        moved.append(path.with_name(f"moved-{path.name}"))
    with pytest.raises(InputError, match="no longer where"):
        verification.verify(tmp_path / "out")
    assert verification.verify(tmp_path / "out", tmp_path / "truth")["models"] == []
    assert verification.verify(tmp_path / "out", None, moved)["failures"] == []
    wrong = verification.verify(tmp_path / "out", None, moved[::-1])
    assert wrong["failures"]
    with pytest.raises(InputError, match="names 1 models"):
        verification.verify(tmp_path / "out", None, moved[:1])


def test_noise_unit_is_never_below_half_an_ulp():
    weights = np.array([[1.0, 2.0**-20], [2.0**-20, 2.0**-20]], np.float32)
    unit = verification.noise_unit(weights)
    assert unit[0, 0] == 2.0**-24
    assert unit[0, 1] == pytest.approx(2.0**-23 / np.sqrt(24), rel=1e-6)
    assert unit[1, 1] == pytest.approx(2.0**-44, rel=1e-6)


def test_a_tensor_missing_in_the_base_fails(tmp_path, recovered):
    spoil(tmp_path / "out" / "base", lambda tensors: tensors.pop("classifier.bias"))
    found = verification.verify(tmp_path / "out", tmp_path / "truth")
    assert "classifier.bias: in the reference, but not in the base" in found["failures"]


def test_what_no_model_has_is_told_but_no_failure(tmp_path, recovered):
    """transformers no longer saves some buffers that older references hold."""
    ids = np.arange(4)[None]
    pico.write(tmp_path / "truth", {**recovered.base, "encoder.position_ids": ids})
    found = verification.verify(tmp_path / "out", tmp_path / "truth")
    assert found["failures"] == found["missing"] == []
    assert found["not_in_models"] == ["encoder.position_ids"]
    told = render({**found, "passed": True})
    assert "1 tensor(s) of the reference are in no merged model, e.g. encoder.position_ids" in told


def test_a_copied_tensor_unlike_the_reference_fails(tmp_path, recovered):
    pico.write(tmp_path / "truth", {**recovered.base, "classifier.bias": np.ones(3, np.float32)})
    found = verification.verify(tmp_path / "out", tmp_path / "truth")
    assert found["failures"] == ["classifier.bias: copied, but not equal to the reference"]


def test_comparing_nothing_fails(tmp_path, recovered):
    for path in recovered.paths:
        path.rename(path.with_name(f"moved-{path.name}"))
    pico.write(tmp_path / "truth", {"other.weight": np.ones((3, 3), np.float32)})
    found = verification.verify(tmp_path / "out", tmp_path / "truth")
    assert "nothing was compared" in found["failures"]
    assert "no recovered matrix was compared with the reference" in found["failures"]


def test_one_missing_model_fails_without_a_reference(tmp_path, recovered):
    recovered.paths[1].rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"no longer where.*tune-1"):
        verification.verify(tmp_path / "out")
    assert len(verification.verify(tmp_path / "out", tmp_path / "truth")["models"]) == 2


def test_skipped_and_failed_tensors_are_passed_over(tmp_path, recovered):
    options = pipeline.Options(exclude="0.value")
    statuses = {NAME: Status.NOT_LOW_RANK}
    teller = pico.truth_teller(recovered.base, statuses)
    pipeline.run(recovered.paths, tmp_path / "part", options, recover_fn=teller)
    found = verification.verify(tmp_path / "part", tmp_path / "truth")
    assert found["failures"] == []
    assert found["passed_over"] == [NAME, "encoder.layer.0.value.weight"]
