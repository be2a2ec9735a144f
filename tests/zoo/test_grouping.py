"""Which models share a base: the traps of real zoos."""

import numpy as np
import pytest

from jdetune.errors import InputError
from jdetune.zoo import group_report, grouping, sampling
from jdetune.zoo.grouping import group_models, open_zoo
from tests.zoo import zoo_of
from tests.zoo.zoo_of import BF16, base, cast, dense, inner, int8, tune, write


def grouped(tmp_path, models, **options):
    """The report, and the members of every group."""
    zoo = group_models(open_zoo(write(tmp_path / "zoo", models)), **options)
    found = group_report.content(zoo, {})
    return found, [group["members"] for group in found["groups"]]


def entry(found, name):
    return next(e for e in found["models"] if e["name"] == name)


def family(letter, seed, count=3, dtype=np.float32, **options):
    own = base(seed, dtype)
    return {f"{letter}{i}": tune(own, 10 * seed + i, **options) for i in range(count)}


def test_families_are_told_apart_and_ranks_are_found(tmp_path):
    a, b = family("a", 1), family("b", 2, rank=3)
    mixed = {n: m for pair in zip(a.items(), b.items(), strict=True) for n, m in pair}
    found, groups = grouped(tmp_path, mixed)
    assert groups == [["a0", "a1", "a2"], ["b0", "b1", "b2"]]
    assert found["summary"]["exit_code"] == 0
    assert set(entry(found, "a1")["ranks"].values()) == {2}
    assert set(entry(found, "b2")["ranks"].values()) == {3}
    assert len(entry(found, "a1")["ranks"]) == 2
    assert [g["name"] for g in found["groups"]] == ["family-of-a0", "family-of-b0"]
    assert found["groups"][0]["apart"] is None  # far from each other


def test_every_relation_is_tested_in_two_kinds_and_four_matrices(tmp_path):
    found, _ = grouped(tmp_path, family("a", 1))
    for comparison in found["comparisons"]:
        names = [test["name"] for test in comparison["tested"]]
        assert len(names) >= 4
        assert {name.split(".")[2] for name in names} == {"query", "value"}
        assert any("dense" in name for name in comparison["equal"])  # was looked at, too
    found, _ = grouped(tmp_path / "more", family("a", 1), count=7)
    assert all(len(comparison["tested"]) >= 7 for comparison in found["comparisons"])


def test_copies_and_models_equal_in_every_matrix(tmp_path):
    models = family("a", 1, 4)
    models |= {"copy": models["a2"], "biased": {**models["a3"], "norm.bias": np.ones(32, "f4")}}
    models |= {"copy-of-first": models["a0"], "copy-of-copy": models["a2"]}
    found, groups = grouped(tmp_path, models)
    assert groups == [list(models)]
    assert (entry(found, "copy")["equals"], entry(found, "copy")["copy"]) == ("a2", True)
    assert (entry(found, "biased")["equals"], entry(found, "biased")["copy"]) == ("a3", False)
    assert (entry(found, "copy-of-first")["equals"], entry(found, "copy-of-first")["copy"]) == (
        "a0",
        True,
    )
    assert (entry(found, "copy-of-copy")["equals"], entry(found, "copy-of-copy")["copy"]) == (
        "a2",
        True,
    )
    assert found["groups"][0]["distinct"] == 4


def test_links_to_one_file_are_copies_without_reading(tmp_path):
    paths = write(tmp_path / "zoo", {"a": base(1)})
    (tmp_path / "link").symlink_to(paths[0])
    zoo = group_models(open_zoo([*paths, str(tmp_path / "link")]))
    assert zoo.groups[0].twins == {1: (0, "copy")}
    assert zoo.bytes_read == 0


def test_three_copies_are_no_family(tmp_path):
    one = tune(base(1), 0)
    found, groups = grouped(tmp_path, {"a": one, "b": one, "c": one, "d": tune(base(1), 1)})
    assert groups == [["a", "b", "c", "d"]]
    assert found["summary"]["exit_code"] == 5
    assert not found["groups"][0]["recoverable"]
    assert "2 models that differ: a base needs 3" in found["groups"][0]["reason"]


@pytest.mark.parametrize("place", range(0, 18, 5))
def test_a_difference_in_one_matrix_is_found_wherever_it_is(tmp_path, place):
    models = family("a", 1)
    models["odd"] = dense(models["a0"], 0, [inner()[place]])
    found, groups = grouped(tmp_path, models)
    assert entry(found, "odd")["equals"] is None
    assert groups == [list(models)]  # by a1: only this matrix is not of low rank
    assert entry(found, "odd")["notes"][0] == (
        f"no low rank against a0 in 1 of 1 matrices tested ({inner()[place]}, rank 32 of 32): "
        "fine-tuned in full there, or of a large rank"
    )
    models["odd"] = tune(models["a0"], 99, names=[inner()[place]])
    found, groups = grouped(tmp_path / "low", models)
    assert entry(found, "odd")["equals"] is None
    assert groups == [list(models)]


def test_a_model_fine_tuned_in_full_in_a_few_matrices_only(tmp_path):
    own = base(1)
    models = {f"a{i}": tune(own, i, names=["layer.0.query.weight"]) for i in range(3)}
    models["partly"] = dense(own, 0, inner(("dense",)))
    found, groups = grouped(tmp_path, models)
    assert groups == [["a0", "a1", "a2"]]
    reason = entry(found, "partly")["reason"]
    assert "), equal in " in reason
    assert "others: some of its matrices were fine-tuned in full" in reason


def test_a_full_fine_tune_stands_alone(tmp_path):
    models = family("a", 1)
    models["full"] = dense(models["a0"], 0, list(models["a0"]))
    found, groups = grouped(tmp_path, models)
    assert groups == [["a0", "a1", "a2"]]
    assert found["summary"] == {
        **{"models": 4, "groups": 1, "recoverable": 1, "grouped": 3, "alone": 1, "exit_code": 5}
    }
    assert "no low rank against a0 in 4 of 4" in entry(found, "full")["reason"]
    assert "a full fine-tune, a quantised copy" in entry(found, "full")["reason"]


def test_the_majority_decides_and_the_rest_is_said(tmp_path):
    models = family("a", 1, names=inner())
    models["partly"] = dense(models["a1"], 0, ["layer.3.query.weight"])
    found, groups = grouped(tmp_path, models, count=18)
    assert groups == [["a0", "a1", "a2", "partly"]]
    assert entry(found, "partly")["notes"] == [
        "no low rank against a0 in 1 of 18 matrices tested (layer.3.query.weight, rank 32 of 32): "
        "fine-tuned in full there, or of a large rank"
    ]
    assert entry(found, "a1")["notes"] == []


def test_heads_and_embeddings_do_not_count(tmp_path):
    models = family("a", 1)
    names = ["head.weight", "embeddings.weight", "norm.bias"]
    models = {n: dense(m, i, names, 0.05) for i, (n, m) in enumerate(models.items())}
    found, groups = grouped(tmp_path, models)
    assert groups == [list(models)]
    assert all(entry(found, name)["notes"] == [] for name in models)


def test_a_merged_model_as_base_is_a_sub_family(tmp_path):
    own = base(1)
    child = tune(own, 50, rank=5)
    models = {f"a{i}": tune(own, i) for i in range(3)} | {
        f"b{i}": tune(child, 10 + i) for i in range(3)
    }
    found, groups = grouped(tmp_path, models)
    assert groups == [list(models)]
    group = found["groups"][0]
    assert group["families"] == [["a0", "a1", "a2"], ["b0", "b1", "b2"]]
    assert group["families_apart"] == 5
    assert {rank for name in models for rank in entry(found, name)["ranks"].values()} == {2}


def test_a_dequantised_base_is_another_one(tmp_path):
    own = base(1)
    whole = {f"w{i}": tune(own, i) for i in range(3)}
    quantised = {f"q{i}": tune(int8(own), 10 + i) for i in range(3)}
    found, groups = grouped(tmp_path, whole | quantised)
    assert groups == [list(whole), list(quantised)]
    assert "QLoRA merged into the dequantised base" in found["groups"][1]["apart"]


@pytest.mark.parametrize("seed", range(3))
def test_a_quantised_base_does_not_hide_in_bfloat16_rounding(tmp_path, seed):
    """Rows of very different size, with outliers: int8 is above the rounding in the small ones."""
    rng = np.random.default_rng(seed)
    own = base(seed)
    for name in inner():
        rows = np.exp(1.5 * rng.standard_normal((len(own[name]), 1)))
        own[name] = (0.03 * rows * rng.standard_t(4, own[name].shape)).astype(np.float32)
    half = {f"a{i}": tune(cast(own, BF16), i) for i in range(3)}
    quantised = {f"q{i}": tune(int8(own), 10 + i) for i in range(3)}
    _, groups = grouped(tmp_path, half | quantised)
    assert groups == [list(half), list(quantised)]


def test_one_family_in_several_dtypes(tmp_path):
    models = family("a", 1, 6)
    models = {
        n: cast(m, (np.float32, BF16, np.float16)[i % 3]) for i, (n, m) in enumerate(models.items())
    }
    found, groups = grouped(tmp_path, models)
    assert groups == [list(models)]
    assert found["groups"][0]["dtypes"] == ["bfloat16", "float16", "float32"]


def test_bfloat16_merges_of_the_rounded_base_belong_to_a_float32_family(tmp_path):
    """They were rounded twice, as the base and as the merged model."""
    own = base(1)
    models = {f"a{i}": tune(own, i) for i in range(3)}
    models |= {f"h{i}": tune(cast(own, BF16), 10 + i) for i in range(3)}
    found, groups = grouped(tmp_path, models)
    assert groups == [list(models)]
    assert [note for name in models for note in entry(found, name)["notes"]] == []
    assert set(entry(found, "a1")["ranks"].values()) == {2}


def test_a_base_that_was_rounded_before_the_merge(tmp_path):
    own = base(1)
    rounded = cast(cast(own, BF16), np.float32)
    models = {f"a{i}": tune(own, i) for i in range(3)} | {
        f"b{i}": tune(rounded, 10 + i) for i in range(3)
    }
    found, groups = grouped(tmp_path, models)
    assert groups == [["a0", "a1", "a2"], ["b0", "b1", "b2"]]
    assert "where one was rounded to bfloat16 before" in found["groups"][1]["apart"]


def test_other_architectures_are_told_by_headers(tmp_path):
    models = family("a", 1)
    models["other"] = {f"vit.{n}": w[:40] for n, w in base(3).items()}
    found, groups = grouped(tmp_path, models)
    assert groups == [["a0", "a1", "a2"]]
    assert "another architecture" in entry(found, "other")["reason"]
    assert not any("other" in (c["first"], c["second"]) for c in found["comparisons"])


def test_an_unrelated_base_is_settled_by_two_matrices(tmp_path):
    found, _ = grouped(tmp_path, family("a", 1) | family("b", 2, 1))
    relation = next(c for c in found["comparisons"] if c["second"] == "b0")
    assert len(relation["tested"]) == 2
    assert "another base: no low rank against a0 in 2 of 2" in entry(found, "b0")["reason"]


@pytest.mark.parametrize("place", [0, 1])
def test_nan_in_a_row_or_in_a_whole_model(tmp_path, place):
    models = family("a", 1, 4)
    for name in inner():
        models[f"a{place}"][name] = models[f"a{place}"][name].copy()
        models[f"a{place}"][name][5] = np.nan
    _, groups = grouped(tmp_path, models)
    assert groups == [list(models)]
    for name in inner():
        models[f"a{place}"][name][:] = np.nan
    found, groups = grouped(tmp_path / "whole", models)
    assert groups == [[name for name in models if name != f"a{place}"]]
    assert "NaN or infinity in layer" in entry(found, f"a{place}")["reason"]


def test_large_ranks_do_not_hide_a_family(tmp_path):
    own = base(1)
    ranks = {"big": 16, "small": 2, "large": 14, "tiny": 1}
    models = {
        n: tune(own, i, rank=r, names=inner(), size=0.04) for i, (n, r) in enumerate(ranks.items())
    }
    found, groups = grouped(tmp_path, models)
    assert groups == [list(models)]
    first = next(c for c in found["comparisons"] if {c["first"], c["second"]} == {"big", "large"})
    assert first["verdict"] == "unrelated"  # 30 of 32 directions: by itself it could be any


def test_more_models_take_comparisons_in_proportion(tmp_path):
    found, groups = grouped(tmp_path, family("a", 1, 9) | family("b", 2, 9))
    assert len(groups) == 2
    assert len(found["comparisons"]) == 8 + 9 + 8


def test_little_memory_and_another_seed_give_the_same_groups(tmp_path, monkeypatch):
    models = family("a", 1) | family("b", 2)
    found, groups = grouped(tmp_path, models)
    assert grouped(tmp_path / "again", models)[0]["comparisons"] == found["comparisons"]
    other, other_groups = grouped(tmp_path / "seed", models, seed=3)
    assert other_groups == groups
    assert other["comparisons"] != found["comparisons"]
    monkeypatch.setattr(sampling, "ROOM", 1)
    tight, tight_groups = grouped(tmp_path / "tight", models)
    assert tight_groups == groups
    assert tight["comparisons"] == found["comparisons"]
    assert tight["bytes_read"] > found["bytes_read"]


def test_only_wanted_matrices_are_looked_at(tmp_path):
    models = family("a", 1)
    models["odd"] = dense(models["a1"], 0, inner(("value",)))
    found, groups = grouped(tmp_path, models, wanted=lambda name: "value" in name)
    assert groups == [["a0", "a1", "a2"]]
    found, groups = grouped(tmp_path / "query", models, wanted=lambda name: "query" in name)
    assert groups == [list(models)]
    assert entry(found, "odd")["copy"] is False
    nothing, groups = grouped(tmp_path / "none", models, wanted=lambda name: False)
    assert groups == []
    assert "no large matrix in common" in nothing["models"][0]["reason"]


def test_one_model_or_none(tmp_path):
    found, groups = grouped(tmp_path, {"a": base(1)})
    assert groups == []
    assert found["summary"]["exit_code"] == 5
    assert "no other model" in found["models"][0]["reason"]
    with pytest.raises(InputError, match="no model is given"):
        open_zoo([])


def test_progress_is_told(tmp_path):
    told = []
    grouped(tmp_path, family("a", 1), progress=lambda *step: told.append(step))
    assert told == [("compare", i, 3) for i in (1, 2, 3)] + [("ranks", 1, 1)]


def test_a_group_of_one_kind_of_matrix(tmp_path):
    """Models of a single layer have every matrix once."""
    own = {n: w for n, w in base(1).items() if n.startswith("layer.0") or "embed" in n}
    models = {f"a{i}": tune(own, i, names=inner()[:2]) for i in range(3)}
    assert grouped(tmp_path, models)[1] == [list(models)]
    assert grouping.ENOUGH == 3
    assert zoo_of.LAYERS == 6
