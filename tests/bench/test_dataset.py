"""The reader of the published schema: right values, one row at a time, nothing hostile."""

import os

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from jdetune.bench import columns, dataset  # noqa: E402
from jdetune.bench.dataset import open_dataset  # noqa: E402
from jdetune.errors import InputError  # noqa: E402
from tests.bench import small_bench  # noqa: E402


def only(folder):
    return next((folder / "vit").glob("*.parquet"))


@pytest.mark.parametrize(
    "matrix",
    [
        small_bench.MATRIX,
        pa.large_list(pa.list_(pa.float64())),
        pa.list_(pa.list_(pa.float32(), 32)),
    ],
    ids=["list", "large list of float64", "fixed size"],
)
def test_every_layer_comes_back_as_written(tmp_path, matrix):
    rows = small_bench.rows()
    small_bench.write(tmp_path, rows, pre_ft_weight=matrix)
    source = open_dataset(tmp_path, "vit")
    assert source.names == tuple(f"tiny.{name}" for name in small_bench.SHAPES)
    assert source.models == tuple(f"lora_{i}" for i in range(5))
    layers = list(source.read(source.names))
    assert [layer.name for layer in layers] == list(source.names)
    for layer, row in zip(layers, rows, strict=True):
        np.testing.assert_array_equal(layer.base, row["pre_ft_weight"])
        assert layer.base.dtype == np.float32
        for i, lora in enumerate(layer.loras):
            assert (lora.name, lora.rank, lora.alpha) == (f"org/tune-{i}", 2, 4.0)
            np.testing.assert_array_equal(lora.left, row[f"lora_{i}_B_weight"])
            np.testing.assert_array_equal(lora.right, row[f"lora_{i}_A_weight"])


def test_convolutions_become_matrices(tmp_path):
    rows = small_bench.rows()[:1]
    four = pa.list_(pa.list_(pa.list_(pa.list_(pa.float32()))))
    conv = dict(rows[0])
    conv["pre_ft_weight"] = conv["pre_ft_weight"].reshape(48, 8, 2, 2)
    conv["lora_0_A_weight"] = conv["lora_0_A_weight"].reshape(2, 8, 2, 2)
    conv["lora_0_B_weight"] = conv["lora_0_B_weight"].reshape(48, 2, 1, 1)
    small_bench.write(
        tmp_path, [conv], pre_ft_weight=four, lora_0_A_weight=four, lora_0_B_weight=four
    )
    source = open_dataset(tmp_path, "vit")
    (layer,) = source.read(source.names)
    np.testing.assert_array_equal(layer.base, rows[0]["pre_ft_weight"])
    np.testing.assert_array_equal(layer.loras[0].right, rows[0]["lora_0_A_weight"])


def test_rows_are_read_one_at_a_time_and_only_those_asked_for(tmp_path, monkeypatch):
    place = tmp_path / "vit"
    place.mkdir()
    part = small_bench.table(small_bench.rows())
    pq.write_table(part, place / "all.parquet", row_group_size=2)
    decoded = []
    true = dataset._layer
    monkeypatch.setattr(dataset, "_layer", lambda b, *a: decoded.append(b.num_rows) or true(b, *a))
    source = open_dataset(tmp_path, "vit")
    reading = source.read(source.names)
    next(reading)
    assert decoded == [1]
    assert [layer.name for layer in source.read(["tiny.layers.1.v_proj"])] == [
        "tiny.layers.1.v_proj"
    ]
    assert decoded == [1, 1]


def test_a_folder_of_one_subset_alone_is_read_too(tmp_path):
    small_bench.write(tmp_path, small_bench.rows())
    assert open_dataset(tmp_path / "vit", "vit").names == open_dataset(tmp_path, "vit").names


def test_other_subsets_beside_it_are_not_read(tmp_path):
    small_bench.write(tmp_path, small_bench.rows())
    (tmp_path / "mistral").mkdir()
    (tmp_path / "mistral" / "train.parquet").write_bytes(b"not read")
    assert len(open_dataset(tmp_path, "vit").names) == 4


@pytest.mark.parametrize("missing", ["pre_ft_weight", "layer_name", "lora_3_alpha"])
def test_a_missing_column_is_named(tmp_path, missing):
    rows = [{k: v for k, v in row.items() if k != missing} for row in small_bench.rows()]
    small_bench.write(tmp_path, rows)
    with pytest.raises(InputError, match=f"no column {missing}.*Give the folder"):
        open_dataset(tmp_path, "vit")


def change(column, value):
    def changed(rows):
        return [{**rows[0], column: value(rows[0][column])}, *rows[1:]]

    return changed


def ragged(matrix):
    return [*matrix.tolist()[:-1], matrix.tolist()[-1][:-1]]


def with_nan(matrix):
    out = matrix.copy()
    out[3, 4] = np.nan
    return out


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("pre_ft_weight", ragged, "ragged"),
        ("pre_ft_weight", with_nan, "NaN"),
        ("pre_ft_weight", lambda _: None, "missing|not a matrix|ragged"),
        ("pre_ft_weight", lambda _: [], "ragged or empty"),
        ("lora_1_A_weight", lambda a: a[:1], "make no update"),
        ("lora_1_B_weight", lambda b: b[:-1], "make no update"),
        ("lora_2_rank", lambda _: 3, "make no update"),
        ("lora_2_alpha", lambda _: float("inf"), "not a finite number"),
        ("lora_2_alpha", lambda _: 0.0, "make no update"),
        ("lora_2_rank", lambda _: None, "not a finite number"),
        ("layer_name", lambda _: " ", "is not a name"),
        ("layer_name", lambda _: "layers.0.v_proj", "there twice"),
        ("lora_4_name", lambda _: None, "is not a name"),
    ],
)
def test_bad_values_are_refused_by_column(tmp_path, column, value, said):
    small_bench.write(tmp_path, change(column, value)(small_bench.rows()))
    with pytest.raises(InputError, match=said):
        list(open_dataset(tmp_path, "vit").read(["tiny.layers.0.q_proj"]))


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("pre_ft_weight", pa.list_(pa.float32())),
        ("pre_ft_weight", pa.list_(pa.list_(pa.int64()))),
        ("lora_0_A_weight", pa.string()),
        ("layer_name", pa.int64()),
    ],
)
def test_columns_of_another_type_are_refused_before_any_is_read(tmp_path, column, kind):
    rows = [{**row, column: None} for row in small_bench.rows()]
    small_bench.write(tmp_path, rows, **{column: kind})
    with pytest.raises(InputError, match=column):
        open_dataset(tmp_path, "vit")


def test_claims_beyond_any_layer_are_refused(tmp_path, monkeypatch):
    small_bench.write(tmp_path, small_bench.rows())
    monkeypatch.setattr(columns, "MAX_ELEMENTS", 1000)
    with pytest.raises(InputError, match="more than any layer"):
        open_dataset(tmp_path, "vit")


def test_files_of_different_loras_do_not_mix(tmp_path):
    small_bench.write(tmp_path, small_bench.rows())
    fewer = small_bench.table(small_bench.rows(n_loras=3)[:1])
    pq.write_table(fewer, tmp_path / "vit" / "zzz.parquet")
    with pytest.raises(InputError, match="3 LoRAs a layer"):
        open_dataset(tmp_path, "vit")


def test_what_is_not_there_says_how_to_download(tmp_path):
    with pytest.raises(InputError, match="hf download Eliahu/LoWRA-Bench"):
        open_dataset(tmp_path / "none", "vit")
    with pytest.raises(InputError, match="hf download Eliahu/LoWRA-Bench"):
        open_dataset(tmp_path, "vit")


def test_pipes_and_links_out_are_refused(tmp_path):
    small_bench.write(tmp_path / "data", small_bench.rows())
    os.mkfifo(tmp_path / "data" / "vit" / "pipe.parquet")
    with pytest.raises(InputError, match="a pipe"):
        open_dataset(tmp_path / "data", "vit")
    (tmp_path / "data" / "vit" / "pipe.parquet").unlink()
    (tmp_path / "secret.parquet").write_bytes(b"x")
    (tmp_path / "data" / "vit" / "link.parquet").symlink_to(tmp_path / "secret.parquet")
    with pytest.raises(InputError, match="links to"):
        open_dataset(tmp_path / "data", "vit")


def test_a_file_changed_after_it_was_opened_is_refused(tmp_path):
    small_bench.write(tmp_path, small_bench.rows())
    source = open_dataset(tmp_path, "vit")
    small_bench.write(tmp_path, small_bench.rows(seed=1))
    with pytest.raises(InputError, match="changed while it was used"):
        list(source.read(source.names))


def test_damaged_files_are_refused_or_read_whole(tmp_path):
    small_bench.write(tmp_path, small_bench.rows(n_loras=2)[:1])
    path = only(tmp_path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        if rng.random() < 0.3:
            data = data[: rng.integers(len(data))]
        else:
            for place in rng.integers(len(data), size=3):
                data[place] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            for layer in open_dataset(tmp_path, "vit").read(["tiny.layers.0.q_proj"]):
                assert np.isfinite(layer.base).all()
        except InputError:
            refused += 1
    assert refused > 20


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    small_bench.write(tmp_path, small_bench.rows())

    def gone(name):
        raise ImportError(name)

    monkeypatch.setattr(columns.importlib, "import_module", gone)
    with pytest.raises(InputError, match=r"pip install 'jdetune\[bench\]'"):
        open_dataset(tmp_path, "vit")
